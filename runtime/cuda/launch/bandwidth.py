"""Launches of `bandwidth.cu`: reading memory, as fast as it comes."""

from __future__ import annotations

from kvrun.cuda.abi import Launch, int64, pointer
from kvrun.cuda.launch.common import launch

_THREADS, _BLOCKS_OF_A_MULTIPROCESSOR = 256, 8


def read_memory(data: int, n_bytes: int, out: int, n_multiprocessors: int) -> Launch:
    """Reads n_bytes, a multiple of 16, once; `out` int32 [1] is written only if they are not what they never are."""
    args = (pointer(data), int64(n_bytes), pointer(out))
    return launch("read_memory", (_BLOCKS_OF_A_MULTIPROCESSOR * n_multiprocessors,), _THREADS, 0, *args)
