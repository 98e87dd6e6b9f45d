"""Grids, shared memory and buffers of `attention.cu`: attention of one token.

`layout` is a mapping with the numbers of abi.LAYOUT, as `_core.KVCache.geometry` returns them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvrun.cuda.abi import TILE, constants
from kvrun.cuda.launch.common import padded, whole

_SIZES = constants("attention.cu")
THREADS, MAX_HEAD_DIM, _ROWS = _SIZES["THREADS"], _SIZES["MAX_HEAD_DIM"], _SIZES["ROWS"]
_F32 = _SIZES["KV_FORMAT_F32"]
_BITS = {_SIZES[f"KV_FORMAT_Q{bits}"]: bits for bits in (8, 4, 2)}
_MOST_SPANS, _MOST_BLOCKS, _BLOCK_OVERHEAD = 256, 4, 1 << 10


def defines(layout: Mapping[str, int]) -> tuple[str, ...]:
    """Options of NVRTC that make the attention modules those of one head size and pair of formats."""
    return (
        f"-DKV_HEAD_DIM={layout['head_dim']}",
        f"-DKV_K_FORMAT={layout['k_format']}",
        f"-DKV_V_FORMAT={layout['v_format']}",
    )


def attend_shared(layout: Mapping[str, int]) -> int:
    """Dynamic shared memory of `attend`; attention.cu counts the same."""
    dim, k, v = layout["head_dim"], layout["k_format"], layout["v_format"]
    pad = padded(dim, 16)
    tokens = 16 if k in _BITS and v in _BITS else 32
    keys = [4 * _SIZES["SINK_ITEM"] * dim]
    values = [32 * _ROWS * 4]
    if k != _F32:
        keys.append(dim * (2 * tokens + 16))
    if v != _F32:
        values.append(tokens * (2 * pad + 16))
    if k in _BITS:
        keys.append(TILE * pad * _BITS[k] // 8 + 4 * pad)
    if v in _BITS:
        values.append(TILE * pad * _BITS[v] // 8 + 4 * TILE * whole(dim, TILE))
    warp = max(max(keys) + max(values), 4 * _ROWS * pad)
    return 4 * _ROWS * dim + 3 * (pad // 16 * 256) + 512 + _SIZES["WARPS"] * warp


def attend_grid(
    layout: Mapping[str, int], group: int, ctx: int, n_multiprocessors: int, shared_per_multiprocessor: int
) -> tuple[int, int, int]:
    """For captured graphs: whatever the depth. As many blocks as the device runs at a time, if a full cache has tiles
    for them."""
    heads, rows = layout["n_kv_heads"], whole(group, _ROWS)
    fit = shared_per_multiprocessor // (attend_shared(layout) + _BLOCK_OVERHEAD)
    blocks = n_multiprocessors * max(1, min(fit, _MOST_BLOCKS if layout["head_dim"] <= 128 else 2))
    items = ctx // 16 + 8
    return max(1, min(blocks // (heads * rows), items, _MOST_SPANS)), heads, rows


def partial_floats(layout: Mapping[str, int], grid: tuple[int, int, int]) -> int:
    """Of the buffer `partial`; `counters` has grid[1] * grid[2] int32, zeros once."""
    return grid[0] * grid[1] * grid[2] * _ROWS * (padded(layout["head_dim"], 16) + 2)
