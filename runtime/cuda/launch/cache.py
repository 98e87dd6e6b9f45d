"""Grids and buffers of `cache.cu`: tokens into a cache.

`layout` is a mapping with the numbers of abi.LAYOUT, as `_core.KVCache.geometry` returns them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvrun.cuda.abi import TILE, constants

THREADS = constants("cache.cu")["APPEND_THREADS"]
"""Of a block of `append` and of `commit`."""
ANGLE_BLOCKS = 64
"""Of `step_angles`."""


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
