"""What the benchmark takes from the core: filled caches, attention on its own, bytes counted, memory read."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import bench
from kvrun.files.model_file import read_model_file
from support.numpy_llama import rotate

TILE, VARIANTS = 64, 4
OPTIONS = dict(ctx=300, sinks=4, window=64)
DEPTHS = [0, 1, 4, 5, 67, 68, 69, 131, 132, 133, 299, 300, 301, 1000]


@pytest.fixture(scope="module")
def engine(converted):
    file = read_model_file(converted("odd-sizes"))
    return _core.Engine(file.description, file.weights, file.vectors, file.description.rope_tables, 2)


def stand_in(n_layers=3, n_heads=6, n_kv_heads=2, head_dim=40, threads=2):
    description = SimpleNamespace(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        attention_scale=head_dim**-0.5,
    )
    return SimpleNamespace(description=description, threads=threads)


def filled(engine, n, k="f32", v=None, **options):
    kv = _core.KVCache(engine, k, v or k, **{**OPTIONS, **options})
    bench.fill(kv, n, seed=7)
    return kv


@pytest.mark.parametrize("format", _core.KV_FORMATS)
@pytest.mark.parametrize("n", DEPTHS)
def test_forward_goes_on_from_a_filled_cache(n, format, engine):
    kv = filled(engine, n, format)
    assert kv.n_tokens == n
    tokens = np.arange(130, dtype=np.int32) % engine.description.vocab_size
    for chunk in (tokens[:1], tokens[1:2], tokens[2:]):
        assert np.isfinite(engine.forward(chunk, kv, "all")).all()
    assert kv.n_tokens == n + 130


@pytest.mark.parametrize("n", [3, 132, 500])
def test_a_refilled_cache_is_the_same(n, engine):
    """Whatever was in it before; other seeds fill it differently."""
    token = np.array([1], np.int32)
    first = engine.forward(token, filled(engine, n))
    kv = filled(engine, 1000)
    for seed, same in ((7, True), (8, False)):
        bench.fill(kv, n, seed)
        assert np.array_equal(engine.forward(token, kv), first) == same


@pytest.mark.parametrize("k, v", [("f16", "f16"), ("f32", "f16"), ("f16", "f32"), ("f32", "f32")])
@pytest.mark.parametrize("n", DEPTHS)
def test_bytes_read(n, k, v, engine):
    """Counted token by token: tiles in the ring, window, sinks."""
    d, size = engine.description, {"f16": 2, "f32": 4}
    pad = -(-d.head_dim // 16) * 16
    token = d.head_dim * size[k] + pad * size[v]
    n_slots = -(-(OPTIONS["ctx"] - 4 - 64) // TILE)
    packed = max(0, (n - 4 - 64) // TILE)
    seen = max(0, n - 4) - TILE * max(0, packed - n_slots)
    expected = d.n_layers * d.n_kv_heads * (seen * token + 4 * min(n, 4) * (d.head_dim + pad))
    kv = filled(engine, n, k, v)
    assert bench.bytes_read(kv) == bench.bytes_read(_core.KVCache(engine, k, v, **OPTIONS), n) == expected <= kv.nbytes


@pytest.mark.parametrize("format", [f for f in _core.KV_FORMATS if f.startswith("q")])
def test_bytes_read_of_quantised_tiles(format):
    """A ring that is full, without sinks: its tiles at their bits, and the window in f16."""
    engine = stand_in(head_dim=64)
    kv = filled(engine, 64 * 11, format, ctx=704, sinks=0)
    tile = 2 * TILE * 64 * _core.KV_FORMATS[format] / 8
    assert bench.bytes_read(kv) == 3 * 2 * (10 * tile + 2 * TILE * 64 * 2)
    assert kv.nbytes == 3 * 2 * (10 * tile + 2 * 2 * TILE * 64 * 2)


def expected_attention(engine, n, first, seed, width=None):
    """Float64 attention of the newest token over what `fill` with seed 7 has put in, or the newest `width` of that; no
    sinks."""
    d = engine.description
    rng = np.random.default_rng(7)
    tiles = [
        [
            (
                rng.standard_normal((d.head_dim, TILE), np.float32).T,
                rng.standard_normal((TILE, d.head_dim), np.float32),
            )
            for _ in range(VARIANTS)
        ]
        for _ in ("ring", "window")
    ]
    rng = np.random.default_rng(seed)
    angles = (n - 1) * rng.uniform(0, 2 * np.pi, d.head_dim // 2)
    q = rotate(rng.standard_normal((1, d.n_heads, d.head_dim), np.float32).astype(np.float64), angles[None])[0]
    packed = max(0, (n - 64) // TILE)
    out, group = np.zeros((d.n_heads, d.head_dim)), d.n_heads // d.n_kv_heads
    for head in range(d.n_heads):
        chosen = [tiles[t >= packed][(t + head // group) % VARIANTS] for t in range(first, -(-n // TILE))]
        k, v = (np.concatenate(parts)[: n - first * TILE].astype(np.float64) for parts in zip(*chosen, strict=True))
        k, v = (part[-width:] if width else part for part in (k, v))
        scores = k @ q[head] * d.attention_scale
        p = np.exp(scores - scores.max())
        out[head] = p @ v / p.sum()
    return out


@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(n_heads=4, n_kv_heads=4, head_dim=64),
        dict(n_heads=8, n_kv_heads=1),
        dict(threads=1),
        dict(n_heads=32, n_kv_heads=8, head_dim=128),
    ],
    ids=str,
)
@pytest.mark.parametrize("n, evicted", [(1, 0), (64, 0), (127, 0), (128, 0), (129, 0), (300, 0), (2000, 0), (5000, 46)])
def test_attention_is_that_of_the_whole_cache(n, evicted, shape):
    engine = stand_in(**shape)
    kv = filled(engine, n, ctx=2048, sinks=0)
    seconds, out = bench.attention(engine, kv, repeat=2, seed=3)
    expected = expected_attention(engine, n, evicted, 3)
    assert seconds > 0 and np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("width", [1, 63, 64, 65, 100, 128, 1500])
@pytest.mark.parametrize("n", [1, 64, 127, 129, 300, 5000])
def test_attention_of_a_sliding_window(n, width):
    engine = stand_in()
    engine.description.sliding_windows = [None, 300, width]
    kv = filled(engine, n, ctx=2048, sinks=0)
    _, out = bench.attention(engine, kv, seed=3)
    first = max(0, max(0, (n - 64) // TILE) - max(0, -(-(width - 64) // TILE)))
    expected = expected_attention(engine, n, first, 3, width)
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("format", _core.KV_FORMATS)
def test_attention_leaves_the_cache_as_it_is(format, engine):
    token = np.array([1], np.int32)
    for n in (2, 200, 1000):
        used, unused = filled(engine, n, format), filled(engine, n, format)
        _, first = bench.attention(engine, used, repeat=3)
        _, second = bench.attention(engine, used)
        assert used.n_tokens == n and np.isfinite(first).all()
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(engine.forward(token, used), engine.forward(token, unused))


def test_attention_of_a_cache_that_cannot_be():
    engine = stand_in()
    with pytest.raises(ValueError, match="a token in the cache"):
        bench.attention(engine, filled(engine, 0))
    with pytest.raises(ValueError, match="a step to run"):
        bench.attention(engine, filled(engine, 1), repeat=0)
    with pytest.raises(ValueError, match="another model"):
        bench.attention(stand_in(n_layers=4), filled(engine, 1))


def test_fill_with_impossible_counts():
    kv = filled(stand_in(), 5)
    for n in (-1, 1 << 32):
        with pytest.raises(ValueError, match="n_tokens"):
            bench.fill(kv, n)
    assert kv.n_tokens == 5
    with pytest.raises(ValueError, match="n_tokens"):
        bench.bytes_read(kv, -1)


def test_read_bandwidth():
    for threads in (1, 2):
        buffer = bench.stream_buffer(threads, (5 << 20) + 3)
        assert len(buffer) == 5 << 20 and bench.read_bandwidth(threads, buffer, seconds=0) > 0
    for wrong in ((0,), (1, 1000)):
        with pytest.raises(ValueError, match="threads must be at least 1"):
            bench.stream_buffer(*wrong)
    for wrong in ((0, buffer), (1, buffer[:1000])):
        with pytest.raises(ValueError, match="threads must be at least 1"):
            bench.read_bandwidth(*wrong)


@pytest.mark.parametrize("n_bytes, copies", [(0, 1), (200_000, 17)])
def test_a_product_counts_what_it_reads(n_bytes, copies):
    seconds, read, macs = bench.matmul("q4_0", 30, 640, tokens=3, threads=2, n_bytes=n_bytes, seconds=0)
    assert seconds > 0 and read == copies * _core.packed_size("q4_0", 30, 640) and macs == copies * 32 * 640 * 3


@pytest.mark.parametrize("planes", [1, 2])
def test_a_product_in_either_number_of_planes(planes):
    seconds, read, macs = bench.matmul("q8_0", 16, 64, tokens=5, seconds=0, planes=planes)
    assert seconds > 0 and read == _core.packed_size("q8_0", 16, 64) and macs == 16 * 64 * 5


def test_products_that_are_none():
    with pytest.raises(ValueError, match="planes must be 1 or 2"):
        bench.matmul("q4_0", 16, 32, planes=3)
    for sizes in ((0, 32), (16, 0), (16, 32, 0), (16, 32, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            bench.matmul("q4_0", *sizes)
    with pytest.raises(ValueError, match="weight type"):
        bench.matmul("q3", 16, 32)
