"""Kernels of one token's products, on the host, against the core's scalar level."""

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import probe
from kvrun.cuda import abi
from kvrun.cuda import launch as launches
from support.cuda import launching
from support.cuda.host_device import compiled, view
from support.cuda.launching import SUPER_TYPES, Matrices, aligned, array, at, close, empty, norm_of

pytestmark = pytest.mark.crossed

NONE, NO_NORM = launches.NO_MATRIX, launches.NO_NORM
SHAPES = [(40, 576), (33, 100), (1, 1), (20, 1100), (7, 31), (70, 65)]
SUPER_SHAPES = [(40, 256), (17, 1280)]
KINDS = list(_core.WEIGHT_TYPES)
CASES = [(kind, *shape) for kind in _core.WEIGHT_TYPES for shape in (SUPER_SHAPES if kind in SUPER_TYPES else SHAPES)]
EXACT = 1e-5  # sums in another order
NORMED = 1e-4  # a norm in another order may round to another code


def run(launch):
    launching.run("matrix", launch)


def weights(rng, rows, cols):
    return rng.normal(0, cols**-0.5, (rows, cols)).astype(np.float32)


def expected(m, x, biases=None):
    """float32 [width], NaN where there are no rows: as the core multiplies one token, in two planes of int8."""
    out = np.full(m.width, np.nan, np.float32)
    for i, values in enumerate(m.values):
        segment = m.struct["segments"][0, i]
        kind, rows, start = KINDS[segment["type"]], len(values), int(segment["offset"])
        packed = view(int(segment["data"]), int(segment["panels"]) * int(segment["panel_bytes"]))
        product = probe.matmul(kind, packed, rows, x[None], planes=2, level="scalar")[0]
        out[start : start + rows] = product if biases is None else product + biases[i]
    return out


def check(out, values, tolerance):
    """NaN, which nobody has written, in the same places."""
    there = np.isfinite(values)
    close(out[there], values[there], tolerance)
    assert np.isnan(out[~there]).all()


@pytest.mark.parametrize("kind, rows, cols", CASES)
def test_matvec(kind, rows, cols, rng):
    """Every type with padded rows and columns, by one block of threads and by several."""
    m, x = Matrices([(kind, weights(rng, rows, cols))]), array(rng.normal(0, 1, cols))
    values = expected(m, x)
    for multiprocessors in (1, 3):
        out = empty(m.width)
        run(launches.matrix.matvec(m.struct, NO_NORM, at(x), at(out), n_multiprocessors=multiprocessors))
        check(out, values, EXACT)


@pytest.mark.parametrize("split", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", _core.WEIGHT_TYPES)
def test_warps_may_share_a_panel_in_any_number(kind, split, rng, monkeypatch):
    m, x, out = Matrices([(kind, weights(rng, 100, 768))]), array(rng.normal(0, 1, 768)), empty(112)
    monkeypatch.setattr(launches.matrix, "split", lambda *_: split)
    run(launches.matrix.matvec(m.struct, NO_NORM, at(x), at(out), n_multiprocessors=1))
    check(out, expected(m, x), EXACT)


@pytest.mark.parametrize("kinds", [("f16",), ("q6_k",), ("q4_0", "f32")])
def test_compiled_for_its_types(kinds, rng, monkeypatch):
    """As a GPU's kernels are: a launch's options leave the other types out."""
    m = Matrices([(kind, weights(rng, 40, 512)) for kind in kinds])
    x, out = array(rng.normal(0, 1, 512)), empty(m.width)
    launch = launches.matrix.matvec(m.struct, NO_NORM, at(x), at(out), n_multiprocessors=2)
    name, types = launch.options[0].removeprefix("-D").split("=")
    text = f"#define {name} {types}\n{abi.source('matrix')}"
    library = compiled("matrix", text)
    monkeypatch.setattr(launching, "kernels", lambda module: {"matvec": library.launch_matvec})
    run(launch)
    check(out, expected(m, x), EXACT)


@pytest.mark.parametrize(
    "kinds", [("q4_0", "q8_0", "f16"), ("q4_k", "q4_k", "q6_k"), ("f32", "bf16", "q4_1"), ("f16", "f16", "f32")]
)
@pytest.mark.parametrize("kind_of_norm", ["rms", "layer", None])
def test_segments_of_several_types(kinds, kind_of_norm, rng):
    rows = (70, 20, 33)
    biases = [rng.standard_normal(n).astype(np.float32) for n in rows]
    m = Matrices([(kind, weights(rng, n, 512)) for kind, n in zip(kinds, rows, strict=True)], biases)
    norm, reference, _kept = norm_of(kind_of_norm, 512, rng)
    x, out = array(rng.normal(0.5, 3, 512)), empty(m.width)
    run(launches.matrix.matvec(m.struct, norm, at(x), at(out), n_multiprocessors=2))
    check(out, expected(m, reference(x).astype(np.float32), biases), NORMED if kind_of_norm else EXACT)


def test_adding_scale_and_cap(rng):
    biases = [rng.standard_normal(40).astype(np.float32)]
    m, x = Matrices([("q4_0", weights(rng, 40, 320) * 30)], biases), array(rng.normal(0, 1, 320))
    values, before = expected(m, x, biases), rng.standard_normal(m.width).astype(np.float32)
    out = array(before)
    run(launches.matrix.matvec(m.struct, NO_NORM, at(x), at(out), add=True, n_multiprocessors=1))
    close(out[:40], before[:40] + values[:40], EXACT)
    np.testing.assert_array_equal(out[40:], before[40:])
    out = empty(m.width)
    run(launches.matrix.matvec(m.struct, NO_NORM, at(x), at(out), scale=0.25, softcap=5.0, n_multiprocessors=1))
    capped = probe.soft_cap(values[:40] * np.float32(0.25), 5.0, level="scalar")
    close(out[:40], capped, 1e-5)
    assert np.abs(values[:40]).max() > 25  # the cap has something to do


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, np.nan])
def test_inputs_of_any_size(value, rng):
    """Blocks of zeros, of the smallest and largest numbers; what is not a number stays so."""
    w = weights(rng, 16, 96)
    x = array(rng.normal(0, 1, 96))
    x[32:64] *= value
    for kind in ("q8_0", "q4_1", "f16"):
        m, out = Matrices([(kind, w)]), empty(16)
        run(launches.matrix.matvec(m.struct, NO_NORM, at(x), at(out), n_multiprocessors=1))
        if np.isnan(value):
            assert not np.isfinite(out).any()
        else:
            close(out, expected(m, x), EXACT)


