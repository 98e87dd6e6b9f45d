"""How the text of a session came about, and the ways back to where its cache has been."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun import _core
    from kvrun.backend import Cache

SHARE = 4
"""Snapshots take at most this part of the cache's size, a quarter,"""
LEAST = 16 << 20
"""or so many bytes, if those are more."""


def snapshot_bytes(cache_bytes: int) -> int:
    """Most bytes of the snapshots beside a cache of so many."""
    return max(cache_bytes // SHARE, LEAST)


Runs = tuple[tuple[int, int], ...]
"""[start, end) of tokens of a text; ascending, with others between them."""
Ends = tuple[tuple[int, int], ...]
"""(tokens, characters) of a conversation to the ends of its answers; ascending."""


@dataclass(frozen=True)
class _Kept:
    """A snapshot, and the lengths of the text that it leads back to, `first` to `last`."""

    first: int
    last: int
    snapshot: _core.Snapshot


class History:
    """Which tokens of a text were written, the others having been read; where answers end; and snapshots of the cache.

    Cached keys and values are, to the bit, the same however a text is cut into chunks, but not whether it is read or
    written, as an answer is, one token at a time and more precisely. So tokens that are fed again go in as they went in
    first, and a cache that is taken back and fed is as if nothing else had ever been in it.

    Tokens that have left the window are rounded, and those in a window to be restored are needed as they were. A
    snapshot keeps them. One is made when a tile is packed after a place that is worth coming back to: where a prompt
    begins, or one of its chunks, and where it ends. Where there is none a cache goes back further, at most to its
    beginning. When snapshots take too much, older ones go, and last those of `places`.

    A conversation that goes on from the end of an answer has the answer's own tokens.

    Every change is one assignment, so that Ctrl-C leaves all of it or nothing.
    """

    def __init__(self) -> None:
        self._written: Runs = ()
        self._told: tuple[str, Ends] = "", ()
        self._kept: tuple[_Kept, ...] = ()
        self._places: tuple[int, ...] = ()
        self._mark = 0

    @classmethod
    def recalled(cls, written: Runs, story: str, answers: Ends) -> History:
        """One that was saved: all but its snapshots, without which tokens are fed again from further back."""
        history = cls()
        history._written, history._told = written, (story, answers)
        return history

    def copy(self) -> History:
        other = History()
        other._written, other._kept, other._mark = self._written, self._kept, self._mark
        other._places = self._places
        other._told = self._told
        return other

    # --- read or written --------------------------------------------------------------------------

    def write(self, position: int) -> None:
        """The token at this position of the text is an answer's."""
        start, end = self._written[-1] if self._written else (0, 0)
        if end == position:
            self._written = (*self._written[:-1], (start, position + 1))
        elif end < position:
            self._written = (*self._written, (position, position + 1))

    @property
    def written(self) -> Runs:
        """The tokens that were written."""
        return self._written

    @property
    def read(self) -> int | None:
        """How many tokens were read before the first that was written; None if none was written."""
        return self._written[0][0] if self._written else None

    def run(self, position: int) -> tuple[bool, int | None]:
        """Whether the token at a position is written, and where that ends; None if nowhere."""
        after = None
        for start, end in reversed(self._written):
            if position >= end:
                break
            if position >= start:
                return True, end
            after = start
        return False, after

    def cut(self, n: int) -> None:
        """The text has n tokens, and no more."""
        self._written = tuple((start, min(end, n)) for start, end in self._written if start < n)
        story, turns = self._told
        self._told = story, tuple(turn for turn in turns if turn[0] <= n)

    # --- the conversation -------------------------------------------------------------------------

    def tell(self, story: str, n_tokens: int) -> None:
        """The text is a conversation that reads like this, to the end of an answer."""
        before, turns = self._told
        alike = (turn for turn in turns if turn[0] < n_tokens and before[: turn[1]] == story[: turn[1]])
        self._told = story, (*alike, (n_tokens, len(story)))

    def told(self, text: str) -> tuple[int, int]:
        """(tokens, characters) of the longest part of the conversation, to the end of an answer, that a text begins
        with."""
        story, turns = self._told
        return next((turn for turn in reversed(turns) if text.startswith(story[: turn[1]])), (0, 0))

    @property
    def answers(self) -> tuple[str, Ends]:
        """The conversation to the end of its last answer, and the ends of all."""
        story, ends = self._told
        return (story[: ends[-1][1]] if ends else ""), ends

    # --- the ways back ----------------------------------------------------------------------------

    @property
    def places(self) -> tuple[int, ...]:
        """Lengths of the text that others are likely to come back to, ascending."""
        return self._places

    @property
    def snapshots(self) -> Iterator[_core.Snapshot]:
        return (one.snapshot for one in self._kept)

    def mark(self, n: int, lasting: bool = False) -> None:
        """The cache has n tokens, and this is a place to come back to; `lasting`: one of `places`."""
        self._mark = n
        if lasting:
            self._places = (*(place for place in self._places if place < n), n)

    def before(self, kv: Cache, n: int) -> None:
        """Before n more tokens: keeps what they take away from where the mark is."""
        self._settle(kv.n_tokens)
        first = kv.exact_from()
        if kv.exact_from(n) == first or kv.outgrown or self._mark < max(first, 1):
            return
        if any(one.first <= self._mark <= one.last for one in self._kept):
            return
        most = snapshot_bytes(kv.nbytes)
        try:
            snapshot = kv.snapshot(most)
        except MemoryError:  # then the cache goes back further
            return
        if snapshot is not None:
            others = (one for one in self._kept if one.first != first)
            self._kept = _thinned((*others, _Kept(first, kv.n_tokens, snapshot)), most, self._places)
            self._places = tuple(place for place in self._places if self.place(kv, place) == place)

    def place(self, kv: Cache, n: int) -> int:
        """How many tokens `go_back` to n leaves, of a text that has not outgrown its cache."""
        if n >= kv.exact_from():
            return min(n, kv.n_tokens)
        return max((min(n, one.last) for one in self._kept if one.first <= n), default=0)

    def go_back(self, kv: Cache, n: int) -> int:
        """Take the cache back to n tokens, or where that is not possible exactly to the next place before;
        how many it has then."""
        self._settle(kv.n_tokens)
        n = min(n, kv.n_tokens)
        at = n if kv.rewind(n) else 0
        for kept in reversed(self._kept):
            place = min(n, kept.last)
            if at or place < kept.first:
                continue
            at = place if kv.rewind(place, kept.snapshot) else 0
        if not at:
            kv.reset()
        self._settle(at)
        return at

    def _settle(self, fed: int) -> None:
        """Forget what leads to places where a cache with so many tokens has not been."""
        if self._kept and self._kept[-1].last > fed:
            self._kept = tuple(replace(one, last=min(one.last, fed)) for one in self._kept if one.first <= fed)
        if self._places and self._places[-1] > fed:
            self._places = tuple(place for place in self._places if place <= fed)
        self._mark = min(self._mark, fed)


def _thinned(kept: tuple[_Kept, ...], most: int, places: tuple[int, ...]) -> tuple[_Kept, ...]:
    """So many that they have at most this many bytes: the newest, then those that lead back to `places`, and of the
    others fewer the older they are."""
    while sum(one.snapshot.nbytes for one in kept) > most and len(kept) > 1:
        ends = [0, *(one.last for one in kept)]
        # What is lost with each, in proportion to how long ago it was.
        gaps = [(ends[i + 1] - ends[i - 1]) / (ends[-1] - ends[i - 1]) for i in range(1, len(kept))]
        lasting = [any(one.first <= place <= one.last for place in places) for one in kept[:-1]]
        drop = min(range(len(gaps)), key=lambda i: (lasting[i], gaps[i]))
        kept = (*kept[:drop], *kept[drop + 1 :])
    return kept
