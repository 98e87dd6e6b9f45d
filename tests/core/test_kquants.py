"""Weight types with super-blocks, q4_k and q6_k: what the gguf package reads, products, and quantisation."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrun import _core
from kvrun._core import probe
from support import cases

pytestmark = pytest.mark.crossed

LEVELS = _core.isa_available()
KINDS = {row.name: row.block_bytes for row in _core.WEIGHT_TYPES.values() if row.column_multiple > 1}


def close(actual, expected, tolerance):
    """Within a tolerance relative to the largest expected value."""
    expected = np.asarray(expected, np.float64)
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


def random_raw(kind, rows, cols, rng):
    """GGML super-blocks of random bytes with scales that are numbers: uint8 [rows, bytes]."""
    raw = rng.integers(0, 256, (rows * cols // 256, KINDS[kind])).astype(np.uint8)
    scales = rng.uniform(-1, 1, (len(raw), 2)).astype(np.float16).view(np.uint8)
    if kind == "q4_k":
        raw[:, :4] = scales
    else:
        raw[:, 208:] = scales[:, :2]
    return raw.reshape(rows, -1)


def dequantized(kind, raw, rows, cols):
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()]).reshape(rows, cols)


def as_quantized(x, planes, level):
    """The inputs that a product really takes, in float64."""
    rows = []
    for row in x:
        codes, scales, _ = probe.quantize(row, planes, level)
        rows.append((codes * np.repeat(scales.astype(np.float64), 32, axis=1)).sum(0))
    return np.array(rows)


@settings(max_examples=cases.examples(60), deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 19),
    st.integers(1, 2),
    st.sampled_from(LEVELS),
    st.integers(0, 2**32),
)
def test_products_and_values(kind, rows, supers, n, planes, level, seed):
    """Imported super-blocks have the gguf package's values to the bit, and products those in float64."""
    rng, cols = np.random.default_rng(seed), 256 * supers
    raw = random_raw(kind, rows, cols, rng)
    exact = dequantized(kind, raw, rows, cols)
    packed = _core.pack_raw(kind, raw, rows, cols)
    np.testing.assert_array_equal(_core.unpack(kind, packed, rows, cols), exact)
    x = (rng.standard_normal((n, cols)) * np.exp(rng.standard_normal((n, cols)))).astype(np.float32)
    expected = as_quantized(x, planes, level) @ exact.astype(np.float64).T
    close(probe.matmul(kind, packed, rows, x, planes=planes, level=level), expected, 1e-5)
    before = rng.standard_normal((n, rows)).astype(np.float32)
    close(probe.matmul(kind, packed, rows, x, before, planes, level=level), expected + before, 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x0F, 0x80, 0x7F])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_codes(kind, byte, planes, level):
    """All codes, scales and inputs at their ends: no intermediate sum may overflow or saturate."""
    raw = np.full((16, 2, KINDS[kind]), byte, np.uint8)
    one = np.array([0.5], np.float16).view(np.uint8)
    if kind == "q4_k":
        raw[..., :4] = np.tile(one, 2)
    else:
        raw[..., 208:] = one
    exact = dequantized(kind, raw.reshape(16, -1), 16, 512).astype(np.float64)
    packed = _core.pack_raw(kind, raw, 16, 512)
    for pattern in ([1.0], [-1.0], [1.0, -1.0], [1.0, 0.996]):
        x = np.resize(np.float32(pattern), (9, 512))
        expected = as_quantized(x, planes, level) @ exact.T
        got = probe.matmul(kind, packed, 16, x, planes=planes, level=level)
        size = np.abs(x).sum() * np.abs(exact).max()  # of the terms: those of both signs cancel
        assert np.abs(got - expected).max() <= 1e-7 * size


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_in_its_place(kind):
    """One row, one column at a time: the product with a unit vector is that value alone."""
    rng = np.random.default_rng(3)
    raw = random_raw(kind, 17, 512, rng)
    exact = dequantized(kind, raw, 17, 512)
    packed = _core.pack_raw(kind, raw, 17, 512)
    for level in LEVELS:
        got = probe.matmul(kind, packed, 17, np.eye(512, dtype=np.float32), planes=1, level=level).T
        np.testing.assert_allclose(got, exact, rtol=0, atol=3e-6 * np.abs(exact).max())


DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student": lambda rng, shape: rng.standard_t(3, size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "offset": lambda rng, shape: rng.standard_normal(shape) + 2,
}
# Root of the mean squared error relative to that of the values, by GGML's quantize_row_q4_K_ref and
# quantize_row_q6_K_ref on the same numbers.
GGML = {
    "q4_k": {"normal": 0.07210, "laplace": 0.08552, "student": 0.09654, "uniform": 0.05482, "offset": 0.03320},
    "q6_k": {"normal": 0.01762, "laplace": 0.02142, "student": 0.02576, "uniform": 0.01340, "offset": 0.01352},
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantising_is_no_worse_than_ggmls(kind, draw):
    x = np.float32(0.02) * DRAWS[draw](np.random.default_rng(7), (64, 1024)).astype(np.float32)
    got = _core.unpack(kind, _core.pack(kind, x), 64, 1024).astype(np.float64)
    assert np.sqrt(((got - x) ** 2).mean() / (x.astype(np.float64) ** 2).mean()) <= GGML[kind][draw]


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_have_the_type_come_back(kind):
    """Quantising what was quantised before: no error beyond the rounding of a scale to one of its own steps."""
    x = np.random.default_rng(1).standard_normal((16, 512)).astype(np.float32)
    once = _core.unpack(kind, _core.pack(kind, x), 16, 512)
    twice = _core.unpack(kind, _core.pack(kind, once), 16, 512)
    error = np.sqrt(((once - x) ** 2).mean())
    assert np.sqrt(((twice - once) ** 2).mean()) <= 0.35 * error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 6e4, -6e4, 1e-6, 1e-30, np.nan, np.inf, -np.inf])
def test_one_value(kind, value):
    """Constant rows, values that float16 scales cannot hold, and not a number: no crash, and close where it can be."""
    x = np.full((3, 512), value, np.float32)
    got = _core.unpack(kind, _core.pack(kind, x), 3, 512)
    if value == 0 or 1e-6 < abs(value) < 65504:
        np.testing.assert_allclose(got, x, rtol=2e-3)
    x[:, ::7] = 0
    _core.pack(kind, x)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_whole_super_blocks(kind):
    assert _core.column_multiple(kind) == 256 and _core.column_multiple("q4_1") == 1
    for call in (
        lambda: _core.packed_size(kind, 16, 320),
        lambda: _core.raw_size(kind, 16, 320),
        lambda: _core.pack(kind, np.zeros((16, 320), np.float32)),
        lambda: _core.pack_raw(kind, np.zeros(16 * KINDS[kind], np.uint8), 16, 320),
        lambda: _core.unpack(kind, np.zeros(16 * KINDS[kind], np.uint8), 16, 320),
    ):
        with pytest.raises(ValueError, match=f"{kind} takes a multiple of 256 columns, not 320"):
            call()
