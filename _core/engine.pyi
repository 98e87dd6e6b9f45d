from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, overload

import numpy as np
import numpy.typing as npt

from .cache import KVCache

MAX_CHUNK: int
MAX_ROWS: int
MAX_THREADS: int
MAX_WRITTEN: int

class _Weight(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def data(self) -> npt.NDArray[np.uint8]: ...

_Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]

class Engine:
    max_chunk: int
    max_written: int
    def __init__(
        self,
        description: Any,
        weights: Mapping[str, _Weight],
        vectors: Mapping[str, npt.NDArray[np.float32]],
        rope_tables: Callable[[int], Any],
        threads: int = 1,
        precise: bool = False,
    ) -> None: ...
    @property
    def description(self) -> Any: ...
    @property
    def sliding_windows(self) -> tuple[int, ...]: ...
    @property
    def threads(self) -> int: ...
    @property
    def precise(self) -> bool: ...
    def new_cache(
        self,
        *,
        k: str = "f16",
        v: str = "f16",
        ctx: int = 2048,
        sinks: int = 4,
        window: int = 64,
        prefault: bool = False,
    ) -> KVCache: ...
    def bytes_held(self, caches: Iterable[KVCache]) -> int: ...
    @overload
    def forward(
        self, tokens: _Tokens, kv: KVCache, logits: Literal["last", "all"] = "last", decoding: bool | None = None
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def forward(self, tokens: _Tokens, kv: KVCache, logits: Literal["none"], decoding: bool | None = None) -> None: ...
    @overload
    def forward(
        self, tokens: _Tokens, kv: KVCache, logits: str, decoding: bool | None = None
    ) -> npt.NDArray[np.float32] | None: ...
    def step(
        self, items: Sequence[tuple[KVCache, _Tokens, bool | None, str]]
    ) -> list[npt.NDArray[np.float32] | None]: ...
    def checked(self, tokens: _Tokens, kv: KVCache, logits: str, most: int = ...) -> npt.NDArray[np.int32]: ...
    def ropes_of(self, ctx: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]: ...
