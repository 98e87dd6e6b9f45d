"""Text that arrives in pieces: characters split over tokens, and stop strings split over pieces."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

from kvrun.errors import OptionError


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


PER_BYTE = "kvrun.per_byte"
"""Error handler: one U+FFFD for each invalid byte, as SentencePiece writes them ("replace" merges some)."""
codecs.register_error(PER_BYTE, _one_per_byte)


class StreamDecoder:
    """Token ids in, text out as soon as it is certain.

    `piece(token, first)` gives a token's bytes, None for a token that is not shown; `first` is true until
    one is shown, and with `trim` until one has bytes. A character split over tokens is held back until it is
    complete; bytes that can no longer become a character turn into U+FFFD at once. Up to `strip` spaces are
    dropped at the start of the text.
    """

    def __init__(
        self,
        piece: Callable[[int, bool], bytes | None],
        strip: int = 0,
        errors: str = "replace",
        trim: bool = False,
    ) -> None:
        self._piece = piece
        self._strip = strip
        self._trim = trim
        self._first = True
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token: int) -> str:
        """The text that `token` completes; often "" in the middle of a character."""
        data = self._piece(token, self._first)
        if data is None:
            return ""
        self._first = self._first and self._trim and not data
        return self._stripped(self._decoder.decode(data))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character was cut off, else ""."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while text and self._strip:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class StopStrings:
    """Passes text through up to the first stop string, which is never shown, not even its beginning.

    The stop string that is complete first wins, whatever the pieces the text arrives in. Special tokens come as text
    that is not shown: a stop string may be, begin or end with that of a special token, and is found as well where the
    text that is shown has it across one.
    """

    def __init__(self, stops: str | Iterable[str] = ()) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise OptionError("a stop string must be text of at least one character")
        self._held: list[tuple[str, bool]] = []  # the possible beginning of a stop string: text, whether it is shown
        self.stopped = False

    def push(self, piece: str, shown: bool = True) -> str:
        """The text that may be shown now. Sets `stopped` at a complete stop string; then push no more."""
        if not self._stops or not piece:
            return piece if shown else ""
        self._held.append((piece, shown))
        text = "".join(part for part, _ in self._held)
        views: list[Sequence[int]] = [range(len(text))]
        if not all(is_shown for _, is_shown in self._held):
            views.append(self._positions())
        # Where in `text` a stop string begins and ends, in all of it and in what is shown of it.
        found, kept = [], [len(text)]
        for at in views:
            view = text if len(at) == len(text) else "".join(text[i] for i in at)
            for stop in self._stops:
                start = view.find(stop)
                if start >= 0:
                    found.append((at[start + len(stop) - 1], at[start]))
                elif n := overlap(view, stop):
                    kept.append(at[len(view) - n])
        self.stopped = bool(found)
        return self._release(min(found)[1] if found else min(kept))

    def _positions(self) -> list[int]:
        """Where what is shown stands in all the text that is held."""
        positions: list[int] = []
        start = 0
        for part, shown in self._held:
            positions += range(start, start + len(part)) if shown else ()
            start += len(part)
        return positions

    def _release(self, end: int) -> str:
        """What is shown of the first `end` characters. The rest stays, unless it is a stop string."""
        released, rest = [], []
        for part, shown in self._held:
            released.append(part[: max(0, end)] if shown else "")
            if end < len(part):
                rest.append((part[max(0, end) :], shown))
            end -= len(part)
        self._held = [] if self.stopped else rest
        return "".join(released)

    def finish(self) -> str:
        """What was held back as the possible beginning of a stop string."""
        held, self._held = self._held, []
        return "".join(part for part, shown in held if shown)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text`, shorter than `stop`, with which `stop` begins."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
