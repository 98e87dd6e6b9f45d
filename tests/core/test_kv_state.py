"""Truncate, copy, state, load_state: the cache against a list model, and exact to the bit."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrun import _core
from kvrun._core import probe
from kvrun.files.model_file import read_model_file
from support import cases
from support.cache_steps import STEPS, Pair, StepLlama, go_on, restored, run_steps
from support.ring import OPTIONS, TILE

pytestmark = pytest.mark.crossed


def load(path):
    file = read_model_file(path)
    return file, _core.Engine(file.description, file.weights, file.vectors, file.description.rope_tables, 2)


@pytest.fixture(scope="module")
def model(converted):
    return load(converted("odd-sizes"))


@pytest.fixture(scope="module")
def wide(converted):
    """head_dim 64: rows without padding."""
    return load(converted("wide-heads"))


GEOMETRIES = [
    dict(ctx=64, sinks=0, window=0),
    dict(ctx=140, sinks=4, window=64),
    dict(ctx=200, sinks=70, window=1),
    dict(ctx=300, sinks=1, window=129),
]


@settings(max_examples=cases.examples(30), deadline=None, suppress_health_check=list(HealthCheck))
@given(options=st.sampled_from(GEOMETRIES), steps=STEPS, seed=st.integers(0, 99))
def test_random_sequences(model, options, steps, seed):
    """Logits are those of the list model after any sequence of feeding, truncating, forking, saving and loading."""
    file, engine = model
    pair = Pair(_core.KVCache(engine, "f32", "f32", **options), StepLlama(file, options))
    run_steps(engine, pair, steps, options, seed)


@pytest.mark.parametrize("options", cases.some(OPTIONS, OPTIONS[:4:3]), ids=str)
def test_truncation_to_every_length(options, model):
    """Around every boundary: the next token sees what the list model shows."""
    file, engine = model
    tokens = np.random.default_rng(1).integers(0, file.description.vocab_size, 2 * options["ctx"]).astype(np.int32)
    kv, reference = _core.KVCache(engine, "f32", "f32", **options), StepLlama(file, options)
    whole = Pair(kv, reference)
    for start in range(0, len(tokens), 512):
        whole.feed(engine, tokens[start : start + 512])
    for n in range(len(tokens) + 1):
        if (n - options["sinks"]) % TILE in (0, 1, 2, 62, 63) or n < 3 or n % 41 == 0:
            cut = Pair(kv.copy(), reference.fork())
            cut.truncate(n)
            cut.feed(engine, tokens[:2])


@pytest.mark.thorough
def test_a_gap_is_passed_over(model):
    """After evictions, truncation leaves a text with a hole; feeding on fills the ring again, for ten turns."""
    file, engine = model
    options = dict(ctx=200, sinks=4, window=64)
    pair = Pair(_core.KVCache(engine, "f32", "f32", **options), StepLlama(file, options))
    tokens = np.random.default_rng(2).integers(0, file.description.vocab_size, 500).astype(np.int32)
    pair.feed(engine, tokens[:497])
    lost = pair.kv.lost
    assert lost > 0
    gone = options["sinks"] + lost * TILE
    for n in (gone, gone - 1, options["sinks"] + 1):
        pair.truncate(n)
        assert pair.kv.n_tokens == 497
    pair.truncate(gone + 1)
    assert pair.kv.lost == lost
    for _ in range(5):
        pair.feed(engine, tokens[:400])
    pair.truncate(options["sinks"])  # only the sinks are left: they were never gone
    assert pair.kv.lost == 0
    pair.feed(engine, tokens[:300])


# --- to the bit -----------------------------------------------------------------------------------

LENGTHS = [0, 1, 3, 4, 5, 68, 131, 132, 133, 260, 700]


def filled(engine, k, v, n, **options):
    kv = _core.KVCache(engine, k, v, **options)
    tokens = np.random.default_rng(n).integers(0, 60, n).astype(np.int32)
    for start in range(0, n, 512):
        engine.forward(tokens[start : start + 512], kv, "none")
    return kv


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("k, v", [(name, name) for name in _core.KV_FORMATS] + [("f16", "f32")])
def test_a_state_is_exact(k, v, n, wide):
    """A loaded cache gives the same logits, bit for bit, and the same state; also one that had another text."""
    options = dict(ctx=260, sinks=4, window=64)
    kv = filled(wide[1], k, v, n, **options)
    state, fresh, used = kv.state(), restored(wide[1], kv, options), filled(wide[1], k, v, 511, **options)
    used.load_state(kv.n_tokens, kv.lost, state)
    expected = go_on(wide[1], kv)
    for other in (fresh, used):
        assert (other.n_tokens, np.array_equal(other.state(), state)) == (n, True)
        assert np.array_equal(go_on(wide[1], other), expected)
        assert np.array_equal(other.state(), kv.state())


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", _core.KV_FORMATS)
def test_a_fork_shares_nothing(name, n, wide):
    engine = wide[1]
    kv = filled(engine, name, name, n, ctx=260, sinks=4, window=64)
    forks = [kv.copy() for _ in range(3)]
    state = kv.state()
    expected = go_on(engine, forks[0])
    assert np.array_equal(kv.state(), state)  # what a fork does, the original does not feel
    assert np.array_equal(go_on(engine, kv), expected)
    kv.truncate(0)
    engine.forward(np.full(512, 5, np.int32), kv)
    assert np.array_equal(forks[1].state(), state)
    del kv
    assert np.array_equal(go_on(engine, forks[1].copy()), expected)
    assert (forks[2].k, forks[2].ctx, forks[2].nbytes) == (name, 260, forks[0].nbytes)


@pytest.mark.parametrize("n", LENGTHS[:-1])
@pytest.mark.parametrize("k, v", [("f32", "f32"), ("f16", "f16"), ("f32", "f16")])
def test_truncation_is_as_if_nothing_else_had_been_fed(k, v, n, wide):
    """Without evictions and with a format that rounds no more than the window, down to the bytes of the state."""
    kv = filled(wide[1], k, v, n, ctx=1000, sinks=4, window=64)
    state, lone = kv.state(), kv.copy()
    wide[1].forward(np.arange(60, dtype=np.int32), kv)
    wide[1].forward(np.arange(400, dtype=np.int32) % 60, kv)
    kv.truncate(n)
    assert np.array_equal(kv.state(), state)
    assert np.array_equal(go_on(wide[1], kv), go_on(wide[1], lone))


@pytest.mark.parametrize("name", _core.KV_FORMATS)
def test_truncation_inside_a_packed_tile(name, wide):
    """What a rounding format holds after truncation is close to what it held before; and stays usable."""
    exact, kv = (filled(wide[1], f, f, 400, ctx=1000, sinks=4, window=64) for f in ("f32", name))
    for n in (300, 230, 131, 100, 70, 20):
        logits = []
        for cache in (exact, kv):
            cache.truncate(n)
            logits.append(wide[1].forward([3], cache.copy()))
        error = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
        assert error <= 8 / 2 ** min(_core.KV_FORMATS[name], 11), (n, error)


@pytest.mark.parametrize("name", _core.KV_FORMATS)
def test_packing_again_what_was_unpacked(name):
    """Truncation may unpack a tile into the window again and again: the errors do not add up."""
    rng = np.random.default_rng(0)
    origin = rng.standard_normal((64, TILE)).astype(np.float32), rng.standard_normal((TILE, 64)).astype(np.float32)
    parts, errors = origin, []
    for _ in range(8):
        parts = [part.astype(np.float16).astype(np.float32) for part in probe.Tile(name, *parts).unpack()]
        errors.append([np.sqrt(np.mean((part - true) ** 2)) for part, true in zip(parts, origin, strict=True)])
    assert np.allclose(errors, errors[0], rtol=0.01)


@pytest.mark.parametrize("k, v", [(name, name) for name in _core.KV_FORMATS] + [("f16", "q4"), ("q8", "f16")])
@pytest.mark.parametrize("ctx", [330, 2000])
def test_rewinding_is_exact_or_refused(k, v, ctx, wide, rng):
    """From any length to any other, with a snapshot or none: what is there then is what was there."""
    engine, options = wide[1], dict(ctx=ctx, sinks=4, window=64)
    tokens = rng.integers(0, 60, 700).astype(np.int32)
    kv, states, snapshots, froms = _core.KVCache(engine, k, v, **options), {}, {}, []
    for n in range(0, 700, 7):
        states[n], snapshots[n] = kv.state(), kv.snapshot()
        froms.append(kv.exact_from())
        assert kv.exact_from(7) >= froms[-1]
        engine.forward(tokens[n : n + 7], kv, "none", decoding=False)
    lossless = {k, v} <= {"f32", "f16"}
    assert froms == sorted(froms) and (froms[-1] == 0) == lossless
    last, done, refused = kv.n_tokens, 0, 0
    for n in sorted(states, reverse=True):
        for held in (None, snapshots[n], snapshots[min(693, n + 7)], snapshots[min(693, n + 70)]):
            cut = kv.copy()
            before = cut.state()
            if not cut.rewind(n, held):
                assert cut.n_tokens == last and np.array_equal(cut.state(), before)
                refused += 1
                continue
            done += 1
            assert cut.n_tokens == n and np.array_equal(cut.state(), states[n])
            again = engine.forward(tokens[n : n + 3], cut, "all", decoding=False)
            assert np.array_equal(
                again,
                engine.forward(tokens[n : n + 3], restored_at(engine, k, v, options, states, n), "all", decoding=False),
            )
        if kv.exact_from() <= n and not kv.outgrown:
            assert kv.copy().rewind(n)
    assert done > 20 and (refused > 0) == (not lossless or ctx == 330)
    assert kv.copy().rewind(0) == (ctx == 2000)


def restored_at(engine, k, v, options, states, n):
    fresh = _core.KVCache(engine, k, v, **options)
    packed = max(0, (n - 4 - 64) // 64)
    slots = -(-(options["ctx"] - 4 - 64) // 64)
    fresh.load_state(n, max(0, packed - slots), states[n])
    return fresh


def test_snapshots_that_do_not_fit(wide):
    engine = wide[1]
    kv, other = filled(engine, "q4", "q4", 400), filled(engine, "q8", "q8", 390, window=130)
    with pytest.raises(ValueError, match="a snapshot of 390 tokens in another cache"):
        kv.rewind(380, other.snapshot()) or kv.rewind(200, other.snapshot())
    for n in (-1, 401, 1 << 70):
        with pytest.raises(ValueError, match=f"cannot go back to {n} tokens: the cache has 400"):
            kv.rewind(n)
    assert kv.snapshot(kv.snapshot().nbytes).nbytes and kv.snapshot(kv.snapshot().nbytes - 1) is None


def test_a_state_has_nothing_of_what_was_cut_off(wide):
    """A saved session must not carry text that was removed from it."""
    engine = wide[1]
    states = []
    for token in (7, 8):
        kv = filled(engine, "f16", "f16", 30, ctx=260, sinks=4, window=64)
        engine.forward(np.full(33, token, np.int32), kv)
        kv.truncate(30)
        states.append(kv.state())
    assert np.array_equal(*states)
    kv.truncate(2)
    few = _core.KVCache(engine, "f16", "f16", ctx=260, sinks=4, window=64)
    few.load_state(2, 0, kv.state())
    assert np.array_equal(few.state(), kv.state())
    kv.reset()
    assert not kv.state().any()


def test_the_size_of_a_state(wide):
    """It grows with the text, tile by tile, and is never larger than the cache."""
    kv = _core.KVCache(wide[1], "f16", "f16", ctx=260, sinks=4, window=64)
    sizes = []
    for _ in range(20):
        wide[1].forward(np.arange(32, dtype=np.int32), kv, "none")
        sizes.append(len(kv.state()))
    assert sizes[0] < sizes[6] < sizes[9] and max(sizes) <= kv.nbytes


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [-1, 101, 1 << 70, -(1 << 70)])
def test_lengths_that_cannot_be(n, model):
    kv = filled(model[1], "f32", "f32", 100)
    with pytest.raises(ValueError, match=f"cannot keep {n} tokens: the cache has 100"):
        kv.truncate(n)
    assert kv.n_tokens == 100
    kv.truncate(100)
    kv.truncate(0)
    kv.truncate(0)
    assert kv.n_tokens == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_tokens=-1), "cannot have -1 tokens"),
        (dict(n_tokens=1 << 61), "cannot have"),
        (dict(n_tokens=1 << 80), "cannot have"),
        (dict(lost=-1), "cannot have lost -1"),
        (dict(lost=100), "cannot have lost 100"),
        (dict(lost=1 << 80), "cannot have lost"),
        (dict(n_tokens=4, lost=1), "cannot have lost 1"),
        (dict(n_tokens=0, lost=0), "the state has"),
        (dict(n_tokens=699 - 64), "the state has"),
        (dict(lost=8), "the state has"),
        (dict(cut=1), "the state has"),
        (dict(cut=-1), "the state has"),
        (dict(cut=10**9), "the state has 0 bytes"),
    ],
)
def test_states_that_cannot_be(change, message, wide):
    """One line, and the cache as it was."""
    options = dict(ctx=260, sinks=4, window=64)
    kv, other = filled(wide[1], "f16", "f16", 700, **options), filled(wide[1], "f16", "f16", 150, **options)
    state, before = kv.state(), other.state()
    cut = change.get("cut", 0)
    changed = state[: max(0, len(state) - cut)] if cut >= 0 else np.append(state, np.uint8(0))
    with pytest.raises(ValueError, match=message) as error:
        other.load_state(change.get("n_tokens", kv.n_tokens), change.get("lost", kv.lost), changed)
    assert "\n" not in str(error.value)
    assert other.n_tokens == 150 and np.array_equal(other.state(), before)


def test_a_fork_of_a_large_cache_takes_what_is_in_use(wide):
    """Pages that no token has reached stay untouched."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc here")
    kv = filled(wide[1], "f16", "f16", 300, ctx=400_000, sinks=4, window=64)
    assert kv.nbytes > 100_000_000
    before = int(statm.read_text().split()[1])
    forks = [kv.copy() for _ in range(4)]
    grown = (int(statm.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 40_000_000 and len(forks[0].state()) == len(kv.state()) < 10_000_000
