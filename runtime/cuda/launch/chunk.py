"""Launches of `chunk.cu`: what a chunk needs around its matrix products. n: tokens, or rows."""

from __future__ import annotations

import numpy as np

from kvrun.cuda.abi import ACTIVATIONS, Launch, constants, float32, int32, int64, pointer
from kvrun.cuda.launch.common import launch, whole

_SIZES = constants("chunk.cu")
_THREADS, _ROW_THREADS = _SIZES["CHUNK_THREADS"], _SIZES["ROW_THREADS"]
_COLUMNS, _OUTPUTS = _SIZES["DEQUANTIZE_COLUMNS"], _SIZES["OUTPUTS_OF_BLOCK"]


def embed_chunk(
    step: int,
    ids: int,
    embed: np.ndarray,
    positions: np.ndarray,
    scale: float,
    hidden: int,
    x: int,
    ld: int,
    n: int,
) -> Launch:
    """x [n][ld]: the tokens' rows of `embed` times scale, plus those of `positions`."""
    args = (pointer(step), pointer(ids), embed, positions, float32(scale), int32(hidden), pointer(x), int64(ld))
    return launch("embed_chunk", (n,), _THREADS, 0, *args)


def norm_to_half(norm: np.ndarray, x: int, ld: int, cols: int, out: int, row_scale: int, n: int) -> Launch:
    """out float16 [n][cols] times row_scale [n] is the norm of x [n][ld]."""
    args = (norm, pointer(x), int64(ld), int32(cols), pointer(out), pointer(row_scale))
    return launch("norm_to_half", (n,), _ROW_THREADS, 0, *args)


def dequantize(part: np.ndarray, out: int) -> Launch:
    """out float16 [16 panels][cols]: a matrix of one segment."""
    grid = whole(int(part["cols"][0]), _COLUMNS), int(part["panels"][0])
    return launch("dequantize", grid, _THREADS, 0, part, pointer(out))


def scale_bias(matrix: np.ndarray, row_scale: int, out: int, ld: int, n: int) -> Launch:
    """out [n][ld] = out times row_scale, plus the matrix's biases."""
    grid = whole(int(matrix["width"][0]), _OUTPUTS), n
    return launch("scale_bias", grid, _THREADS, 0, matrix, pointer(row_scale), pointer(out), int64(ld))


def activate_to_half(
    gate: np.ndarray,
    up: np.ndarray,
    activation: str,
    gate_out: int,
    up_out: int,
    ld: int,
    row_scale: int,
    out: int,
    out_scale: int,
    n: int,
) -> Launch:
    """out float16 [n][rows of up] times out_scale [n]: activation(gate) * up, or activation(up), of products without
    their scales and biases; row_scale 0: with them."""
    args = (
        gate,
        up,
        int32(ACTIVATIONS[activation]),
        pointer(gate_out),
        pointer(up_out),
        int64(ld),
        pointer(row_scale),
        pointer(out),
        pointer(out_scale),
    )
    return launch("activate_to_half", (n,), _ROW_THREADS, 0, *args)


def add_chunk(
    matrix: np.ndarray,
    norm: np.ndarray,
    row_scale: int,
    branch: int,
    ld_branch: int,
    hidden: int,
    scale: float,
    x: int,
    ld: int,
    n: int,
) -> Launch:
    """x [n][ld] += scale times the norm of branch: a product of `matrix` without its scales and biases, or (no matrix,
    row_scale 0) what it is."""
    args = (
        matrix,
        norm,
        pointer(row_scale),
        pointer(branch),
        int64(ld_branch),
        int32(hidden),
        float32(scale),
        pointer(x),
        int64(ld),
    )
    return launch("add_chunk", (n,), _ROW_THREADS, 0, *args)


def logits_chunk(row_scale: int, scale: float, softcap: float, logits: int, ld: int, n: int) -> Launch:
    """Scales and caps logits [n][ld] in place."""
    args = (pointer(row_scale), float32(scale), float32(softcap), pointer(logits), int64(ld))
    return launch("logits_chunk", (whole(ld, _OUTPUTS), n), _THREADS, 0, *args)
