"""Kernels for chunks of tokens, on the host, against the core and NumPy."""

import numpy as np
import pytest

from kvrun._core import probe
from kvrun.cuda import abi
from kvrun.cuda import launch as launches
from kvrun.cuda.weights import slices
from support.cuda import launching
from support.cuda.launching import CASES, Matrices, array, at, close, empty, norm_of

pytestmark = pytest.mark.crossed

NONE = abi.struct(abi.MATRIX)


def run(launch):
    launching.run("chunk", launch)


def half_rows(n, cols):
    return empty(n, cols, dtype=np.float16), empty(n)


@pytest.mark.parametrize("kind, rows, cols", CASES)
def test_dequantize(kind, rows, cols, rng):
    m = Matrices([(kind, rng.standard_normal((rows, cols)).astype(np.float32))])
    out = empty(m.width, cols, dtype=np.float16)
    run(launches.chunk.dequantize(m.struct, at(out)))
    np.testing.assert_array_equal(out[:rows], m.values[0].astype(np.float16))
    assert not out[rows:].any()


def test_dequantize_parts(rng):
    """Parts of a matrix of three tensors, each in its place."""
    tensors = [
        (kind, rng.standard_normal((rows, 96)).astype(np.float32))
        for kind, rows in (("q4_0", 80), ("f16", 20), ("q8_0", 33))
    ]
    m = Matrices(tensors)
    out = empty(m.width, 96, dtype=np.float16)
    parts = slices(m.struct, 2 * 2 * 16 * 96)
    assert len(parts) == 3 + 1 + 2
    for part, first, outputs in parts:
        run(launches.chunk.dequantize(part, at(out[first:])))
        assert first + outputs <= m.width
    for i, values in enumerate(m.values):
        start = int(m.struct["segments"][0, i]["offset"])
        np.testing.assert_array_equal(out[start : start + len(values)], values.astype(np.float16))


@pytest.mark.parametrize("kind, rows, cols", CASES)
def test_embed(kind, rows, cols, rng):
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    embed, positions = Matrices([(kind, weights)]), Matrices([(kind, weights[::-1] * 3)])
    step = array(np.zeros(1, abi.STEP).view(np.uint8), np.uint8)
    step.view(abi.STEP)["first"] = first = rows // 2
    n, ld = max(1, rows - first), cols + 5
    ids = array(rng.integers(0, rows, n), np.int32)
    for learned in (None, positions):
        x = empty(n, ld)
        struct = NONE if learned is None else learned.struct
        run(launches.chunk.embed_chunk(at(step), at(ids), embed.struct, struct, 1.5, cols, at(x), ld, n))
        expected = embed.values[0][ids] * np.float32(1.5)
        if learned is not None:
            expected = expected + learned.values[0][first : first + n]
        np.testing.assert_array_equal(x[:, :cols], expected)
        assert np.isnan(x[:, cols:]).all()


@pytest.mark.parametrize("kind", ["rms", "layer", None])
@pytest.mark.parametrize("cols", [1, 100, 576])
def test_norm_to_half(kind, cols, rng):
    norm, reference, _kept = norm_of(kind, cols, rng)
    n, ld = 6, cols + 3
    x = array(rng.normal(0.1, 1, (n, ld)) * np.array([1, 1e-3, 1e10, 1e-10, 1e15, 0])[:, None])
    half, scale = half_rows(n, cols)
    run(launches.chunk.norm_to_half(norm, at(x), ld, cols, at(half), at(scale), n))
    assert (np.frexp(scale)[0] == 0.5).all()
    expected = reference(x[:, :cols])
    tops = np.maximum(np.abs(expected).max(1, keepdims=True), 1e-30)
    error = np.abs(half.astype(np.float64) * scale[:, None] - expected)
    assert (error <= 2.0**-11 * np.abs(expected) + 2e-6 * tops).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_with_what_is_not_a_number_stay_so(value):
    x = np.ones((2, 40), np.float32)
    x[1, 17] = value
    x, (half, scale) = array(x), half_rows(2, 40)
    run(launches.chunk.norm_to_half(abi.struct(abi.NORM), at(x), 40, 40, at(half), at(scale), 2))
    np.testing.assert_array_equal(half.astype(np.float32) * scale[:, None], x)


