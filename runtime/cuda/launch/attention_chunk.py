"""Grids and shared memory of `attention_chunk.cu`: attention of a chunk.

`layout` is a mapping with the numbers of abi.LAYOUT, as `_core.KVCache.geometry` returns them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvrun.cuda.abi import TILE, constants
from kvrun.cuda.launch.common import padded, whole

_SIZES = constants("attention_chunk.cu")
THREADS, _ROWS = _SIZES["THREADS"], _SIZES["ROWS"]


def shared_bytes(layout: Mapping[str, int]) -> int:
    """Dynamic shared memory of `attend_chunk`."""
    pad = padded(layout["head_dim"], 16)
    return _ROWS * (2 * pad + 16) + 128 * pad + 128 * padded(pad, 64)


def grid(layout: Mapping[str, int], group: int, n: int) -> tuple[int, int, int]:
    heads = min(group, _ROWS)
    tokens = _ROWS // heads
    # Runs of tokens that see the same tiles packed begin anywhere: at each border a block may be cut in two.
    per_run = whole(TILE, tokens)
    return n // tokens + n // TILE + 4 + per_run, layout["n_kv_heads"] * whole(group, heads), 1
