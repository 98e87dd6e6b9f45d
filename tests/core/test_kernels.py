"""Every kernel at every level of this CPU against NumPy in float64, on fresh random data."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import probe
from support.numpy_llama import hadamard

pytestmark = pytest.mark.crossed

LEVELS = _core.isa_available()
SHAPES = [(16, 32, 1), (48, 96, 3), (40, 576, 1), (33, 100, 5), (16, 577, 9), (7, 31, 17), (1, 1, 1)]
ANY_SHAPE = [row.name for row in _core.WEIGHT_TYPES.values() if row.column_multiple == 1]  # test_kquants.py has others
BLOCK_TYPES = [type for type in ANY_SHAPE if _core.WEIGHT_TYPES[type].takes_int8]


def close(actual, expected, tolerance, *terms):
    """Within a tolerance relative to the largest expected value, or of the terms that it is a sum of."""
    expected = np.asarray(expected, np.float64)
    largest = max(np.abs(x).max() for x in (expected, *terms))
    assert np.abs(actual - expected).max() <= tolerance * max(largest, 1e-30)


def as_quantized(x, planes, level):
    """The inputs that a block product really takes, in float64."""
    rows = []
    for row in x:
        codes, scales, _ = probe.quantize(row, planes, level)
        rows.append((codes * np.repeat(scales.astype(np.float64), 32, axis=1)).sum(0)[: len(row)])
    return np.array(rows)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows, cols, n", SHAPES)
@pytest.mark.parametrize("type, planes", [(type, 1) for type in ANY_SHAPE] + [(type, 2) for type in BLOCK_TYPES])
def test_matmul(type, planes, rows, cols, n, level, rng):
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    packed = _core.pack(type, weights)
    x = rng.standard_normal((n, cols)).astype(np.float32)
    inputs = as_quantized(x, planes, level) if type in BLOCK_TYPES else x.astype(np.float64)
    expected = inputs @ _core.unpack(type, packed, rows, cols).astype(np.float64).T
    close(probe.matmul(type, packed, rows, x, planes=planes, level=level), expected, 1e-5)
    before = rng.standard_normal((n, rows)).astype(np.float32)
    close(probe.matmul(type, packed, rows, x, before, planes, level=level), expected + before, 1e-5, expected, before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_matmul_of_extreme_codes(type, level, rng):
    """All codes and inputs at their ends: no intermediate sum may overflow or saturate."""
    head = {"q4_1": 4}.get(type, 2)
    for byte in (0x80, 0x7F, 0x81, 0x00, 0xFF, 0x0F):
        raw = np.full((16, 3, _core.WEIGHT_TYPES[type].block_bytes), byte, np.uint8)
        raw[..., :head] = np.full(head // 2, 0.5, np.float16).view(np.uint8)
        packed = _core.pack_raw(type, raw, 16, 96)
        for sign in (1.0, -1.0):
            x = np.full((5, 96), sign, np.float32)
            expected = as_quantized(x, 1, level) @ _core.unpack(type, packed, 16, 96).astype(np.float64).T
            close(probe.matmul(type, packed, 16, x, level=level), expected, 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 576])
def test_quantize(n, level, rng):
    x = (rng.standard_normal(n) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    codes, scales, sums = probe.quantize(x, 2, level)
    padded = np.zeros(codes.shape[1], np.float32)
    padded[:n] = x
    blocks = padded.reshape(-1, 32).astype(np.float64)
    np.testing.assert_allclose(scales[0], np.abs(blocks).max(1) / 127, rtol=1e-6)
    np.testing.assert_allclose(scales[1], scales[0] / 256, rtol=1e-6)
    codes = codes.reshape(2, -1, 32)
    np.testing.assert_array_equal(sums, codes.sum(2, dtype=np.int32))
    steps = blocks / scales[0][:, None].astype(np.float64)
    assert np.abs(codes[0] - steps).max() <= 0.5 + 1e-4
    assert np.abs(codes[0] + codes[1] / 256 - steps).max() <= 1.01 / 256
    for one, two in zip(probe.quantize(x, 1, level), (codes[0].ravel(), scales[0], sums[0])):
        np.testing.assert_array_equal(one[0], two)


@pytest.mark.parametrize("level", LEVELS)
def test_quantize_of_zeros(level):
    codes, scales, sums = probe.quantize(np.zeros(64, np.float32), 2, level)
    assert not codes.any() and not scales.any() and not sums.any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 576])
def test_rms_norm(n, level, rng):
    x, weight = rng.standard_normal((2, n)).astype(np.float32) * 3
    exact = x.astype(np.float64)
    close(probe.rms_norm(x, weight, 1e-5, level), exact / np.sqrt((exact**2).mean() + 1e-5) * weight, 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 576])
@pytest.mark.parametrize("shift", [0, 300])
def test_layer_norm(shift, n, level, rng):
    """Also where the mean is far larger than what varies about it."""
    x, weight, bias = rng.standard_normal((3, n)).astype(np.float32) * 3
    x += np.float32(shift)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5) * weight + bias
    close(probe.layer_norm(x, weight, bias, 1e-5, level), expected, 1e-6 if not shift else 1e-4 if n > 1 else 2e-2)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(np.minimum(-x, 700))),
    "gelu": lambda x: 0.5 * x * np.vectorize(math.erfc)(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x / (1 + np.exp(np.minimum(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3), 700))),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, level, rng):
    """Close in relative terms wherever the result matters beside its neighbours, tails included."""
    x = np.concatenate([rng.uniform(-100, 100, 1000), rng.uniform(-6, 6, 2000), [0, -1e4, 1e4, -88, 88]])
    x, up = x.astype(np.float32), rng.standard_normal(len(x)).astype(np.float32)
    exact = ACTIVATIONS[name](x.astype(np.float64))
    rtol, atol = (2e-6, 1e-30) if name == "silu" else (4e-6, 1e-12)
    np.testing.assert_allclose(probe.activate(name, x, None, level), exact, rtol=rtol, atol=atol)
    np.testing.assert_allclose(probe.activate(name, x, up, level), exact * up, rtol=rtol, atol=atol)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cap", [0.5, 30, 50])
def test_soft_cap(cap, level, rng):
    x = np.concatenate([rng.uniform(-9, 9, 1001) * cap, rng.uniform(-1, 1, 1000), [0, -1e6, 1e6, 1e-20]])
    x = x.astype(np.float32)
    np.testing.assert_allclose(probe.soft_cap(x, cap, level), cap * np.tanh(x.astype(np.float64) / cap), rtol=4e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 128])
def test_rope(head_dim, level, rng):
    x = rng.standard_normal(head_dim).astype(np.float32)
    angles = rng.uniform(0, 7, head_dim // 2)
    turned = (x[: head_dim // 2] + 1j * x[head_dim // 2 :]) * np.exp(1j * angles) * 0.125
    got = probe.rope(x, np.cos(angles), np.sin(angles), 0.125, level)
    close(got, np.concatenate([turned.real, turned.imag]), 1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_softmax_over_many_tiles(level, rng):
    """Ten tiles one after the other give the softmax of all of them, whatever each row sees of each."""
    rows, tiles = 5, 10
    scores = (rng.standard_normal((tiles, rows, 64)) * 20).astype(np.float32)
    visible = rng.integers(-3, 65, (tiles, rows))
    visible[0, :4] = [64, 1, 0, 17]
    visible[1:, 4] = 0  # a row that sees one token of one tile
    visible[0, 4] = 1
    m, total, acc = np.full(rows, -np.inf), np.zeros(rows), np.zeros((rows, 16))
    values = rng.standard_normal((tiles, 64, 16))
    for tile in range(tiles):
        weights, m, total, acc = probe.softmax_step(scores[tile], visible[tile], m, total, acc, level)
        acc = acc + weights @ values[tile]
    seen = np.arange(64) < visible[:, :, None]  # [tiles, rows, 64]
    exact = np.where(seen, scores.astype(np.float64), -np.inf)
    p = np.exp2(exact - exact.max((0, 2), keepdims=True))
    expected = np.einsum("trk,tkc->rc", p, values) / p.sum((0, 2))[:, None]
    close(acc / total[:, None], expected, 1e-5)


# Queries and weights are rounded to 16 bits for q8, to 8 bits (in blocks of 32, scales folded in) for q4 and q2.
PRODUCT_TOLERANCE = {"f32": 1e-5, "f16": 1e-5, "q8": 3e-4, "q4": 0.05, "q2": 0.05}
HEAD_DIMS = [8, 20, 64, 80, 96, 128, 256, 1008, 1024]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 32])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format", _core.KV_FORMATS)
def test_tile(format, head_dim, rows, level, rng):
    """k_dot and v_accumulate against float64 over the unpacked tile."""
    tile = probe.Tile(format, rng.standard_normal((head_dim, 64)), rng.standard_normal((64, head_dim)), level)
    keys, values = (x.astype(np.float64) for x in tile.unpack())
    q = rng.standard_normal((rows, head_dim)).astype(np.float32)
    p = rng.uniform(0, 1, (rows, 64)).astype(np.float32)
    acc = rng.standard_normal((rows, head_dim)).astype(np.float32)
    close(tile.k_dot(q), q.astype(np.float64) @ keys, PRODUCT_TOLERANCE[format])
    close(tile.v_accumulate(p, acc), acc + p.astype(np.float64) @ values, PRODUCT_TOLERANCE[format])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("format", _core.KV_FORMATS)
def test_products_are_exact_for_inputs_that_need_no_rounding(format, level, rng):
    """Codes times small whole numbers: what is left is float32 rounding, so a wrong lane, block or field shows."""
    k, v = rng.integers(0, 4, (64, 64)).astype(np.float32), rng.integers(0, 4, (64, 64)).astype(np.float32)
    k[:, 0], k[:, 1], v[:, 0], v[:, 1] = 0, 3, 0, 3
    tile = probe.Tile(format, k * 85, v * 85, level)  # 85 = 255 / 3: every format has a scale that is a whole number
    keys, values = tile.unpack()
    np.testing.assert_array_equal(keys, k * 85)
    np.testing.assert_array_equal(values, v * 85)
    q = rng.integers(-127, 128, (5, 64)).astype(np.float32)
    q[:, ::32] = 127
    p = np.abs(q)
    close(tile.k_dot(q), q @ keys.astype(np.float64), 1e-6)
    close(tile.v_accumulate(p, np.zeros((5, 64))), p @ values.astype(np.float64), 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format, bits", [("q8", 8), ("q4", 4), ("q2", 2)])
def test_quantised_tile(format, bits, head_dim, level, rng):
    """K per channel over 64 tokens, V per token over groups of 64 channels: never worse than half a step between the
    extremes, and at 2 bits better than that in the mean square."""
    k, v = (
        rng.standard_normal((head_dim, 64)).astype(np.float32),
        rng.standard_normal((64, head_dim)).astype(np.float32),
    )
    tile = probe.Tile(format, k, v, level)
    groups = [(k, tile.unpack()[0])]
    groups += [(v[:, at : at + 64], tile.unpack()[1][:, at : at + 64]) for at in range(0, head_dim, 64)]
    for exact, got in groups:
        low, high = exact.min(1, keepdims=True), exact.max(1, keepdims=True)
        step = (high - low) / (2**bits - 1)
        plain = low + np.round((exact - low) / np.maximum(step, 1e-9)) * step
        if bits == 2:
            assert ((got - exact) ** 2).mean() <= 0.9 * ((plain - exact) ** 2).mean() or exact.shape[1] < 20
        else:
            assert (np.abs(got - exact) <= step / 2 + 2e-3 * np.abs(exact).max()).all()
        assert len(np.unique(got[0])) <= 2**bits


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("draw", ["standard_normal", "laplace", "uniform"])
@pytest.mark.parametrize("n", [64, 16])
def test_two_bits_find_nearly_the_best_range(n, draw, level, rng):
    """The squared error of q2 against that of the best of all ranges on a fine grid."""
    v = getattr(rng, draw)(size=(64, n)) + rng.uniform(-3, 3, (64, 1))
    low, high = v.min(1)[:, None, None], v.max(1)[:, None, None]
    first, last = (x.reshape(-1, 1) for x in np.meshgrid(np.linspace(0, 0.55, 50), np.linspace(0.45, 1, 50)))
    origin, step = low + first * (high - low), (last - first).clip(1e-9) / 3 * (high - low)  # [64, grid, 1]
    codes = ((v[:, None] - origin) / step).round().clip(0, 3)
    best = ((v[:, None] - origin - codes * step) ** 2).sum(2).min(1)
    got = probe.Tile("q2", np.zeros((n, 64)), v, level).unpack()[1]
    assert ((got - v) ** 2).sum() <= 1.03 * best.sum()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("format", ["q8", "q4", "q2"])
def test_tile_of_unpacked_numbers_is_the_same(format, level, rng):
    """Taking back tokens unpacks a tile into the float16 window; packing it again must not round anything anew."""
    tile = probe.Tile(format, rng.standard_normal((80, 64)), rng.laplace(size=(64, 80)), level)
    once = [x.astype(np.float16) for x in tile.unpack()]
    for got, expected in zip(probe.Tile(format, *once, level).unpack(), once):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["q8", "q4", "q2"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_levels_pack_the_same(head_dim, format, rng):
    k, v = rng.standard_normal((head_dim, 64)), rng.standard_normal((64, head_dim))
    expected = probe.Tile(format, k, v, "scalar").unpack()
    for level in LEVELS:
        for got, want, exact in zip(probe.Tile(format, k, v, level).unpack(), expected, (k, v)):
            if format == "q2":  # ranges may differ where two are as good
                assert abs(((got - exact) ** 2).sum() / ((want - exact) ** 2).sum() - 1) < 1e-3
            else:
                close(got, want, 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("format", ["q8", "q4", "q2"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e5, np.nan, np.inf])
def test_quantised_tile_of_one_value(format, value, level):
    """Constant lines, values beyond float16 and values that are none: no crash, and what can be exact is."""
    tile = probe.Tile(format, np.full((64, 64), value), np.full((64, 64), value), level)
    for got in tile.unpack():
        if abs(value) < 65504:
            np.testing.assert_allclose(got, value, rtol=1e-3)
    tile.k_dot(np.ones((3, 64), np.float32))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [2, 8, 20, 64, 80, 96, 128])
def test_hadamard(n, level, rng):
    """Orthonormal and its own inverse; the Sylvester matrix in blocks of the largest powers of two."""
    x = rng.standard_normal(n).astype(np.float32)
    close(probe.hadamard(x, level), hadamard(n) @ x, 1e-6)
    close(probe.hadamard(probe.hadamard(x, level), level), x, 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("format, dtype", [("f32", np.float32), ("f16", np.float16)])
@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_tile_token_by_token(head_dim, format, dtype, level, rng):
    """Tokens put in one by one lie where pack puts them, and nothing but rounding to the format happens."""
    k = rng.standard_normal((head_dim, 64)).astype(np.float32)
    v = rng.standard_normal((64, head_dim)).astype(np.float32)
    tile = probe.Tile(format, np.zeros_like(k), np.zeros_like(v), level)
    for lane in rng.permutation(64):
        tile.put(lane, k[:, lane], v[lane])
    for got, packed, exact in zip(tile.unpack(), probe.Tile(format, k, v, level).unpack(), (k, v)):
        np.testing.assert_array_equal(got, packed)
        np.testing.assert_array_equal(got, exact.astype(dtype).astype(np.float32))


def test_levels():
    assert LEVELS[-1] == "scalar" and _core.isa() in LEVELS
    with pytest.raises(ValueError, match="instruction set 'sse9' is not one of"):
        probe.quantize(np.zeros(32, np.float32), 1, "sse9")


def test_a_level_that_is_not_there():
    """Importing works, so that a command can say what is wrong."""
    code = "import kvrun._core as c\ntry: c.isa()\nexcept ValueError as e: print(e)"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"KVRUN_ISA": "sse9"}, text=True, capture_output=True
    )
    assert result.stdout.startswith("KVRUN_ISA=sse9: this CPU and build have ") and not result.stderr
