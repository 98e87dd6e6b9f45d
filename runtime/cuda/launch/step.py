"""Launches of `step.cu`: what one token begins with, and norms of heads."""

from __future__ import annotations

import numpy as np

from kvrun.cuda.abi import Launch, constants, float32, int32, int64, pointer
from kvrun.cuda.launch.common import launch

_THREADS = constants("step.cu")["STEP_THREADS"]
_BEGIN_BLOCKS = 32


def begin_step(
    step: int,
    ids: int,
    embed: np.ndarray,
    positions: np.ndarray,
    scale: float,
    hidden: int,
    x: int,
    *angles: np.ndarray,
) -> Launch:
    """x: the token's embedding; and the tables of angles, with the arguments of step_angles after its Step."""
    args = (pointer(step), pointer(ids), embed, positions, float32(scale), int32(hidden), pointer(x), *angles)
    return launch("begin_step", (_BEGIN_BLOCKS,), _THREADS, 0, *args)


def norm_heads(
    qkv: int,
    ld: int,
    k_offset: int,
    q_norm: int,
    k_norm: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    all_heads: bool,
    n: int,
) -> Launch:
    """RMS norms of the queries and keys in qkv [n][ld], of each head or of all heads at once, in place."""
    args = (
        pointer(qkv),
        int64(ld),
        int32(k_offset),
        pointer(q_norm),
        pointer(k_norm),
        int32(n_heads),
        int32(n_kv_heads),
        int32(head_dim),
        float32(eps),
        int32(all_heads),
    )
    return launch("norm_heads", (2 if all_heads else n_heads + n_kv_heads, n), _THREADS, 0, *args)
