"""Text that arrives in pieces: characters split over tokens, and stop strings split over pieces."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

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

    The stop string that is complete first wins, whatever the pieces the text arrives in.
    """

    def __init__(self, stops: str | Iterable[str] = ()) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise OptionError("a stop string must be text of at least one character")
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that may be shown now. Sets `stopped` at a complete stop string; then push no more."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back as the possible beginning of a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text`, shorter than `stop`, with which `stop` begins."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
