"""Tokens, their types and ids in GGUF metadata, put right where a file is known to be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvrun.convert.fields import Fields
from kvrun.convert.token_ids import note_of_ends, token_id, undeclared_ends
from kvrun.text.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED

SPECIAL = (CONTROL, UNKNOWN)
_NAMED = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# Further tokens that end a turn or, between files of code, a text.
_ENDS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_ENDS_OF_CODE = (
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "<|file_sep|>",
)


class GgufVocabulary:
    """`texts` (no two the same, none empty), `types` and `notes` of a file's tokens.

    Tokens that are known to end a turn are of the type CONTROL, whatever the file says. Raises ConvertError if an
    array is missing, or is not what it should be.
    """

    def __init__(self, ggml: Fields) -> None:
        self.ggml = ggml
        self.notes: list[str] = []
        tokens = self.list_of_texts("tokens")
        self.texts = unique([text or f"[EMPTY {i}]" for i, text in enumerate(tokens)])
        self.types = self._read_types()
        for i, (old, new) in enumerate(zip(tokens, self.texts)):
            if old and old != new:
                self.types[i] = UNUSED
        self._make_ends_special()

    def __len__(self) -> int:
        return len(self.texts)

    def list_of_texts(self, name: str, empty: bool = False) -> list[str]:
        values = self.ggml.get(name)
        if not isinstance(values, list) or not (values or empty) or not all(isinstance(v, str) for v in values):
            return self.ggml.fail(name, "missing, or not a list of texts")
        return values

    def _read_types(self) -> list[int]:
        types = self.ggml.get("token_type", [NORMAL] * len(self))
        if not isinstance(types, list) or len(types) != len(self) or not all(type(kind) is int for kind in types):
            self.ggml.fail("token_type", "not one integer for each token")
        other = sum(kind not in range(NORMAL, BYTE + 1) for kind in types)
        if other:
            self.notes.append(f"{other} tokens of unknown types: taken for ordinary text")
        return [kind if kind in range(NORMAL, BYTE + 1) else NORMAL for kind in types]

    def _make_ends_special(self) -> None:
        ids = {text: i for i, text in enumerate(self.texts)}
        ends = undeclared_ends(ids, self.special())
        for text in ends:
            self.types[ids[text]] = CONTROL
        if ends:
            self.notes.append(note_of_ends(ends))

    def special(self) -> dict[str, int]:
        """Ids of the special tokens by text."""
        return {self.texts[i]: i for i, kind in enumerate(self.types) if kind in SPECIAL}

    def info(self, defaults: Mapping[str, int], add_bos: bool, add_eos: bool) -> dict[str, Any]:
        """Ids of named tokens, and whether BOS and EOS are put around a text; `add_bos` and `add_eos` apply if the
        metadata do not say. `defaults`: ids that such a vocabulary has if the metadata have none, for tokens that
        are special."""
        info: dict[str, Any] = {
            "add_bos": self.ggml.flag("add_bos_token", add_bos),
            "add_eos": self.ggml.flag("add_eos_token", add_eos),
        }
        for name, theirs in _NAMED.items():
            info[f"{name}_id"] = self._named_id(f"{theirs}_token_id", defaults.get(name))
        for name in ("bos", "eos"):
            if info[f"{name}_id"] is None:
                info[f"add_{name}"] = False
        return info

    def _named_id(self, key: str, default: int | None) -> int | None:
        token = token_id(self.ggml, key)
        if token is not None and token >= len(self):
            self.notes.append(f"{key} is {token}, but there are {len(self)} tokens: ignored")
        elif token is not None or key in self.ggml:
            return token
        return default if default is not None and default < len(self) and self.types[default] in SPECIAL else None

    def ends(self) -> list[int]:
        """Ids that the metadata give for tokens that end a turn or a text, and of those that end a file of code."""
        named = [self._named_id(f"{name}_token_id", None) for name in _ENDS]
        special = self.special()
        return [i for i in named if i is not None] + [special[text] for text in _ENDS_OF_CODE if text in special]


def unique(tokens: list[str]) -> list[str]:
    """A text can stand for one token only, so later tokens with the same text get one that never occurs."""
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        first.setdefault(token, i)
    return [token if first[token] == i else f"[DUPLICATE {i}]" for i, token in enumerate(tokens)]
