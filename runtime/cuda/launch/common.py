"""What launches have in common."""

from __future__ import annotations

import numpy as np

from kvrun.cuda.abi import BLOCK, MATRIX, NORM, Launch, struct

NO_NORM, NO_MATRIX = struct(NORM), struct(MATRIX)


def whole(n: int, of: int) -> int:
    """Pieces of `of` that n are in, the last one perhaps not full."""
    return -(-n // of)


def padded(n: int, of: int) -> int:
    """n rounded up to a multiple of `of`."""
    return of * whole(n, of)


def launch(kernel: str, grid: tuple[int, ...], threads: int, shared: int, *args: np.ndarray) -> Launch:
    """A launch of blocks in one dimension; `grid`: up to three."""
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(kernel, (x, y, z), (threads, 1, 1), shared, args)


def input_bytes(m: np.ndarray) -> int:
    """Of the shared memory that a matrix's input takes as floats, in whole blocks of 32."""
    return 4 * BLOCK * whole(int(m["cols"][0]), BLOCK)
