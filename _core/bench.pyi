import mmap
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .cache import KVCache

class _Engine(Protocol):
    """Threads, and the shape of a model; its weights are not needed."""

    @property
    def threads(self) -> int: ...
    @property
    def description(self) -> Any: ...

def stream_buffer(threads: int, n_bytes: int = ...) -> mmap.mmap: ...
def read_bandwidth(threads: int, buffer: mmap.mmap | None = None, seconds: float = 0.3) -> float: ...
def matmul(
    weight_type: str,
    rows: int,
    cols: int,
    tokens: int = 1,
    threads: int = 1,
    n_bytes: int = 0,
    seconds: float = 0.2,
    planes: int | None = None,
) -> tuple[float, int, int]: ...
def bytes_read(kv: KVCache, n_tokens: int | None = None) -> int: ...
def fill(kv: KVCache, n_tokens: int, seed: int = 0) -> None: ...
def attention(
    engine: _Engine, kv: KVCache, repeat: int = 1, seed: int = 0
) -> tuple[float, npt.NDArray[np.float32]]: ...
