"""Layers with a sliding window: what their queries see, at any length, beside layers that see everything."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrun import _core
from kvrun._core import bench
from kvrun.files.model_file import read_model_file
from support import cases
from support.cache_steps import STEPS, Pair, StepLlama, go_on, restored, run_steps
from support.ring import FORMAT_ERROR, TILE, every, ragged, rms, run
from support.sliding import SlidingCache, SlidingLlama, layer_cache, widths

pytestmark = pytest.mark.crossed

OPTIONS = [
    dict(ctx=200, sinks=4, window=64),
    dict(ctx=64, sinks=0, window=0),
    dict(ctx=200, sinks=70, window=1),
    dict(ctx=300, sinks=1, window=129),
]


BOUNDARIES = [(options, width) for options in OPTIONS for width in widths(options)]
# All of the first options, some of the others.
MOST = [(o, w) for i, o in enumerate(OPTIONS) for w in (widths(o) if i == 0 else widths(o)[i::3])]


@pytest.fixture(scope="module")
def build(converted):
    """build(windows, precise, threads): a model file of two layers with these windows, and its engine."""

    def make(windows, precise=False, threads=1):
        file = read_model_file(converted("odd-sizes"))
        d = file.description = replace(file.description, sliding_windows=windows)
        return file, _core.Engine(d, file.weights, file.vectors, d.rope_tables, threads, precise)

    return make


def random_tokens(file, n, seed=5):
    return np.random.default_rng(seed).integers(0, file.description.vocab_size, n).astype(np.int32)


# --- what is seen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", cases.some(BOUNDARIES, BOUNDARIES[::3]), ids=str)
def test_the_newest_are_always_there_and_no_more(boundary):
    """The list model itself: its ring has what every query sees, and with a slot less it has not."""
    options, width = boundary
    cache, small = SlidingCache(width, **options), SlidingCache(width, **options)
    small.n_slots -= 1
    missed = 0
    for _ in range(3 * max(width, 200)):
        cache.append()
        cache.visible()
        small.append()
        missed += small.n_slots >= 0 and not set(cache.visible()) <= set(small.kept())
    assert missed > 0 or cache.n_slots == 0


@pytest.mark.parametrize("boundary", cases.some(MOST, MOST[::3]), ids=str)
def test_a_layer_that_slides_beside_one_that_does_not(boundary, build):
    """Logits equal the rule's past many turns, for every chunking; the other layer is as ever."""
    options, width = boundary
    windows = (width, None) if width % 2 else (None, width)
    file, engine = build(windows)
    tokens = random_tokens(file, options["ctx"] + 300)
    expected = SlidingLlama(file, **options).logits(tokens)
    for chunks in (every(512), every(1), ragged()):
        logits = run(engine, tokens, chunks, **options)
        error = np.abs(logits - expected).max(-1) / np.abs(expected).max()
        assert error.max() <= 1e-4, f"first at token {np.argmax(error > 1e-4)}"


@pytest.mark.parametrize("widths", [(32, 32), (100, 200), (1, 300), (64, 128)], ids=str)
def test_a_model_in_which_all_layers_slide(widths, build):
    """The same logits whatever room the cache has, at any length: nothing is lost that the model would see."""
    file, engine = build(widths)
    tokens = random_tokens(file, 1000)
    exact = SlidingLlama(file, ctx=2000, sinks=0, window=64).logits(tokens)
    for options in (
        dict(ctx=2000, sinks=4, window=64),
        dict(ctx=300, sinks=4, window=64),
        dict(ctx=310, sinks=40, window=10),
    ):
        error = np.abs(run(engine, tokens, ragged(), **options) - exact) / np.abs(exact).max()
        assert error.max() <= 1e-4


