"""The ring: what every token sees, past many turns, against a plain list model and float64 NumPy."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kvrun import _core
from kvrun.files.model_file import read_model_file
from support.cases import some
from support.numpy_llama import NumpyLlama, rotate
from support.ring import FORMAT_ERROR, OPTIONS, TILE, ListCache, every, ragged, rms, run

pytestmark = pytest.mark.crossed


class RingLlama(NumpyLlama):
    """Attention over what the list model shows, sinks moved up to the oldest token that is left."""

    def __init__(self, file, **options):
        super().__init__(file)
        self.options = options

    def attention(self, x, layer):
        d, n, cache = self.d, len(x), ListCache(**self.options)
        q, k, v = (self.linear(x, f"{layer}.attn.{part}").reshape(n, -1, d.head_dim) for part in "qkv")
        out = np.zeros((n, d.n_heads, d.head_dim))
        for t in range(n):
            cache.append()
            seen = np.array(cache.visible())
            positions = seen.copy()
            rest = seen[len(cache.sinks) :]
            if len(rest):
                positions[: len(cache.sinks)] = rest[0] - len(cache.sinks) + np.arange(len(cache.sinks))
            turned = rotate(k[seen], positions[:, None] * self.inv_freq)
            query = rotate(q[t : t + 1], np.array([[t]]) * self.inv_freq)[0]
            group = d.n_heads // d.n_kv_heads
            scores = np.einsum("hd,khd->hk", query, np.repeat(turned, group, 1)) * d.attention_scale
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[t] = np.einsum("hk,khd->hd", p / p.sum(-1, keepdims=True), np.repeat(v[seen], group, 1))
        return self.linear(out.reshape(n, -1), f"{layer}.attn.o")


@pytest.fixture(scope="module")
def model(converted):
    return build(converted, False)


@pytest.fixture(scope="module")
def precise(converted):
    return build(converted, True)


def build(converted, precise):
    file = read_model_file(converted("odd-sizes"))
    d = file.description
    return file, _core.Engine(d, file.weights, file.vectors, d.rope_tables, 2, precise)


@pytest.mark.parametrize("options", some(OPTIONS, OPTIONS[3:4]), ids=str)
def test_ten_turns_of_the_ring(options, model):
    """Logits equal the list model's: for every chunking, through evictions and moved sinks."""
    file, engine = model
    tokens = np.random.default_rng(5).integers(0, file.description.vocab_size, 10 * options["ctx"]).astype(np.int32)
    expected = RingLlama(file, **options).logits(tokens)
    for chunks in (every(512), every(1), ragged()):
        logits = run(engine, tokens, chunks, **options)
        error = np.abs(logits - expected).max(-1) / np.abs(expected).max()
        assert error.max() <= 1e-4, f"first at token {np.argmax(error > 1e-4)}"


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("k, v", FORMAT_ERROR, ids=str)
def test_quantised_rings(options, k, v, precise, model):
    """Every format goes round the ring with the errors of its format and no more, however the tokens are fed."""
    file, engine = precise
    tokens = np.random.default_rng(6).integers(0, file.description.vocab_size, 4 * options["ctx"]).astype(np.int32)
    expected = RingLlama(file, **options).logits(tokens)
    one_by_one = run(engine, tokens, every(1), k, v, **options)
    assert rms(one_by_one - expected) <= FORMAT_ERROR[k, v] * rms(expected)
    for chunks in (every(512), ragged()):
        # In contexts of one span of tiles nothing depends on the chunk, so not even a border between codes is crossed.
        np.testing.assert_array_equal(run(engine, tokens, chunks, k, v, **options), one_by_one)
    # Without `precise` many queries meet tiles that were unpacked once for all: not rounded, nor far off.
    fast = run(model[1], tokens, every(200), k, v, **options)
    assert rms(fast - expected) <= FORMAT_ERROR[k, v] * rms(expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_at_least_the_newest_are_visible(options):
    """The guarantee about the list model itself: all while they fit, then at least ctx - sinks, which whole tiles
    round up, and fewer than 64 more."""
    cache = ListCache(**options)
    least = options["ctx"] - options["sinks"]
    rounded = cache.n_slots * TILE + options["window"]
    assert least <= rounded < least + TILE
    for n in range(1, 5 * options["ctx"]):
        cache.append()
        seen = cache.visible()
        if n <= options["sinks"] + rounded:
            assert seen == list(range(n))
        else:
            newest = seen[len(cache.sinks) :]
            assert newest == list(range(n - len(newest), n))
            assert rounded <= len(newest) < rounded + TILE


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k, v", [("f16", "f16"), ("f32", "f16"), ("f32", "f32")])
def test_bytes_are_counted_exactly(options, k, v, model):
    """Sinks in f32, window tiles in f16 (f32 for an f32 cache), ring slots: 64-byte aligned, nothing more."""
    file, engine = model
    d, size = file.description, {"f16": 2, "f32": 4}
    pad = -(-d.head_dim // 16) * 16
    lanes = -(-options["sinks"] // 16) * 16
    sinks = 4 * (d.head_dim * lanes + pad * options["sinks"])
    tile = 64 * (d.head_dim * size[k] + pad * size[v])
    n_window, n_slots = -(-(options["window"] + 64) // 64), ListCache(**options).n_slots
    expected = d.n_layers * d.n_kv_heads * (sinks + (n_window + n_slots) * tile)
    assert _core.kv_bytes(d, k, v, **options) == expected
    assert _core.KVCache(engine, k, v, **options).nbytes == expected


def test_the_textbook_figure(model):
    """Llama-2-7B, 10,000 tokens, fp16: 2 (K, V) x 2 bytes x 32 layers x 32 heads x 128 x 10,000, and a tile more."""
    llama = replace(model[0].description, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_size=4096)
    textbook = 2 * 2 * 32 * 32 * 128 * 10_000
    assert 1 <= _core.kv_bytes(llama, "f16", "f16", ctx=10_000, sinks=0, window=0) / textbook < 1.02
    assert 1 <= _core.kv_bytes(llama, "f16", "f16", ctx=10_000, sinks=4, window=64) / textbook < 1.02
    for format, share in (("q8", 8.5 / 16), ("q4", 0.28125), ("q2", 0.15625)):
        one_window_tile = 2 * 2 * 32 * 32 * 128 * 64
        size = _core.kv_bytes(llama, format, format, ctx=10_000, sinks=0, window=0) - one_window_tile
        assert share <= size / textbook < 1.005 * share


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ctx=131), "a context of 131 is too small: sinks .4., window .64. and one tile .64. take 132"),
        (dict(ctx=100, sinks=200), "too small"),
        (dict(sinks=-1), "cannot be negative"),
        (dict(window=-1), "cannot be negative"),
        (dict(k="q3"), "KV format 'q3' is not one of f32, f16"),
        (dict(ctx=1 << 40), "out of range"),
    ],
)
def test_impossible_options(options, message, model):
    with pytest.raises(ValueError, match=message):
        _core.KVCache(model[1], **options)


@pytest.mark.parametrize("head_dim", [0, 1026, 1 << 20])
def test_head_dims_beyond_the_kernels(head_dim):
    with pytest.raises(ValueError, match="head_dim .* is not between 1 and 1024"):
        _core.kv_bytes(SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=head_dim), "q8", "q8")


def test_a_cache_beyond_any_memory(model):
    """More bytes than an address can count: refused as too large, like one that the machine has no room for."""
    huge = SimpleNamespace(
        description=replace(model[0].description, n_layers=4096, n_kv_heads=4096, n_heads=4096, head_dim=1024)
    )
    with pytest.raises(MemoryError):
        _core.KVCache(huge, "f32", "f32", ctx=(1 << 32) - 1)


def test_calls_that_make_no_sense(model):
    _file, engine = model
    cache = _core.KVCache(engine)
    for tokens, message in (
        ([], "1 to 512"),
        ([0] * 513, "1 to 512"),
        ([97], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.forward(np.array(tokens, np.int32), cache)
    with pytest.raises(ValueError, match="logits must be"):
        engine.forward([1], cache, "some")
    assert cache.n_tokens == 0
    engine.forward([1, 2, 3], cache)
    assert cache.n_tokens == 3
    cache.reset()
    assert cache.n_tokens == 0
