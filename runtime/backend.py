"""What a model runs on, as types: an engine and its caches, whose memory is the processor's or a device's.

`_core.Engine` and `_core.KVCache` are such a pair, `kvrun.cuda`'s `CudaEngine` and `CudaKVCache` another. Sessions and
measurements use no more of either than is here, and do not know which they have. An engine takes the caches that its
own `new_cache` made, and those of other engines of its kind with the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvrun import _core

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Token ids, [n]."""


class Cache(Protocol):
    """The keys and values of one text, in memory of a size that is fixed from the start.

    Used by one thread at a time: methods raise RuntimeError, or wait, while another thread uses it.
    """

    @property
    def ctx(self) -> int:
        """How many tokens stay visible at least: the first `n_sinks`, and the newest of all others."""

    @property
    def n_sinks(self) -> int: ...

    @property
    def window(self) -> int:
        """How many of the newest tokens are not quantised, at least."""

    @property
    def k(self) -> str:
        """The format of the keys, one of `_core.KV_FORMATS`."""

    @property
    def v(self) -> str: ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory; they do not change."""

    @property
    def n_tokens(self) -> int:
        """Tokens that went in since the start, evicted ones included."""

    @property
    def lost(self) -> int:
        """Tiles of 64 tokens after the sinks that are gone in some layer; 0 while every layer has all of them."""

    @property
    def outgrown(self) -> bool:
        """Whether a layer without a sliding window has lost tokens."""

    def reset(self) -> None:
        """Forget every token."""

    def truncate(self, n: int) -> None:
        """Keep the first n tokens. ValueError, with nothing changed, if what they need has been evicted."""

    def exact_from(self, more: int = 0) -> int:
        """The fewest tokens that `rewind` comes back to without a snapshot when `more` have come, while none have left
        the cache. It grows when a tile is packed, or is always 0."""

    def verifiable(self, most: int) -> int:
        """How many of the next tokens, 1 to `most`, may be written in one step (of an engine whose `max_written` allows
        it) and all but the first be taken back by `rewind`."""

    def snapshot(self, most: int = ...) -> _core.Snapshot | None:
        """What `rewind` needs to come back to where the cache is now; None if that takes more than `most` bytes.
        MemoryError."""

    def rewind(self, n: int, snapshot: _core.Snapshot | None = None) -> bool:
        """Go back to n tokens, exactly as it was then; False, with nothing changed, where that cannot be. A snapshot
        leads back to from where `exact_from` was to where it was made."""

    def copy(self) -> Self:
        """Another cache with the same contents. MemoryError or OptionError if there is no memory for it."""

    def state(self) -> npt.NDArray[np.uint8]:
        """The tokens' keys and values, [n] bytes, for `load_state` of a cache with the same options."""

    def load_state(self, n_tokens: int, lost: int, state: npt.NDArray[np.uint8]) -> None:
        """Hold what the cache held whose `n_tokens`, `lost` and `state()` these are. ValueError if they do not fit."""


class StepItem(NamedTuple):
    """One text's part of a step of an engine: see `Engine.step`."""

    cache: Any
    tokens: Tokens
    decoding: bool | None
    wants: str


CacheT = TypeVar("CacheT", bound=Cache)
CacheT_contra = TypeVar("CacheT_contra", bound=Cache, contravariant=True)


class Engine(Protocol[CacheT]):
    """A model's weights, ready to run; threads may share it, each with a cache of its own."""

    @property
    def max_chunk(self) -> int:
        """Most tokens in one call of `forward`."""

    @property
    def max_written(self) -> int:
        """Most tokens of a text that is being written in one step of which each gets what it would alone, in less time
        than one after the other; 1 if an engine has no such steps."""

    @property
    def threads(self) -> int:
        """Threads of the processor that it uses."""

    @property
    def description(self) -> Any:
        """The model's `ModelDescription`."""

    @property
    def sliding_windows(self) -> tuple[int, ...]:
        """For each layer the number of tokens that a query sees, itself included; 0 for all."""

    def new_cache(
        self,
        *,
        k: str = "f16",
        v: str = "f16",
        ctx: int = 2048,
        sinks: int = 4,
        window: int = 64,
        prefault: bool = False,
    ) -> CacheT:
        """An empty cache. `prefault`: have its memory from the start. ValueError for options that make no cache,
        MemoryError (on a device OptionError) for one that is too large."""

    def bytes_held(self, caches: Iterable[CacheT]) -> int:
        """Bytes of sinks, window and tiles that these caches hold; a tile that several hold counts once. On a device,
        where a cache has all of its memory from the start, of all that."""

    @overload
    def forward(
        self, tokens: Tokens, kv: CacheT, logits: Literal["last", "all"] = "last", decoding: bool | None = None
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def forward(self, tokens: Tokens, kv: CacheT, logits: Literal["none"], decoding: bool | None = None) -> None: ...
    @overload
    def forward(
        self, tokens: Tokens, kv: CacheT, logits: str, decoding: bool | None = None
    ) -> npt.NDArray[np.float32] | None: ...
    def forward(
        self, tokens: Tokens, kv: CacheT, logits: str = "last", decoding: bool | None = None
    ) -> npt.NDArray[np.float32] | None:
        """A step of one text: run 1 to `max_chunk` tokens that follow those in the cache, and put them into it.

        Returns the logits of what comes after the last token, [vocab_size], after each ("all"), [n, vocab_size], or
        None ("none"). `decoding`: compute as for text that is being written, more exactly where an engine reads
        text faster than that; None: if there is one token. ValueError for tokens outside the vocabulary, too many
        of them or none, more than the model has learned positions for, or a cache of another model; RuntimeError if
        another thread is using the cache.
        """

    def step(self, items: Sequence[tuple[CacheT, Tokens, bool | None, str]]) -> list[npt.NDArray[np.float32] | None]:
        """Run tokens of several texts: `items` of (cache, tokens, decoding, what is wanted), as `forward` takes them.

        Returns for each, in order, what `forward` would, to the bit: nothing depends on what runs beside it. "hidden":
        float32 [n, hidden_size], what the head gets of every token. Raises what `forward` does, and ValueError for a
        cache that comes twice; nothing has changed then.
        """


if TYPE_CHECKING:

    def _of_the_processor(engine: _core.Engine, cache: _core.KVCache) -> tuple[Engine[_core.KVCache], Cache]:
        return engine, cache  # accepted as these types by a type checker, or not
