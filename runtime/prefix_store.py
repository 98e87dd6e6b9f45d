"""Beginnings of texts, kept with their caches: a prompt that begins alike is fed from where it differs.

What is kept was *read*, not written (`History`), and a cache goes back only to where it is as if it had been fed anew.
So a prompt gets, to the bit, what it would get without the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvrun.backend import Cache, Engine
    from kvrun.history import History

Ids = npt.NDArray[np.int32]
"""Tokens of a text, [n]."""

WORTH = 16
"""Fewest tokens to have in common with another text: fewer are fed about as fast as a cache is copied."""


def common(a: Ids, b: Ids) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


class Prefix:
    """A text that was read, the cache that holds it, and the ways back in it.

    The cache may hold more than these tokens. Nothing else may change it while a method is running.
    """

    def __init__(self, tokens: Ids, cache: Cache, history: History) -> None:
        self.tokens, self.cache, self.history = tokens, cache, history

    def __len__(self) -> int:
        return len(self.tokens)

    def place(self, n: int) -> int:
        """How many of the first n tokens a `fork` has."""
        return self.history.place(self.cache, n)

    def fork(self, n: int) -> Prefix:
        """A copy with the first n tokens, or as many of them as can be had as if no others had been fed. MemoryError or
        OptionError if there is no memory for it."""
        other = Prefix(self.tokens[:n], self.cache.copy(), self.history.copy())
        other.settle()
        return other

    def settle(self) -> None:
        """Take the cache back to the tokens, and give up those that it cannot have as they were."""
        n = self.history.go_back(self.cache, len(self))
        self.history.cut(n)
        self.tokens = self.tokens[:n]

    def has(self, other: Prefix) -> bool:
        """Whether all that a fork of another one can be, one of this can be as well."""
        n = len(other)
        if len(self) < n or common(self.tokens, other.tokens) < n:
            return False
        places = (place for place in (*other.history.places, n) if other.place(place) == place)
        return all(self.place(place) == place for place in places)


class PrefixStore:
    """Prefixes that nobody else uses, in at most `most` bytes; those that were not used for longest go first."""

    def __init__(self, engine: Engine[Any], most: int) -> None:
        self.most = most
        self.nbytes = 0
        self._engine = engine
        self._kept: tuple[Prefix, ...] = ()  # the most recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._kept)

    def wants(self, prefix: Prefix) -> bool:
        """Whether it is worth being added. If one in the store has all that it has, that one has been used instead."""
        if not self.most or prefix.place(len(prefix)) < WORTH:
            return False
        alike = next((one for one in self._kept if one.has(prefix)), None)
        if alike is not None:
            self.used(alike)
        return alike is None

    def used(self, prefix: Prefix) -> None:
        """It was used, if it is one of the store's."""
        if any(one is prefix for one in self._kept):
            self._kept = (prefix, *(one for one in self._kept if one is not prefix))

    def add(self, prefix: Prefix) -> None:
        """Keep one, whose cache is the store's from now on, if it fits; those go that have nothing it does not have."""
        prefix.settle()
        if self._bytes((prefix,)) > self.most:
            return
        kept = (prefix, *(one for one in self._kept if not prefix.has(one)))
        while (nbytes := self._bytes(kept)) > self.most:
            kept = kept[:-1]
        self._kept, self.nbytes = kept, nbytes

    def clear(self) -> bool:
        """Give everything up; whether there was anything."""
        had = bool(self._kept)
        self._kept, self.nbytes = (), 0
        return had

    def _bytes(self, kept: tuple[Prefix, ...]) -> int:
        """Of caches and snapshots, what several of them have counted once."""
        snapshots = {id(snapshot): snapshot.nbytes for one in kept for snapshot in one.history.snapshots}
        return self._engine.bytes_held([one.cache for one in kept]) + sum(snapshots.values())
