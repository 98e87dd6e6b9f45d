"""What an answer looks like on standard output, piped or on a terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from kvrun.text.thinking import Thinking


class Output:
    """Text to a stream at once. A terminal gets no control characters that a model may have written, and its
    thinking dimmed."""

    _visible = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._at_line_start = True
        self._thinking: Thinking | None = None

    def expect_thinking(self, begun: bool) -> None:
        """The answer that comes may begin with thinking; `begun`: it goes on with it."""
        if self._terminal and os.environ.get("TERM") != "dumb":
            from kvrun.text.thinking import Thinking

            self._thinking = Thinking(begun)

    def write(self, text: str) -> None:
        self._show(self._thinking.push(text) if self._thinking else [(text, False)])

    def _show(self, parts: list[tuple[str, bool]]) -> None:
        for text, dim in parts:
            shown = text.translate(self._visible) if self._terminal else text
            # Each part ends as it began, so that nothing is left dimmed whenever it ends.
            self._stream.write(f"\x1b[2m{shown}\x1b[22m" if dim else shown)
            self._at_line_start = text.endswith("\n")
        self._stream.flush()

    def end(self) -> None:
        if self._thinking:
            self._show(self._thinking.finish())
            self._thinking = None
        if not self._at_line_start:
            self.write("\n")
