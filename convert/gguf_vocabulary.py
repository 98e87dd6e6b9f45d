"""Tokens, their types and ids in GGUF metadata, put right where a file is known to be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvrun.convert.fields import Fields
from kvrun.convert.token_ids import ENDS, note_of_ends, token_id, undeclared_ends
from kvrun.text.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED

SPECIAL = (CONTROL, UNKNOWN)
_NAMED = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# Of code: tokens that end a file, and those around its parts when one is to be filled in.
_ENDS_OF_CODE = (
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "<|file_sep|>",
)
_PARTS_OF_CODE = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>"),
    *("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", "<|prefix|>", "<|suffix|>", "<|middle|>"),
)


class GgufVocabulary:
    """`texts` (no two the same, none empty), `types` and `notes` of a file's tokens.

    Tokens that are known to end a turn are of the type CONTROL, whatever the file says. Raises ConvertError if an
    array is missing, or is not what it should be. `defaults`: ids of "bos", "eos", "pad" and "unk" that such a
    vocabulary has if the metadata name none and the token may be that.
    """

    def __init__(self, ggml: Fields, defaults: Mapping[str, int]) -> None:
        self.ggml = ggml
        self.defaults = defaults
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
        special = self.special()
        named = [token_id(self.ggml, f"{name}_token_id") for name in ("eos", "eot", "eom")]
        if "eos_token_id" not in self.ggml:
            named.append(self.defaults.get("eos"))
        texts = {self.texts[i] for i in named if i is not None and i < len(self)}
        ends = {*undeclared_ends(ids, special), *(text for text in texts if text in ENDS and text not in special)}
        parts = [text for text in (*_ENDS_OF_CODE, *_PARTS_OF_CODE) if text in ids and text not in special]
        for text in (*ends, *parts):
            self.types[ids[text]] = CONTROL
        if ends:
            self.notes.append(note_of_ends(ends))
        if parts:
            self.notes.append(f"special although the file does not say so: {', '.join(parts)}")

    def special(self) -> dict[str, int]:
        """Ids of the special tokens by text."""
        return {self.texts[i]: i for i, kind in enumerate(self.types) if kind in SPECIAL}

    def info(self, add_bos: bool, add_eos: bool) -> dict[str, Any]:
        """Ids of named tokens, and whether BOS and EOS are put around a text; `add_bos` and `add_eos` apply if the
        metadata do not say."""
        info: dict[str, Any] = {
            "add_bos": self.ggml.flag("add_bos_token", add_bos),
            "add_eos": self.ggml.flag("add_eos_token", add_eos),
        }
        for name, theirs in _NAMED.items():
            info[f"{name}_id"] = self._named_id(f"{theirs}_token_id", self.defaults.get(name))
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
        return default if default is not None and self._may_be_named(default) else None

    def _may_be_named(self, token: int) -> bool:
        """Whether it can be the token that usually has this number: it is special, or is written like that."""
        if token >= len(self):
            return False
        text = self.texts[token]
        return self.types[token] in SPECIAL or (text.startswith("<") and text.endswith(">") and len(text) > 2)

    def ends(self) -> list[int]:
        """Ids of the tokens that the metadata or their texts say end a turn or a file of code."""
        keys = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
        named = [self._named_id(f"{name}_token_id", None) for name in keys]
        special = self.special()
        return [i for i in named if i is not None] + [special[text] for text in _ENDS_OF_CODE if text in special]


def unique(tokens: list[str]) -> list[str]:
    """A text can stand for one token only, so later tokens with the same text get one that never occurs."""
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        first.setdefault(token, i)
    return [token if first[token] == i else f"[DUPLICATE {i}]" for i, token in enumerate(tokens)]
