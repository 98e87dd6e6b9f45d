"""The ids of one short text from byte-level BPE, without building the whole tokenizer.

Building it takes most of the time to a first token: every merge of the vocabulary is looked up and stored.
But a text can only give tokens whose own text occurs in it, so a tokenizer with just these tokens, and the merges
that make them, gives the same ids. For a short prompt these are a few hundred.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

LONGEST = 2000
"""The longest text, in characters, for which this is still faster."""

_WITH_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_KEPT_APART = "\0"  # no character of a byte-level token


class PrunedBpe:
    """Byte-level BPE of a parsed tokenizer.json, cut down for each text. `build` makes a tokenizer from JSON."""

    def __init__(self, spec: dict[str, Any], build: Callable[[bytes], Any]) -> None:
        self._head, self._model, self._build = spec, spec["model"], build
        self._vocab: dict[str, int] = self._model["vocab"]
        self._added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        # Characters that the vocabulary lacks are dropped, so that their neighbours become adjacent.
        alphabet = [c for c in byte_characters() if c in self._vocab]
        self._characters = self._tokenizer({c: i for i, c in enumerate(alphabet)}, [], unk_token=None)

    def ids(self, text: str) -> list[int]:
        tokens = self._within(text)
        unknown = self._model.get("unk_token")
        if unknown is not None and unknown in self._vocab:
            tokens.add(unknown)
        numbered = {token: i for i, token in enumerate(tokens)}
        small = self._tokenizer(numbered, self._merges(tokens))
        original = {i: self._vocab[token] for token, i in numbered.items()}
        original |= {small.token_to_id(token): i for token, i in self._added.items()}
        return [original[i] for i in small.encode(text, add_special_tokens=False).ids]

    def _within(self, text: str) -> set[str]:
        """The tokens whose text occurs in `text`, which has been normalised and split into words."""
        encoding = self._characters.encode(text, add_special_tokens=False)
        added = self._added
        mapped = "".join(_KEPT_APART if token in added else token for token in encoding.tokens)
        return {token for token in self._vocab if token in mapped}

    def _merges(self, tokens: set[str]) -> list[Any]:
        """The merges that join two of these tokens to a third, in their order."""
        merges = self._model["merges"]
        if merges and not isinstance(merges[0], str):
            return [m for m in merges if m[0] + m[1] in tokens and m[0] in tokens and m[1] in tokens]
        wanted = {
            f"{token[:i]} {token[i:]}"
            for token in tokens
            for i in range(1, len(token))
            if token[:i] in tokens and token[i:] in tokens
        }
        return [merge for merge in merges if merge in wanted]

    def _tokenizer(self, vocab: dict[str, int], merges: list[Any], **changed: Any) -> Any:
        model = {**self._model, "vocab": vocab, "merges": merges, **changed}
        return self._build(as_json({**self._head, "model": model}))


def as_json(spec: dict[str, Any]) -> bytes:
    """A tokenizer.json; half a character in it is left to the library, which refuses it."""
    return json.dumps(spec, ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_prunable(data: bytes) -> dict[str, Any] | None:
    """The parsed tokenizer.json if `PrunedBpe` can use it, else None. Raises ValueError if it is not valid JSON."""
    # The vocabulary comes last and is most of the file, so other kinds are recognised without parsing it.
    if b"ByteLevel" not in data[: max(data.find(b'"vocab"'), 0)]:
        return None
    try:
        spec = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return spec if _is_prunable(spec) else None


def check_prefix(data: bytes) -> None:
    """Raise ValueError if merges of a tokenizer.json lack the prefix that it says words go on with: the library cuts it
    off unseen, and where that is within a character it aborts the process."""
    if not _WITH_PREFIX.search(data):  # as nearly all
        return
    try:
        model = json.loads(data)["model"]
        prefix, merges = model["continuing_subword_prefix"], model.get("merges") or ()
        fit = all((m.split(" ", 1) if isinstance(m, str) else m)[1].startswith(prefix) for m in merges)
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError):  # which the library can say itself
        return
    if not fit:
        raise ValueError("its merges are not of parts that begin with continuing_subword_prefix")


def _is_prunable(spec: Any) -> bool:
    try:
        model, vocab = spec["model"], spec["model"]["vocab"]
        steps = spec["pre_tokenizer"].get("pretokenizers") or [spec["pre_tokenizer"]]
        kinds = [step["type"] for step in steps]
        merges, n = model["merges"], len(vocab)
        for token in spec.get("added_tokens") or []:
            # The library numbers added tokens itself, starting at the end of the vocabulary.
            if token["id"] != vocab.get(token["content"], n):
                return False
            n += token["content"] not in vocab
        return (
            model.get("type") == "BPE"
            and not any(model.get(key) for key in ("dropout", "byte_fallback"))
            and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
            # Numbered in order, as the library writes it, so that the tokens are a list.
            and list(vocab.values()) == list(range(len(vocab)))
            and isinstance(merges, list)
            # Words are in the alphabet of bytes when the last step is done, and no step drops any text.
            and kinds[-1] == "ByteLevel"
            and set(kinds) <= {"ByteLevel", "Split", "Digits"}
            and spec["decoder"]["type"] == "ByteLevel"
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def byte_characters() -> dict[str, int]:
    """GPT-2's map: printable Latin-1 characters are their own byte, the other bytes U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
