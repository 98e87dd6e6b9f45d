"""Text to token ids and back, from the tokenizer stored in the model file.

`tokenizer.json` runs in the tokenizers library and `tokenizer.model` in SentencePiece, both imported when a
tokenizer is built. What is added here: special tokens only where they are meant, the bytes of every token,
and decoding of a stream.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from kvrun.errors import TokenizerError
from kvrun.text.special_tokens import CONTINUED, ESCAPE, INNER, START, SpecialTokens
from kvrun.text.streaming import StreamDecoder


class Tokenizer:
    """The tokenizer of a model. Safe to share between threads.

    `info` is the model file's tokenizer entry: `kind`, `add_bos`, `add_eos`, `bos_id`, `eos_id`, and for
    `tokenizer.model` optionally `added_tokens` ({text: id}), `legacy` (dummy space after special tokens
    too, the default) and `space_is_dummy` (none before text that begins with a space). `data` is the
    tokenizer file. `vocab_size` is the model's (0: the tokenizer's), which may be
    larger than the tokenizer's: the other ids have no text. If it is smaller, the tokens beyond it are left out, and
    their text is made of other tokens. `stop_ids` count as special even where the checkpoint does not say so. Raises
    TokenizerError if it cannot be built.
    """

    def __init__(
        self,
        info: Mapping[str, Any],
        data: bytes | memoryview,
        vocab_size: int = 0,
        stop_ids: Iterable[int] = (),
    ) -> None:
        kind = info.get("kind")
        if kind not in ("tokenizer.json", "tokenizer.model"):
            raise TokenizerError(f"unknown kind of tokenizer: {kind}")
        from kvrun.text.backends import JsonBackend, SentencePieceBackend

        backend: type[JsonBackend] | type[SentencePieceBackend]
        backend = JsonBackend if kind == "tokenizer.json" else SentencePieceBackend
        self.bos_id: int | None = info.get("bos_id")
        self.eos_id: int | None = info.get("eos_id")
        self._before = [self.bos_id] if info.get("add_bos") and self.bos_id is not None else []
        self._after = [self.eos_id] if info.get("add_eos") and self.eos_id is not None else []
        self._backend = backend(bytes(data), info, list(stop_ids), vocab_size or sys.maxsize)
        self.special: SpecialTokens = self._backend.special
        self._special_ids = frozenset(self.special.ids.values())
        self.vocab_size = max(vocab_size, self._backend.size)

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True, *, continued: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        `add_special` adds the tokens that the checkpoint puts before and after a text (BOS, EOS).
        `parse_special`: the text of a special token becomes that token; otherwise it stays ordinary text.
        `continued`: the text continues other text, so no dummy space is put before it. Raises TokenizerError
        for text that UTF-8 cannot encode.
        """
        _check_text(text)
        if continued and self._backend.dummy_space:
            ids = self._encode_parts(self.special.split(_escape_escapes(text)) if parse_special else [text], True)
        elif parse_special:
            parsed = self._backend.encode_parsed(text)
            ids = self._encode_parts(self.special.split(_escape_escapes(text)), False) if parsed is None else parsed
        else:
            ids = self._encode_parts([text], continued)
        return self._before + ids + self._after if add_special else ids

    def encode_escaped(self, text: str, *, continued: bool = False) -> list[int]:
        """Token ids of a text with special tokens in which `special.escape` has marked what is ordinary."""
        _check_text(text)
        if ESCAPE not in text:
            return self.encode(text, add_special=False, continued=continued)
        return self._encode_parts(self.special.split(text), continued)

    def _encode_parts(self, parts: Iterable[str | int], continued: bool) -> list[int]:
        ids: list[int] = []
        where = CONTINUED if continued else START
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._backend.encode_run(part, where, self.special.found_in(part))
            where = INNER
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids` together; bytes that are not UTF-8 become U+FFFD. TokenizerError for an unknown id."""
        try:
            each = iter(ids)
        except TypeError:
            raise TokenizerError(f"token ids must be a list of integers, not {type(ids).__name__}") from None
        return self._backend.decode([self._check_id(i) for i in each], skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for: its text if it is special, b"" if the id has no text."""
        return self._backend.piece(self._check_id(token), False)

    def first_difference(self, other: Tokenizer) -> int | None:
        """The first id that stands for other bytes than in another tokenizer, or only in one of them for any; None if
        all are the same."""
        sizes = self.vocab_size, other.vocab_size

        def text(tokenizer: Tokenizer, token: int) -> bytes:
            return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""

        return next((i for i in range(max(sizes)) if text(self, i) != text(other, i)), None)

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def stream(
        self, *, skip_special: bool = True, start: bool = True, shown: frozenset[int] = frozenset()
    ) -> StreamDecoder:
        """A decoder for ids that arrive one by one. `start`: they begin a text (see `StreamDecoder`). `shown`: special
        tokens whose text is wanted nevertheless."""
        return self._backend.stream(skip_special, start, self._check_id, shown)

    def _check_id(self, token: Any) -> int:
        try:
            if isinstance(token, bool):
                raise TypeError
            number = operator.index(token)
        except TypeError:
            raise TokenizerError(f"a token id must be an integer, not {type(token).__name__}") from None
        if not 0 <= number < self.vocab_size:
            raise TokenizerError(f"token id {number} is outside the vocabulary (0 to {self.vocab_size - 1})")
        return number


def _escape_escapes(text: str) -> str:
    return text.replace(ESCAPE, ESCAPE + ESCAPE)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text that is not valid Unicode: a lone surrogate (U+{ord(text[error.start]):04X}) "
            f"at character {error.start + 1}"
        ) from None
