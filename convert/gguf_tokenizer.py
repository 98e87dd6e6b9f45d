"""A tokenizer.json rebuilt from the vocabulary and merges in GGUF metadata (byte-level BPE)."""

from __future__ import annotations

import json
from typing import Any

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_GPT2 = {"pre_tokenizer": _byte_level(True)}
_SMOLLM = {"pre_tokenizer": _steps({"type": "Digits", "individual_digits": True}, _byte_level(True))}
_LLAMA3 = {
    "pre_tokenizer": _steps(_split(_LLAMA3_WORDS), _byte_level(False)),
    "ignore_merges": True,
    "add_bos": True,
}
_QWEN2 = {"pre_tokenizer": _steps(_split(_QWEN2_WORDS), _byte_level(False)), "normalizer": {"type": "NFC"}}

# tokenizer.ggml.pre -> how text is cut into words, and what the metadata leaves to that name.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}


def read_tokenizer(meta: Fields) -> Vocabulary:
    """The tokenizer of a GGUF file. ConvertError for a kind or a pre-tokenizer that is not supported."""
    ggml = meta.under("tokenizer.ggml.")
    kind = ggml.text("model", None)
    if kind is None:
        ggml.fail("model", "missing: the file has no tokenizer")
    if kind != "gpt2":
        ggml.fail("model", f"not supported yet: tokenizer {kind!r} (supported: gpt2, byte-level BPE)")
    pre = ggml.text("pre", "default")
    if pre not in PRE_TOKENIZERS:
        ggml.fail("pre", f"not supported yet: pre-tokenizer {pre!r} (supported: {', '.join(PRE_TOKENIZERS)})")
    tokens = _texts(ggml, "tokens")
    types = ggml.get("token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        ggml.fail("token_type", "not as many as tokens")
    rules = PRE_TOKENIZERS[pre]
    info: dict[str, Any] = {
        "add_bos": ggml.flag("add_bos_token", rules.get("add_bos", False)),
        "add_eos": ggml.flag("add_eos_token", False),
        "bos_id": _id(ggml, "bos_token_id", len(tokens)),
        "eos_id": _id(ggml, "eos_token_id", len(tokens)),
        "pad_id": _id(ggml, "padding_token_id", len(tokens)),
        "unk_id": _id(ggml, "unknown_token_id", len(tokens)),
    }
    for name in ("bos", "eos"):
        if info[f"{name}_id"] is None:
            info[f"add_{name}"] = False
    names = _unique(tokens)
    text = json.dumps(_tokenizer_json(names, types, _merges(ggml, names), rules, info), ensure_ascii=False)
    special = {names[i]: i for i, type in enumerate(types) if type in (_CONTROL, _UNKNOWN)}
    return Vocabulary("tokenizer.json", _encoded(ggml, text), info, special)


def _texts(ggml: Fields, name: str) -> list[str]:
    values = ggml.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return ggml.fail(name, "missing, or not a list of texts")
    return values


def _id(ggml: Fields, name: str, size: int) -> int | None:
    token = ggml.integer(name, None, minimum=0)
    return token if token is not None and token < size else None


def _unique(tokens: list[str]) -> list[str]:
    """A text can name one token only, so later ones of the same text get a name that no text produces."""
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        first.setdefault(token, i)
    return [token if first[token] == i else f"[DUPLICATE {i}]" for i, token in enumerate(tokens)]


def _merges(ggml: Fields, names: list[str]) -> list[list[str]]:
    known, merges = set(names), []
    for merge in _texts(ggml, "merges"):
        # The second part begins after the first space that is not the first character.
        cut = merge.find(" ", 1)
        pair = [merge[:cut], merge[cut + 1 :]]
        if cut < 0 or any(part not in known for part in (*pair, "".join(pair))):
            return ggml.fail("merges", f"{merge[:60]!r} joins tokens that the vocabulary does not have")
        merges.append(pair)
    return merges


def _encoded(ggml: Fields, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return ggml.fail("tokens", "not valid UTF-8")


def _tokenizer_json(
    names: list[str], types: list[int], merges: list[list[str]], rules: dict[str, Any], info: dict[str, Any]
) -> dict[str, Any]:
    added = [
        {
            "id": i,
            "content": names[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": type != _USER_DEFINED,
        }
        for i, type in enumerate(types)
        if type in (_CONTROL, _UNKNOWN, _USER_DEFINED) and names[i]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rules.get("normalizer"),
        "pre_tokenizer": rules["pre_tokenizer"],
        "post_processor": _post_processor(names, info),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.get("ignore_merges", False),
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }


def _post_processor(names: list[str], info: dict[str, Any]) -> dict[str, Any] | None:
    """Puts BOS and EOS around a text, so that the tokenizers library does so by itself too."""
    before = [info["bos_id"]] if info["add_bos"] else []
    after = [info["eos_id"]] if info["add_eos"] else []
    if not before and not after:
        return None

    def special(token: int, side: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": names[token], "type_id": side}}

    def template(*letters: str) -> list[dict[str, Any]]:
        return [
            part
            for side, letter in enumerate(letters)
            for part in (
                *(special(token, side) for token in before),
                {"Sequence": {"id": letter, "type_id": side}},
                *(special(token, side) for token in after),
            )
        ]

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {
            names[token]: {"id": names[token], "ids": [token], "tokens": [names[token]]}
            for token in before + after
        },
    }