@pytest.mark.parametrize("widths", [(65, None), (None, 130), (20, 70)], ids=str)
@pytest.mark.parametrize("k, v", [*FORMAT_ERROR, ("q2", "q2")], ids=str)
def test_every_format_slides(k, v, widths, build):
    """With the errors of its format and no more; the same to the bit however the tokens are fed."""
    options = OPTIONS[0]
    file, engine = build(widths, precise=True)
    tokens = random_tokens(file, 600, seed=6)
    expected = SlidingLlama(file, **options).logits(tokens)
    one_by_one = run(engine, tokens, every(1), k, v, **options)
    assert rms(one_by_one - expected) <= FORMAT_ERROR.get((k, v), 1.5) * rms(expected)
    for chunks in (every(512), ragged()):
        np.testing.assert_array_equal(run(engine, tokens, chunks, k, v, **options), one_by_one)
    fast = run(build(widths)[1], tokens, every(200), k, v, **options)
    assert rms(fast - expected) <= FORMAT_ERROR.get((k, v), 1.5) * rms(expected)


def test_many_spans_of_tiles(build):
    """A window of several spans beside a longer ring, token by token and in chunks that are split or not."""
    file, engine = build((1100, None), threads=2)
    options = dict(ctx=4096, sinks=4, window=64)
    kv = _core.KVCache(engine, "f32", "f32", **options)
    tokens = random_tokens(file, 1400)
    logits = [engine.forward(tokens[at : at + 400], kv, "all") for at in range(0, 1200, 400)]
    logits += [engine.forward(tokens[at : at + 16], kv, "all") for at in range(1200, 1360, 16)]
    logits += [engine.forward(tokens[at : at + 1], kv, "all") for at in range(1360, 1400)]
    expected = SlidingLlama(file, **options).logits(tokens)
    assert np.abs(np.concatenate(logits) - expected).max() <= 1e-4 * np.abs(expected).max()


# --- state ----------------------------------------------------------------------------------------


class Layers:
    """List models of all layers; `layer` says whose turn it is."""

    def __init__(self, windows, options):
        self.caches, self.layer = [layer_cache(width, options) for width in windows], 0

    @property
    def n(self):
        return self.caches[0].n

    @property
    def sinks(self):
        """Those that move with the oldest token that is left: none if the layer slides."""
        cache = self.caches[self.layer]
        return [] if isinstance(cache, SlidingCache) else cache.sinks

    def append(self):
        for cache in self.caches:
            cache.append()

    def visible(self):
        return self.caches[self.layer].visible()

    def truncate(self, n):
        tried = copy.deepcopy(self.caches)
        for cache in tried:
            cache.truncate(n)
        self.caches = tried


class SlidingSteps(StepLlama):
    def __init__(self, file, options, windows):
        super().__init__(file, options)
        self.cache = Layers(windows, options)

    def attention(self, x, layer):
        self.cache.layer = int(layer.split(".")[1])
        return super().attention(x, layer)


WIDTHS = st.one_of(st.none(), st.sampled_from([1, 2, 64, 65, 128, 200]), st.integers(1, 400))


@settings(max_examples=cases.examples(30), deadline=None, suppress_health_check=list(HealthCheck))
@given(options=st.sampled_from(OPTIONS), windows=st.tuples(WIDTHS, WIDTHS), steps=STEPS, seed=st.integers(0, 99))
def test_random_sequences(build, options, windows, steps, seed):
    """Logits are those of the list models after any sequence of feeding, truncating, forking, saving and loading."""
    file, engine = build(windows)
    pair = Pair(_core.KVCache(engine, "f32", "f32", **options), SlidingSteps(file, options, windows))
    run_steps(engine, pair, steps, options, seed)


