"""The kernels around a token's products, on the host: its embedding and angles, norms of heads."""

import numpy as np
import pytest

from kvrun.cuda import abi
from kvrun.cuda import launch as launches
from support.cuda import launching
from support.cuda.launching import CASES, Matrices, array, at, close, empty

DIM, ROPES, SINKS, SLOTS, WINDOW = 16, 2, 4, 3, 128


def run(launch):
    launching.run("step", launch)


def begin(embed, token, x, scale=1.0, positions=None, first=0, packed_ever=0):
    """The tables that begin_step writes, and the frequencies and amplitudes that they are of."""
    half = DIM // 2
    step = array(np.zeros(1), abi.STEP)
    step["first"], step["packed_ever"], step["n"] = first, packed_ever, 1
    inv_freq = array(10.0 ** -np.linspace(0, 4, ROPES * half).reshape(ROPES, half), np.float64)
    amplitude = array(1 + np.arange(ROPES * half).reshape(ROPES, half) / 10, np.float64)
    ropes = abi.struct(abi.ROPES, n=ROPES, inv_freq=at(inv_freq), amplitude=at(amplitude))
    layout = abi.struct(abi.LAYOUT, head_dim=DIM, n_sinks=SINKS, window=WINDOW, n_slots=SLOTS)
    tables = [empty(*shape) for shape in [(ROPES, half)] * 2 + [(ROPES, 2, SINKS, half)] * 2]
    angles = (ropes, layout, abi.int64(SLOTS), abi.int32(2), *(abi.pointer(at(table)) for table in tables))
    none = abi.struct(abi.MATRIX)
    ids = array([token], np.int32)
    run(
        launches.step.begin_step(
            at(step),
            at(ids),
            embed.struct,
            none if positions is None else positions.struct,
            scale,
            embed.cols,
            at(x),
            *angles,
        )
    )
    return tables, inv_freq, amplitude


@pytest.mark.parametrize("kind, rows, cols", CASES)
def test_embedding(kind, rows, cols, rng):
    embed = Matrices([(kind, rng.standard_normal((rows, cols)).astype(np.float32))])
    x = empty(cols + 1)
    for token in {0, rows // 2, rows - 1}:
        begin(embed, token, x, scale=1.5)
        np.testing.assert_allclose(x[:cols], embed.values[0][token] * np.float32(1.5), rtol=1e-6)
        assert np.isnan(x[cols])


def test_learned_positions(rng):
    embed = Matrices([("q8_0", rng.standard_normal((20, 96)).astype(np.float32))])
    positions = Matrices([("f16", rng.standard_normal((50, 96)).astype(np.float32))])
    x = empty(96)
    begin(embed, 7, x, scale=2.0, positions=positions, first=33)
    np.testing.assert_allclose(x, 2 * embed.values[0][7] + positions.values[0][33], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first, evicted", [(0, 0), (5, 0), (SINKS + WINDOW + 64 * (SLOTS + 2), 2), (100_000, 1557)])
def test_angles(first, evicted, rng):
    """Of the token, of sinks where they were, and of sinks moved up by the tiles that the ring has lost."""
    embed, x = Matrices([("f32", rng.standard_normal((3, 32)).astype(np.float32))]), empty(32)
    (cos, sin, sink_cos, sink_sin), inv_freq, amplitude = begin(embed, 1, x, first=first)
    np.testing.assert_allclose(cos, amplitude * np.cos(first * inv_freq), atol=3e-7)
    np.testing.assert_allclose(sin, amplitude * np.sin(first * inv_freq), atol=3e-7)
    for row, shift in enumerate((0, 64 * evicted)):
        turn = (np.arange(SINKS) + shift)[None, :, None] * inv_freq[:, None]
        np.testing.assert_allclose(sink_cos[:, row], amplitude[:, None] * np.cos(turn), atol=3e-7)
        np.testing.assert_allclose(sink_sin[:, row], amplitude[:, None] * np.sin(turn), atol=3e-7)


@pytest.mark.parametrize("all_heads", [False, True])
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim, n", [(4, 2, 64, 1), (3, 3, 80, 2), (1, 1, 2, 3), (8, 1, 256, 1)]
)
def test_norms_of_heads(all_heads, n_heads, n_kv_heads, head_dim, n, rng):
    q, k = n_heads * head_dim, n_kv_heads * head_dim
    k_offset = -(-q // 16) * 16
    ld = k_offset + 2 * k + 3
    before = rng.standard_normal((n, ld)).astype(np.float32)
    qkv = array(before)
    weights = [array(1 + rng.normal(0, 0.3, size if all_heads else head_dim)) for size in (q, k)]
    run(
        launches.step.norm_heads(
            at(qkv), ld, k_offset, at(weights[0]), at(weights[1]), n_heads, n_kv_heads, head_dim, 1e-5, all_heads, n
        )
    )
    after = before.copy()
    for weight, start, size in zip(weights, (0, k_offset), (q, k), strict=True):
        part = before[:, start : start + size].astype(np.float64).reshape(n, -1, weight.size)
        part = part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-5) * weight
        after[:, start : start + size] = part.reshape(n, size)
    close(qkv, after, 1e-6)