@pytest.mark.parametrize("kinds", [("q4_0", "q4_0"), (None, "q4_k"), ("q6_k", "f16"), ("f32", "f32"), ("bf16", "q8_0")])
@pytest.mark.parametrize("activation", abi.ACTIVATIONS)
def test_gated(kinds, activation, rng):
    rows, cols = 90, 256
    biases = [[rng.standard_normal(rows).astype(np.float32)] for _ in kinds]
    gate, up = (
        kind and Matrices([(kind, weights(rng, rows, cols))], bias) for kind, bias in zip(kinds, biases, strict=True)
    )
    norm, reference, _kept = norm_of("rms", cols, rng)
    x, out = array(rng.normal(0, 1, cols)), empty(up.width)
    normed = reference(x).astype(np.float32)
    u = expected(up, normed, biases[1])[:rows]
    if gate:
        values = probe.activate(activation, expected(gate, normed, biases[0])[:rows], u, level="scalar")
    else:
        values = probe.activate(activation, u, level="scalar")
    run(
        launches.matrix.matvec_gated(
            gate.struct if gate else NONE, up.struct, norm, at(x), activation, at(out), n_multiprocessors=2
        )
    )
    close(out[:rows], values, NORMED)
    assert np.isnan(out[rows:]).all()


def test_weights_are_read_within_their_memory(rng):
    """At the end of an allocation, with NaN all around: no output is touched by it."""
    for kind, rows, cols in CASES:
        packed = np.frombuffer(_core.pack(kind, weights(rng, rows, cols)), np.uint8)
        room = aligned(packed.nbytes + 512)
        m = Matrices([(kind, weights(rng, rows, cols))])
        room[256 : 256 + packed.nbytes] = packed
        m.struct["segments"]["data"][0, 0] = at(room) + 256
        x, out = array(rng.normal(0, 1, cols)), empty(m.width)
        run(launches.matrix.matvec(m.struct, NO_NORM, at(x), at(out), n_multiprocessors=1))
        assert np.isfinite(out[:rows]).all()


def test_what_a_launch_is():
    """As many blocks as run at once, warps as columns, and only the types that a matrix has."""
    m = Matrices([("q4_0", np.zeros((1000, 512), np.float32)), ("f16", np.zeros((20, 512), np.float32))]).struct
    down = Matrices([("q6_k", np.zeros((16, 1024), np.float32))]).struct
    launch = launches.matrix.matvec(m, NO_NORM, 0, 0, n_multiprocessors=10, then=down)
    assert (launch.grid, launch.block) == ((10, 1, 1), (512, 1, 1))
    assert launch.options == (f"-DKV_WEIGHT_TYPES={1 << 5 | 1 << 1}",)
    assert launch.shared == 72 * 16 + 4 * 512
    warps, address, n_bytes = (int(a[0]) for a in launch.args[-3:])
    assert (warps, address, n_bytes) == (4, int(down["segments"][0, 0]["data"]), 2 * (64 + 2 * 3328))
    launch = launches.matrix.matvec(down, NO_NORM, 0, 0, n_multiprocessors=10)
    assert launch.grid == (1, 1, 1) and launch.options == (f"-DKV_WEIGHT_TYPES={1 << 7}",)
    assert [int(a[0]) for a in launch.args[-3:]] == [8, 0, 0]


@pytest.mark.parametrize(
    "kind, rows, cols, blocks, warps",
    [
        ("q4_0", 12288, 4096, 132, 8),
        ("q4_0", 4096, 4096, 132, 8),
        ("q4_0", 4096, 11008, 132, 16),
        ("q4_0", 2048, 2048, 128, 8),  # few panels: all warps that have something to do
        ("q8_0", 2048, 8192, 128, 16),
        ("f16", 100, 33, 7, 1),
        ("f32", 100, 64, 7, 2),
    ],
)
def test_blocks_and_warps(kind, rows, cols, blocks, warps):
    m = abi.struct(abi.MATRIX, n_segments=1, cols=cols, panels=-(-rows // 16))
    m["segments"]["type"][0, 0] = KINDS.index(kind)
    launch = launches.matrix.matvec(m, NO_NORM, 0, 0, n_multiprocessors=132)
    assert (launch.grid, int(launch.args[-3][0])) == ((blocks, 1, 1), warps)