def test_scale_bias(rng):
    sizes = (1000, 33, 20)
    biases = [rng.standard_normal(rows).astype(np.float32) for rows in sizes]
    m = Matrices([("f16", np.zeros((rows, 4), np.float32)) for rows in sizes], biases)
    n, ld = 3, m.width + 2
    products, scale = rng.standard_normal((n, ld)).astype(np.float32), array([0.5, 1, 4])
    out = array(products)
    run(launches.chunk.scale_bias(m.struct, at(scale), at(out), ld, n))
    expected = products[:, : m.width] * scale[:, None]
    for i, bias in enumerate(biases):
        start = int(m.struct["segments"][0, i]["offset"])
        expected[:, start : start + len(bias)] += bias
    np.testing.assert_array_equal(out[:, : m.width], expected)
    np.testing.assert_array_equal(out[:, m.width :], products[:, m.width :])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activate_to_half(name, gated, scaled, rng):
    rows, n = 300, 4
    empty_weights = np.zeros((rows, 4), np.float32)
    biases = [rng.standard_normal(rows).astype(np.float32) for _ in range(2)]
    gate, up = (Matrices([("f16", empty_weights)], [b]) for b in biases)
    products = [array(rng.standard_normal((n, up.width)) * 4) for _ in range(2)]
    scale = array([0.25, 1, 2, 8])
    half, out_scale = half_rows(n, rows)
    if scaled:
        out_scale[:] = scale  # may be the same
    run(
        launches.chunk.activate_to_half(
            gate.struct if gated else NONE,
            up.struct,
            name,
            at(products[0]),
            at(products[1]),
            up.width,
            at(out_scale) if scaled else 0,
            at(half),
            at(out_scale),
            n,
        )
    )
    g, u = (p[:, :rows] * (scale[:, None] if scaled else 1) + b for p, b in zip(products, biases, strict=True))
    expected = np.array([probe.activate(name, g[t], u[t]) if gated else probe.activate(name, u[t]) for t in range(n)])
    for t in range(n):
        close(half[t].astype(np.float32) * out_scale[t], expected[t], 6e-4)


def test_activations_of_extremes():
    x = array([[-1e30, -100, -10, -5, 0, 5, 10, 100, 1e4]])
    up = Matrices([("f32", np.zeros((9, 4), np.float32))])
    for name in abi.ACTIVATIONS:
        half, scale = half_rows(1, 9)
        run(launches.chunk.activate_to_half(NONE, up.struct, name, 0, at(x), 16, 0, at(half), at(scale), 1))
        close(half[0].astype(np.float32) * scale, probe.activate(name, x[0]), 1e-3)
        assert half[0, 4] == 0


@pytest.mark.parametrize("kind", ["rms", "layer", None])
def test_add(kind, rng):
    hidden, n = 100, 3
    norm, reference, _kept = norm_of(kind, hidden, rng)
    bias = rng.standard_normal(hidden).astype(np.float32)
    m = Matrices([("f16", np.zeros((hidden, 4), np.float32))], [bias])
    branch, scale = array(rng.standard_normal((n, m.width))), array([0.5, 1, 16])
    before = rng.standard_normal((n, hidden + 4)).astype(np.float32)
    for products in (True, False):
        x, struct = array(before), m.struct if products else NONE
        run(
            launches.chunk.add_chunk(
                struct, norm, at(scale) if products else 0, at(branch), m.width, hidden, 0.3, at(x), hidden + 4, n
            )
        )
        value = branch[:, :hidden] * scale[:, None] + bias if products else branch[:, :hidden]
        close(x[:, :hidden], before[:, :hidden] + 0.3 * reference(value), 1e-6)
        np.testing.assert_array_equal(x[:, hidden:], before[:, hidden:])


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_logits(cap, rng):
    n, ld = 2, 1040
    products, scale = rng.standard_normal((n, ld)).astype(np.float32) * 50, array([0.5, 2])
    logits = array(products)
    run(launches.chunk.logits_chunk(at(scale), 0.7, cap, at(logits), ld, n))
    expected = np.float32(0.7) * products * scale[:, None]
    for t in range(n):
        close(logits[t], probe.soft_cap(expected[t], cap) if cap else expected[t], 1e-6)
