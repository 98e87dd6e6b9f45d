"""Launches of `matrix.cu`: one token's products with matrices.

A block of threads on each multiprocessor goes round the panels, all of a group's warps on the columns of one. Addresses
are numbers, structures abi's; a norm without a weight is none, a matrix without segments is not there.
"""

from __future__ import annotations

import numpy as np

from kvrun.cuda.abi import Launch, float32, int32, int64, pointer
from kvrun.cuda.matrix import ACTIVATIONS, NO_MATRIX
from kvrun.cuda.weights import TYPE_IDS

THREADS, WARPS, LANES, BLOCK = 512, 16, 32, 32
UNITS_AT_ONCE = 2  # of a thread, on their way from memory
AHEAD = 8 << 20  # bytes of the next matrix that are fetched into the L2 cache: what memory reads while a kernel begins
AHEAD_OF_ATTENTION = 16 << 20  # or while attention has little to read
_FLOAT_TYPES = tuple(TYPE_IDS[kind] for kind in ("f32", "f16", "bf16"))
_UNITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8, "q6_k": 8}  # of a panel, for each 32 columns; else:
_UNITS_OF_OTHERS = 4
_UNITS_OF_ID = {number: _UNITS.get(kind, _UNITS_OF_OTHERS) for kind, number in TYPE_IDS.items()}


def _types(*matrices: np.ndarray) -> set[int]:
    return {int(s["type"]) for m in matrices for s in m["segments"][0, : int(m["n_segments"][0])]}


def _blocks(m: np.ndarray) -> int:
    """Blocks of 32 of the input."""
    return -(-int(m["cols"][0]) // BLOCK)


def options(*matrices: np.ndarray) -> tuple[str, ...]:
    """Those that make the module one of these matrices' types alone."""
    return (f"-DKV_WEIGHT_TYPES={sum(1 << number for number in _types(*matrices))}",)


def split(n_multiprocessors: int, *matrices: np.ndarray) -> int:
    """Warps that share a panel: a power of two, so many that each thread has two units of it, or one where more panels
    at once would be more than a block has."""
    units = _blocks(matrices[-1]) * max(_UNITS_OF_ID[number] for number in _types(*matrices))
    panels = -(-int(matrices[-1]["panels"][0]) // n_multiprocessors)  # of a block
    most, warps = min(WARPS, -(-units // LANES)), 1
    while 2 * warps <= most and (units > warps * LANES * UNITS_AT_ONCE or panels < WARPS // warps):
        warps *= 2
    return warps


def shared_bytes(*matrices: np.ndarray) -> int:
    """Of the input as int8 with scales and sums, as floats, or as both."""
    types, blocks = _types(*matrices), _blocks(matrices[-1])
    codes = -(-72 * blocks // 16) * 16 if types.difference(_FLOAT_TYPES) else 0
    return codes + (128 * blocks if types.intersection(_FLOAT_TYPES) else 0)


def _launch(
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
    return Launch(kernel, (grid, 1, 1), (THREADS, 1, 1), shared_bytes(*matrices), args, options(*matrices))


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
    return _launch("matvec", (matrix,), args, n_multiprocessors, then, ahead)


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
    return _launch("matvec_gated", (gate, up), args, n_multiprocessors, then, ahead)
