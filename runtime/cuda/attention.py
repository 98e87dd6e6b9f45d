"""Grids, shared memory and buffers of the cache and attention kernels: what `cache.cu`, `attention.cu` and
`attention_chunk.cu` expect of whoever launches them.

`layout` is a mapping with the numbers of abi.LAYOUT, as `_core.KVCache.geometry` returns them.
"""

from __future__ import annotations

from collections.abc import Mapping

TILE = 64
MAX_HEAD_DIM = 256
F32, F16, Q8, Q4, Q2 = range(5)  # enum kv_format_id
BITS = {Q8: 8, Q4: 4, Q2: 2}
ANGLE_BLOCKS, APPEND_THREADS, ATTEND_THREADS = 64, 256, 128
_WARPS, _ROWS, _SINK_ITEM, _CHUNK_ROWS = 4, 8, 8, 64
_MOST_SPANS, _MOST_BLOCKS, _BLOCK_OVERHEAD = 256, 4, 1 << 10


def defines(layout: Mapping[str, int]) -> tuple[str, ...]:
    """Options of NVRTC that make the attention modules those of one head size and pair of formats."""
    return (
        f"-DKV_HEAD_DIM={layout['head_dim']}",
        f"-DKV_K_FORMAT={layout['k_format']}",
        f"-DKV_V_FORMAT={layout['v_format']}",
    )


def _up(n: int, of: int) -> int:
    return -(-n // of) * of


# Appending ----------------------------------------------------------------------------------------------------------


def sink_rows(n: int) -> int:
    """Rows of the tables of the sinks' angles, [ropes][rows][n_sinks][head_dim / 2], for n tokens."""
    return 2 if n == 1 else n // TILE + 3


def max_tiles(layout: Mapping[str, int], n: int) -> int:
    """Most tiles that get some of n tokens or are packed by them; so many are staged for each KV head when n > 1."""
    return layout["n_window_tiles"] if n == 1 else n // TILE + layout["n_window_tiles"] + 1


def append_grid(layout: Mapping[str, int], n: int) -> tuple[int, int, int]:
    return 1 + max_tiles(layout, n), layout["n_kv_heads"], 2


def commit_grid(layout: Mapping[str, int], n: int) -> tuple[int, int, int]:
    return 2 * max_tiles(layout, n), layout["n_kv_heads"], 1


def staged_bytes(layout: Mapping[str, int], n: int) -> tuple[int, int]:
    """Of the window tiles and the packed tiles that are staged for n tokens, in any layer."""
    tiles = layout["n_kv_heads"] * max_tiles(layout, n)
    window, ring = layout["window_k_bytes"] + layout["window_v_bytes"], layout["k_bytes"] + layout["v_bytes"]
    return tiles * window, tiles * ring


# One token ----------------------------------------------------------------------------------------------------------


def attend_shared(layout: Mapping[str, int]) -> int:
    """Dynamic shared memory of `attend`; attention.cu counts the same."""
    dim, k, v = layout["head_dim"], layout["k_format"], layout["v_format"]
    pad = _up(dim, 16)
    tokens = 16 if k in BITS and v in BITS else 32
    keys = [4 * _SINK_ITEM * dim]
    values = [32 * _ROWS * 4]
    if k != F32:
        keys.append(dim * (2 * tokens + 16))
    if v != F32:
        values.append(tokens * (2 * pad + 16))
    if k in BITS:
        keys.append(TILE * pad * BITS[k] // 8 + 4 * pad)
    if v in BITS:
        values.append(TILE * pad * BITS[v] // 8 + 4 * TILE * -(-dim // TILE))
    warp = max(max(keys) + max(values), 4 * _ROWS * pad)
    return 4 * _ROWS * dim + 3 * (pad // 16 * 256) + 512 + _WARPS * warp


def attend_grid(
    layout: Mapping[str, int], group: int, ctx: int, n_multiprocessors: int, shared_per_multiprocessor: int
) -> tuple[int, int, int]:
    """For captured graphs: whatever the depth. As many blocks as the device runs at a time, if a full cache has tiles
    for them."""
    heads, rows = layout["n_kv_heads"], -(-group // _ROWS)
    fit = shared_per_multiprocessor // (attend_shared(layout) + _BLOCK_OVERHEAD)
    blocks = n_multiprocessors * max(1, min(fit, _MOST_BLOCKS if layout["head_dim"] <= 128 else 2))
    items = ctx // 16 + 8
    return max(1, min(blocks // (heads * rows), items, _MOST_SPANS)), heads, rows


def partial_floats(layout: Mapping[str, int], grid: tuple[int, int, int]) -> int:
    """Of the buffer `partial`; `counters` has grid[1] * grid[2] int32, zeros once."""
    return grid[0] * grid[1] * grid[2] * _ROWS * (_up(layout["head_dim"], 16) + 2)


# A chunk ------------------------------------------------------------------------------------------------------------


def chunk_shared(layout: Mapping[str, int]) -> int:
    """Dynamic shared memory of `attend_chunk`."""
    pad = _up(layout["head_dim"], 16)
    return _CHUNK_ROWS * (2 * pad + 16) + 128 * pad + 128 * _up(pad, 64)


def chunk_grid(layout: Mapping[str, int], group: int, n: int) -> tuple[int, int, int]:
    heads = min(group, _CHUNK_ROWS)
    tokens = _CHUNK_ROWS // heads
    # Runs of tokens that see the same tiles packed begin anywhere: at each border a block may be cut in two.
    per_run = -(-TILE // tokens)
    return n // tokens + n // TILE + 4 + per_run, layout["n_kv_heads"] * -(-group // heads), 1
