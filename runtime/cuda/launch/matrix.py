"""Launches of `matrix.cu`: one token's products with matrices.

A block of threads on each multiprocessor goes round the panels, all of a group's warps on the columns of one.
"""

from __future__ import annotations

import numpy as np

from kvrun.cuda.abi import ACTIVATIONS, BLOCK, TYPE_IDS, WARP, Launch, constants, float32, int32, int64, pointer
from kvrun.cuda.launch.common import NO_MATRIX, whole

UNITS_AT_ONCE = 2  # of a thread, on their way from memory
AHEAD = 8 << 20  # bytes of the next matrix that are fetched into the L2 cache: what memory reads while a kernel begins
AHEAD_OF_ATTENTION = 16 << 20  # or while attention has little to read
_SIZES = constants("matrix.cu")
_THREADS, _WARPS = _SIZES["MATVEC_THREADS"], _SIZES["MATVEC_WARPS"]
_FLOAT_TYPES = {number for number in TYPE_IDS.values() if _SIZES["FLOAT_TYPES"] >> number & 1}
UNITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8, "q6_k": 8, "q5_0": 4, "q4_1": 4, "q4_0": 4, "q4_k": 4}
"""The types that products.cuh knows; units of a panel for each 32 columns, as its n_units counts them."""
_UNITS_OF_ID = {TYPE_IDS[kind]: units for kind, units in UNITS.items()}


def _types(*matrices: np.ndarray) -> set[int]:
    return {int(s["type"]) for m in matrices for s in m["segments"][0, : int(m["n_segments"][0])]}


def _n_blocks(m: np.ndarray) -> int:
    """Blocks of 32 of the input."""
    return whole(int(m["cols"][0]), BLOCK)


def options(*matrices: np.ndarray) -> tuple[str, ...]:
    """Those that make the module one of these matrices' types alone."""
    return (f"-DKV_WEIGHT_TYPES={sum(1 << number for number in _types(*matrices))}",)


def split(n_multiprocessors: int, *matrices: np.ndarray) -> int:
    """Warps that share a panel: a power of two, so many that each thread has two units of it, or one where more panels
    at once would be more than a block has."""
    units = _n_blocks(matrices[-1]) * max(_UNITS_OF_ID[number] for number in _types(*matrices))
    panels = whole(int(matrices[-1]["panels"][0]), n_multiprocessors)  # of a block
    most, warps = min(_WARPS, whole(units, WARP)), 1
    while 2 * warps <= most and (units > warps * WARP * UNITS_AT_ONCE or panels < _WARPS // warps):
        warps *= 2
    return warps


def shared_bytes(*matrices: np.ndarray) -> int:
    """Of the input as int8 with scales and sums, as floats, or as both."""
    types, blocks = _types(*matrices), _n_blocks(matrices[-1])
    codes = -(-72 * blocks // 16) * 16 if types.difference(_FLOAT_TYPES) else 0
    return codes + (128 * blocks if types.intersection(_FLOAT_TYPES) else 0)


def _product(
    kernel: str,
    matrices: tuple[np.ndarray, ...],
    args: tuple[np.ndarray, ...],
    n_multiprocessors: int,
    then: np.ndarray,
    ahead: int,
) -> Launch:
    warps, first = split(n_multiprocessors, *matrices), then["segments"][0, 0]
    grid = min(int(matrices[-1]["panels"][0]), n_multiprocessors)
    ahead = min(ahead, int(first["panels"]) * int(first["panel_bytes"]))
    args = (*args, int32(warps), pointer(int(first["data"])), int64(ahead))
    return Launch(kernel, (grid, 1, 1), (_THREADS, 1, 1), shared_bytes(*matrices), args, options(*matrices))


def matvec(
    matrix: np.ndarray,
    norm: np.ndarray,
    x: int,
    out: int,
    add: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    *,
    n_multiprocessors: int,
    then: np.ndarray = NO_MATRIX,
    ahead: int = AHEAD,
) -> Launch:
    """out [width] (+)= matrix times the norm of x, plus its biases, times scale, capped; of padded rows nothing is
    written. `then`: the matrix that is read next."""
    args = (matrix, norm, pointer(x), pointer(out), int32(add), float32(scale), float32(softcap))
    return _product("matvec", (matrix,), args, n_multiprocessors, then, ahead)


def matvec_gated(
    gate: np.ndarray,
    up: np.ndarray,
    norm: np.ndarray,
    x: int,
    activation: str,
    out: int,
    *,
    n_multiprocessors: int,
    then: np.ndarray = NO_MATRIX,
    ahead: int = AHEAD,
) -> Launch:
    """out [width of up] = activation(gate x) * (up x), or activation(up x) without a gate, of the norm of x."""
    args = (gate, up, norm, pointer(x), int32(ACTIVATIONS[activation]), pointer(out))
    return _product("matvec_gated", (gate, up), args, n_multiprocessors, then, ahead)
