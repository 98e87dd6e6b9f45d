"""Special tokens: found in a text where they are meant, and kept apart from ordinary text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

ESCAPE = "\ufdd0"
"""A Unicode noncharacter, which no text should contain. The character after it is never part of a special token."""

START, INNER, CONTINUED = "start", "inner", "continued"
"""Where a run of ordinary text stands: at the start, after a special token, or after earlier text.
SentencePiece's dummy space goes before the first and, with some tokenizers, the second."""


class SpecialTokens:
    """The special tokens of a vocabulary: found in a text, and kept apart from ordinary text.

    `lstrip`, `rstrip`: those that take the white space before or after them; `single_word`: those that are only found
    where no letter or digit is next to them.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        lstrip: Iterable[int] = (),
        rstrip: Iterable[int] = (),
        single_word: Iterable[int] = (),
    ) -> None:
        self.ids = {text: token for text, token in ids.items() if text}
        self._lstrip, self._rstrip = frozenset(lstrip), frozenset(rstrip)
        self._single_word = frozenset(single_word)

    @cached_property
    def _scanner(self) -> re.Pattern[str]:
        # Compiled when first needed: most texts have neither an escape nor a special token.
        longest_first = sorted(self.ids, key=len, reverse=True)
        names = "|".join(map(self._pattern, longest_first)) or "(?!)"
        return re.compile(f"{ESCAPE}(?P<literal>.)|(?P<special>{names})", re.DOTALL)

    def _pattern(self, text: str) -> str:
        pattern = re.escape(text)
        return rf"(?<!\w){pattern}(?!\w)" if self.ids[text] in self._single_word else pattern

    def found_in(self, text: str) -> bool:
        return any(name in text for name in self.ids)

    def escape(self, text: str, edges: bool = True) -> str:
        """`text` with `ESCAPE` where `split` would otherwise see a special token in it.

        With `edges`, also where it begins or ends with a part of a special token that the text put around it
        could complete. Text without any of that is returned as it is.
        """
        marked = set(self._edges(text)) if edges and text else set()
        for name in self.ids:
            start = text.find(name)
            while start >= 0:
                marked.update(range(start, start + len(name)))
                start = text.find(name, start + 1)
        if not marked and ESCAPE not in text:
            return text
        return "".join(ESCAPE + c if i in marked or c == ESCAPE else c for i, c in enumerate(text))

    def _edges(self, text: str) -> Iterable[int]:
        # Templates often trim a message, so what counts is where its text begins and ends.
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        for name in self.ids:
            for n in range(1, len(name)):
                if text.startswith(name[n:], first):
                    yield first
                if text.endswith(name[:n], 0, last):
                    yield last - 1

    def split(self, text: str) -> list[str | int]:
        """Ordinary text (unescaped) and special tokens (ids), in order; no empty text."""
        parts: list[str | int] = []
        run: list[str] = []
        position = 0
        for match in self._scanner.finditer(text):
            if match.start() < position:  # inside white space that a token has taken
                continue
            run.append(text[position : match.start()])
            position = match.end()
            if match.lastgroup == "literal":
                run.append(match["literal"])
                continue
            token = self.ids[match["special"]]
            before, run = "".join(run), []
            before = before.rstrip() if token in self._lstrip else before
            parts += [before, token] if before else [token]
            while token in self._rstrip and text[position : position + 1].isspace():
                position += 1
        rest = "".join(run) + text[position:]
        return parts + [rest] if rest else parts