@pytest.mark.parametrize("windows", [(30, None), (64, 65), (190, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_truncation_to_every_length(options, windows, build):
    """What can be kept, and what the next tokens see then, around every boundary."""
    file, engine = build(windows)
    tokens = random_tokens(file, 2 * options["ctx"], seed=1)
    kv, reference = _core.KVCache(engine, "f32", "f32", **options), SlidingSteps(file, options, windows)
    whole, kept = Pair(kv, reference), 0
    for start in range(0, len(tokens), 512):
        whole.feed(engine, tokens[start : start + 512])
    edges = options["sinks"], windows[0] or 0
    lengths = [
        n
        for n in range(len(tokens) + 1)
        if n > len(tokens) - 70 or any((n - edge) % TILE in (0, 1, 2, 62, 63) for edge in edges) or n < 3 or n % 41 == 0
    ]
    for n in cases.in_turn(lengths, OPTIONS.index(options), every=2):
        cut = Pair(kv.copy(), reference.fork())
        cut.truncate(n)
        cut.feed(engine, tokens[:2])
        kept += cut.kv.n_tokens == n + 2
    assert kept > cases.either(2, 0)


def test_what_a_truncation_needs(build):
    options = dict(ctx=1000, sinks=4, window=64)
    _file, engine = build((128, None))
    kv = filled(engine, "f16", "f16", 700, **options)
    kv.truncate(kv.n_tokens - 1)
    state = kv.state()
    with pytest.raises(
        ValueError,
        match=r"cannot keep 600 tokens: 512 tokens after the first 4 have left the cache, "
        r"and a sliding window of 128 needs some$",
    ):
        kv.truncate(600)
    assert np.array_equal(kv.state(), state)
    assert kv.lost == 8 and not kv.outgrown  # 9 tiles were packed, the smaller ring has a slot
    kv.truncate(0)
    assert kv.lost == 0


@pytest.mark.parametrize("windows", [(32, None), (65, 200), (100, 100)], ids=str)
@pytest.mark.parametrize("name", _core.KV_FORMATS)
@pytest.mark.parametrize("ctx", [200, 1000])
def test_rewinding_is_exact_or_refused(name, windows, ctx, build):
    """A snapshot has what windows no longer show; what follows is what would have followed then."""
    file, engine = build(windows)
    options = dict(ctx=ctx, sinks=4, window=64)
    tokens = random_tokens(file, 620)
    kv, snapshots, alike = _core.KVCache(engine, name, name, **options), {}, {}
    for n in range(0, 620, 31):
        snapshots[n], alike[n] = kv.snapshot(), kv.copy()
        engine.forward(tokens[n : n + 31], kv, "none", decoding=False)
    done = 0
    for n, snapshot in snapshots.items():
        for held in snapshot, None, snapshots.get(n + 31):
            cut, lone = kv.copy(), alike[n].copy()
            if not cut.rewind(n, held):
                assert held is not snapshot or kv.outgrown
                assert cut.n_tokens == 620 and np.array_equal(cut.state(), kv.state())
                continue
            done += 1
            for cache in (cut, lone):
                engine.forward(tokens[n : n + 150], cache, "none", decoding=False)
            again = restored(engine, cut, options)
            expected = go_on(engine, lone)
            assert np.array_equal(go_on(engine, cut), expected) and np.array_equal(go_on(engine, again), expected)
    assert done >= 3


@pytest.mark.parametrize("windows", [(100, 200), (100, None)], ids=str)
@pytest.mark.parametrize("name", _core.KV_FORMATS)
def test_a_snapshot_that_was_made_after_a_way_back(windows, name, build):
    """It leads back to no place that shows what had left the ring by then."""
    file, engine = build(windows)
    options = dict(ctx=1000, sinks=4, window=64)
    tokens, done, refused = random_tokens(file, 700), 0, 0
    for most in (469, 490, 512):
        kv = _core.KVCache(engine, name, name, **options)
        engine.forward(tokens[:432], kv, "none", decoding=False)
        before = kv.snapshot()
        engine.forward(tokens[432:most], kv, "none", decoding=False)
        assert kv.rewind(432) or kv.rewind(432, before)
        engine.forward(tokens[432:451], kv, "none", decoding=False)
        snapshot = kv.snapshot()
        engine.forward(tokens[451:most], kv, "none", decoding=False)
        for n in range(388, 452, 3):
            cut, lone = kv.copy(), _core.KVCache(engine, name, name, **options)
            if not cut.rewind(n, snapshot):
                refused += 1
                continue
            done += 1
            engine.forward(tokens[:n], lone, "none", decoding=False)
            assert np.array_equal(go_on(engine, cut), go_on(engine, lone)), n
    assert done and (refused or name not in ("f16", "f32"))


@pytest.mark.parametrize("name", _core.KV_FORMATS)
def test_ways_back_one_after_the_other_in_an_outgrown_cache(name, build):
    """Each is exact or refused: what a ring had lost at its end is not what it had lost at a place before."""
    file, engine = build((None, None))
    options = dict(ctx=200, sinks=4, window=64)
    tokens = random_tokens(file, 500)
    kv, done = _core.KVCache(engine, name, name, **options), 0
    engine.forward(tokens, kv, "none", decoding=False)
    for n in (495, 490, 450, 460, 420, 388, 380):
        cut, lone = kv.copy(), _core.KVCache(engine, name, name, **options)
        if not cut.rewind(n):
            continue
        done += 1
        engine.forward(tokens[:n], lone, "none", decoding=False)
        assert np.array_equal(go_on(engine, cut.copy()), go_on(engine, lone)), n
        engine.forward(tokens[n:], cut, "none", decoding=False)
        kv = cut
    assert done


def test_what_has_outgrown_a_cache(build):
    """Only what layers that see everything have lost is gone for good; without any, more than ctx has room for."""
    options = dict(ctx=200, sinks=4, window=64)  # room for 3 tiles in the ring
    for windows in ((32, None), (32, 100), None, (260, 260)):
        kv = filled(build(windows)[1], "f32", "f32", 4 + 64 + 4 * TILE - 1, **options)
        assert not kv.outgrown
        build(windows)[1].forward([1], kv)
        assert kv.outgrown
        kv.reset()
        assert not kv.outgrown


LENGTHS = [0, 1, 4, 5, 68, 131, 132, 133, 260, 700]


def filled(engine, k, v, n, **options):
    kv = _core.KVCache(engine, k, v, **options)
    tokens = np.random.default_rng(n).integers(0, 60, n).astype(np.int32)
    for start in range(0, n, 512):
        engine.forward(tokens[start : start + 512], kv, "none")
    return kv


@pytest.mark.parametrize("windows", [(32, None), (65, 200)], ids=str)
@pytest.mark.parametrize("k, v", [(name, name) for name in _core.KV_FORMATS] + [("q4", "q2")])
def test_a_state_is_exact(k, v, windows, build):
    """Saved, loaded and forked caches go on alike to the bit, also after a truncation, and share nothing."""
    options = dict(ctx=260, sinks=4, window=64)
    engine = build(windows)[1]
    for n in LENGTHS:
        kv = filled(engine, k, v, n, **options)
        if n > 140:
            kv.truncate(n - 3)
        state, fork, used = kv.state(), kv.copy(), filled(engine, k, v, 511, **options)
        used.load_state(kv.n_tokens, kv.lost, state)
        caches = [fork, restored(engine, kv, options), used]
        expected = go_on(engine, kv)
        for other in caches:
            assert (other.n_tokens, np.array_equal(other.state(), state)) == (max(n - 3, 0) if n > 140 else n, True)
            assert np.array_equal(go_on(engine, other), expected)
            assert np.array_equal(other.state(), kv.state()) and other.lost == kv.lost


def test_states_that_cannot_be(build):
    """A state in which a sliding window would miss something is refused, and the cache stays as it was."""
    options = dict(ctx=400, sinks=4, window=64)
    engine = build((100, None))[1]
    kv, other = filled(engine, "f16", "f16", 700, **options), filled(engine, "f16", "f16", 150, **options)
    state, before = kv.state(), other.state()
    for lost in (kv.lost + 2, kv.lost + 3, 1 << 58, 1 << 80, -1):
        with pytest.raises(ValueError, match=f"cannot have lost {lost}"):
            other.load_state(700, lost, state)
    for lost in (0, kv.lost - 1):
        other.load_state(700, lost, state)  # less than what n_tokens says anyway
        assert other.lost == kv.lost
        other.load_state(150, 0, before)
    with pytest.raises(ValueError, match="the state has"):
        other.load_state(700, kv.lost, state[:-1])
    assert other.n_tokens == 150 and np.array_equal(other.state(), before)


def test_a_cache_of_another_model(build):
    engine, other = build((100, None))[1], build((None, 100))[1]
    with pytest.raises(ValueError, match="made for another model"):
        engine.forward([1], _core.KVCache(other))
    with pytest.raises(ValueError, match="made for another model"):
        bench.attention(engine, filled(other, "f16", "f16", 3))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=str)
@pytest.mark.parametrize("k, v", [("f16", "f16"), ("f32", "f16")])
def test_bytes_are_counted_exactly(boundary, k, v, build):
    """A ring of just the size that the window needs."""
    options, width = boundary
    file, engine = build((width, None))
    d, size = file.description, {"f16": 2, "f32": 4}
    pad, lanes = -(-d.head_dim // 16) * 16, -(-options["sinks"] // 16) * 16
    fixed = 4 * (d.head_dim * lanes + pad * options["sinks"])
    tile = TILE * (d.head_dim * size[k] + pad * size[v])
    tiles = 2 * -(-(options["window"] + 64) // 64) + sum(layer_cache(w, options).n_slots for w in (width, None))
    assert _core.kv_bytes(d, k, v, **options) == d.n_kv_heads * (2 * fixed + tiles * tile)
    assert _core.KVCache(engine, k, v, **options).nbytes == _core.kv_bytes(d, k, v, **options)


def gemma_like(windows):
    return SimpleNamespace(
        n_layers=len(windows), n_heads=8, n_kv_heads=2, head_dim=64, attention_scale=0.125, sliding_windows=windows
    )


def test_a_long_context_costs_what_its_full_layers_do():
    windows = [512 if i % 6 < 5 else None for i in range(18)]
    sizes = {
        name: _core.kv_bytes(gemma_like(w), "q4", "q4", ctx=32768)
        for name, w in (("some", windows), ("all", [None] * 18), ("three", [None] * 3))
    }
    assert sizes["three"] < sizes["some"] < 0.2 * sizes["all"]
    assert _core.kv_bytes(gemma_like([0] * 18), "q4", "q4", ctx=32768) == sizes["all"]


@pytest.mark.parametrize(
    "windows, message", [([1], "1 sliding windows for 2 layers"), ([3, -1], "cannot be negative: -1")]
)
def test_impossible_windows(windows, message):
    description = SimpleNamespace(n_layers=2, n_kv_heads=1, head_dim=8, sliding_windows=windows)
    for make in (_core.kv_bytes, lambda d: _core.KVCache(SimpleNamespace(description=d))):
        with pytest.raises(ValueError, match=message):
            make(description)


def test_a_window_beyond_any_number():
    d = gemma_like([1 << 100, None])
    assert _core.kv_bytes(d) == _core.kv_bytes(gemma_like([None, None]))
    assert _core.KVCache(SimpleNamespace(description=d)).nbytes == _core.kv_bytes(d)


@pytest.mark.parametrize("width", [1, 40, 64, 200, 300, 1000])
@pytest.mark.parametrize("n", [0, 1, 4, 5, 68, 132, 300, 301, 5000])
def test_bytes_read(n, width):
    """Tiles that the window reaches into, whole; of the newest, those that there are; sinks in sight."""
    options = dict(ctx=10_000, sinks=4, window=64)
    engine = SimpleNamespace(description=gemma_like([width] * 2), threads=1)
    token = 64 * 2 * 2
    first = max(0, (n - width - 4) // TILE)
    seen = max(0, n - 4 - TILE * first)
    sinks = min(n, 4) if n - width < 4 else 0
    kv = _core.KVCache(engine, **options)
    assert bench.bytes_read(kv, n) == 2 * 2 * (seen * token + sinks * 4 * 2 * 64) <= kv.nbytes
    bench.fill(kv, n)
    assert bench.bytes_read(kv) == bench.bytes_read(kv, n)


def test_what_a_step_reads_does_not_grow_with_the_context():
    read = []
    for n, ctx in ((2000, 2048), (20_000, 32_768), (100_000, 131_072)):
        engine = SimpleNamespace(description=gemma_like([512] * 2), threads=1)
        read.append(bench.bytes_read(_core.KVCache(engine, "q4", "q4", ctx=ctx), n))
    assert max(read) - min(read) <= 2 * 2 * 2 * 64 * 64 * 2
