"""The text of a session: its tokens, and how it reads as a conversation."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from kvrun.options import REPEAT_LAST_N


class Transcript:
    """The tokens of a text, the first of which a cache holds, and the rendered conversation that they are.

    How many tokens were fed, the cache alone says; what follows them is pending. Every change here is one assignment,
    or one `extend`, and a cache is cut before its text is. So wherever Ctrl-C strikes, the two agree: at worst a token
    that was to be cut off is still pending.

    All tokens are kept as long as the cache keeps theirs, to tell what a prompt has in common with them. Afterwards
    only those that are pending and the last REPEAT_LAST_N are, so that an endless text does not fill the memory.

    `rendered`: the text as the chat template renders it, special characters escaped; None where it is not known.
    """

    def __init__(self, tokens: Iterable[int] = (), start: int = 0, rendered: str | None = "") -> None:
        self._kept = (start, array("i", tokens))  # the tokens from number `start` on; replaced as one
        self.rendered = rendered

    def copy(self) -> Transcript:
        start, tokens = self._kept
        return Transcript(tokens, start, self.rendered)

    def agree(self, fed: int, outgrown: bool) -> None:
        """Bring the text into line with a cache that holds `fed` tokens, and has lost some of them if `outgrown`."""
        start, tokens = self._kept
        if fed < start:  # the cache was cut, the text was not yet
            self._kept = (fed, array("i"))
        elif outgrown and (drop := min(fed - start, len(tokens) - REPEAT_LAST_N)) > 0:
            self._kept = (start + drop, tokens[drop:])

    @property
    def n_tokens(self) -> int:
        start, tokens = self._kept
        return start + len(tokens)

    @property
    def tokens(self) -> array[int] | None:
        """All tokens, None if some are no longer known. Not to be changed."""
        start, tokens = self._kept
        return None if start else tokens

    @property
    def known(self) -> tuple[int, array[int]]:
        """(number of the first token that is known, those from it on). Not to be changed."""
        return self._kept

    def pending(self, fed: int, most: int | None = None) -> array[int]:
        """The tokens that follow those `fed`, or the first `most` of them."""
        start, tokens = self._kept
        first = fed - start
        return tokens[first:] if most is None else tokens[first : first + most]

    def recent(self) -> array[int]:
        """The last REPEAT_LAST_N tokens, or fewer."""
        return self._kept[1][-REPEAT_LAST_N:]

    def common(self, ids: Sequence[int]) -> int:
        """How many tokens the text and `ids` begin with alike; 0 if its beginning is no longer known."""
        known = self.tokens or ()
        pairs = enumerate(zip(known, ids, strict=False))
        return next((n for n, (a, b) in pairs if a != b), min(len(known), len(ids)))

    def append(self, ids: Iterable[int]) -> None:
        self._kept[1].extend(ids)

    def cut(self, n: int) -> None:
        """Keep the first n tokens. The cache must have been cut already."""
        start, tokens = self._kept
        self._kept = (min(start, n), tokens[: max(0, n - start)])
