"""Tokenizers rebuilt from GGUF metadata.

"gpt2" is byte-level BPE: a tokenizer.json, from vocabulary and merges. "llama" (BPE by scores) and "t5"
(Unigram) are SentencePiece's: a tokenizer.model, from the pieces.
"""

from __future__ import annotations

import json
from typing import Any

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields, shown
from kvrun.convert.sentencepiece_model import (
    BPE,
    BYTE,
    BYTE_PIECES,
    CONTROL,
    NORMAL,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Normalizer,
    model_bytes,
)

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(ending: str, digits: str) -> str:
    """Words are split where a capital follows a small letter; each may have `ending`. `digits` matches numbers."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_TEKKEN_WORDS = _cased_words("", r"\p{N}")
_GPT4O_WORDS = _cased_words("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_GPT2 = {"pre_tokenizer": _byte_level(True)}
_SMOLLM = {"pre_tokenizer": _steps({"type": "Digits", "individual_digits": True}, _byte_level(True))}
_LLAMA3_SPLIT = {"pre_tokenizer": _steps(_split(_LLAMA3_WORDS), _byte_level(False))}
_LLAMA3 = {**_LLAMA3_SPLIT, "ignore_merges": True, "add_bos": True}
_QWEN2_SPLIT = {"pre_tokenizer": _steps(_split(_QWEN2_WORDS), _byte_level(False))}
_QWEN2 = {**_QWEN2_SPLIT, "normalizer": {"type": "NFC"}}
_GPT4O = {"pre_tokenizer": _steps(_split(_GPT4O_WORDS), _byte_level(False))}
_TEKKEN = {
    "pre_tokenizer": _steps(_split(_TEKKEN_WORDS), _byte_level(False)),
    "ignore_merges": True,
    "add_bos": True,
}

# tokenizer.ggml.pre -> how text is split into words, and what else this name implies.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "granite-docling": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _LLAMA3_SPLIT,
    "smaug-bpe": _LLAMA3_SPLIT,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "gpt-4o": _GPT4O,
    "tekken": _TEKKEN,
}
# tokenizer.ggml.model -> SentencePiece's kind, and its defaults if the metadata say nothing else:
# whether a space is put before a text, BOS before it, EOS after it.
_SENTENCEPIECE = {"llama": (BPE, True, True, False), "t5": (UNIGRAM, True, False, True)}
_LARGEST_SCORE = 3e38  # they are float32
# Phi-3's tokens that do not strip the white space after them, which the metadata cannot express.
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def read_tokenizer(meta: Fields) -> Vocabulary:
    """The tokenizer of a GGUF file. Raises ConvertError if its kind or pre-tokenizer is not supported."""
    ggml = meta.under("tokenizer.ggml.")
    kind = ggml.text("model", None)
    if kind is None:
        ggml.fail("model", "missing: the file has no tokenizer")
    if kind in _SENTENCEPIECE:
        return _sentencepiece(ggml, kind, strips=meta.text("general.architecture", "") == "phi3")
    if kind != "gpt2":
        known = ", ".join(("gpt2", *_SENTENCEPIECE))
        ggml.fail("model", f"not supported yet: tokenizer {shown(kind)} (supported: {known})")
    pre = ggml.text("pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        ggml.fail("pre", f"not supported yet: pre-tokenizer {shown(pre)} (supported: {known})")
    tokens = _texts(ggml, "tokens")
    types = _types(ggml, len(tokens))
    rules = PRE_TOKENIZERS[pre]
    info = _info(ggml, len(tokens), rules.get("add_bos", False), False)
    names = _unique(tokens)
    text = json.dumps(
        _tokenizer_json(names, types, _merges(ggml, names), rules, info),
        ensure_ascii=False,
        separators=(",", ":"),
    )
    special = {names[i]: i for i, type in enumerate(types) if type in (CONTROL, UNKNOWN)}
    return Vocabulary("tokenizer.json", _encoded(ggml, text), info, special)


def _info(ggml: Fields, size: int, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    """Ids of named tokens, and whether BOS and EOS are put around a text; the defaults apply if the metadata
    do not say."""
    info: dict[str, Any] = {
        "add_bos": ggml.flag("add_bos_token", add_bos),
        "add_eos": ggml.flag("add_eos_token", add_eos),
        "bos_id": _id(ggml, "bos_token_id", size),
        "eos_id": _id(ggml, "eos_token_id", size),
        "pad_id": _id(ggml, "padding_token_id", size),
        "unk_id": _id(ggml, "unknown_token_id", size),
    }
    for name in ("bos", "eos"):
        if info[f"{name}_id"] is None:
            info[f"add_{name}"] = False
    return info


def _types(ggml: Fields, size: int) -> list[int]:
    types = ggml.get("token_type", [NORMAL] * size)
    if not isinstance(types, list) or len(types) != size or not all(type(kind) is int for kind in types):
        ggml.fail("token_type", "not one integer for each token")
    return types


# --- SentencePiece


def _sentencepiece(ggml: Fields, name: str, strips: bool) -> Vocabulary:
    kind, dummy_prefix, add_bos, add_eos = _SENTENCEPIECE[name]
    tokens = _texts(ggml, "tokens")
    scores = ggml.get("scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(type(score) in (int, float) and abs(score) < _LARGEST_SCORE for score in scores)
    ):
        ggml.fail("scores", "missing, or not one number for each token")
    info = _info(ggml, len(tokens), add_bos, add_eos)
    types = _piece_types(ggml, tokens, info)
    texts = [
        # A token without text cannot occur in a text, but must keep its id.
        (text or f"[EMPTY {i}]").replace(" ", SPACE) if type == USER_DEFINED else text or f"[EMPTY {i}]"
        for i, (text, type) in enumerate(zip(tokens, types))
    ]
    names = _unique(texts)
    types = [type if new == old else UNUSED for type, new, old in zip(types, names, texts)]
    ids = {key: info[f"{key}_id"] for key in ("unk", "bos", "eos", "pad")}
    normalizer = Normalizer(
        ggml.flag("add_space_prefix", dummy_prefix),
        ggml.flag("remove_extra_whitespaces", False),
        _charsmap(ggml),
    )
    try:
        data = model_bytes(list(zip(names, scores, types)), kind, ids, normalizer)
    except UnicodeEncodeError:
        return ggml.fail("tokens", "not valid UTF-8")
    special = {names[i]: i for i, type in enumerate(types) if type in (CONTROL, UNKNOWN)}
    info |= {"added_tokens": {}, "legacy": True}
    if strips:
        info["rstrip"] = [i for text, i in special.items() if text not in _PHI3_KEEPS]
    return Vocabulary("tokenizer.model", data, info, special)


def _piece_types(ggml: Fields, tokens: list[str], info: dict[str, Any]) -> list[int]:
    """Types as SentencePiece wants them: one unknown token, and either all byte pieces or none."""
    types = _types(ggml, len(tokens))
    if not all(type in range(NORMAL, BYTE + 1) for type in types):
        ggml.fail("token_type", f"not all are from {NORMAL} to {BYTE}")
    unknown = info["unk_id"]
    if unknown is None:
        unknown = next((i for i, type in enumerate(types) if type == UNKNOWN), None)
    if unknown is None:
        return ggml.fail("unknown_token_id", "missing, and no token is of the unknown type")
    info["unk_id"] = unknown
    found = {text for text, type in zip(tokens, types) if type == BYTE}
    if found and found != BYTE_PIECES:
        ggml.fail("tokens", f"{len(found & BYTE_PIECES)} of the 256 byte tokens (<0x00> to <0xFF>)")
    types = [CONTROL if type == UNKNOWN else type for type in types]
    types[unknown] = UNKNOWN
    return types


def _charsmap(ggml: Fields) -> bytes:
    values = ggml.get("precompiled_charsmap", [])
    if not isinstance(values, list) or not all(type(v) is int and -128 <= v < 256 for v in values):
        return ggml.fail("precompiled_charsmap", "not a list of bytes")
    return bytes(value & 0xFF for value in values)


# --- byte-level BPE


def _texts(ggml: Fields, name: str) -> list[str]:
    values = ggml.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return ggml.fail(name, "missing, or not a list of texts")
    return values


def _id(ggml: Fields, name: str, size: int) -> int | None:
    token = ggml.integer(name, None, minimum=0)
    return token if token is not None and token < size else None


def _unique(tokens: list[str]) -> list[str]:
    """A text can stand for one token only, so later tokens with the same text get one that never occurs."""
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        first.setdefault(token, i)
    return [token if first[token] == i else f"[DUPLICATE {i}]" for i, token in enumerate(tokens)]


def _merges(ggml: Fields, names: list[str]) -> list[str] | list[list[str]]:
    known, merges, plain = set(names), [], True
    for merge in _texts(ggml, "merges"):
        # The second part begins after the first space that is not the first character.
        cut = merge.find(" ", 1)
        pair = [merge[:cut], merge[cut + 1 :]]
        if cut < 0 or any(part not in known for part in (*pair, "".join(pair))):
            return ggml.fail("merges", f"{merge[:60]!r} joins tokens that the vocabulary does not have")
        merges.append(pair)
        plain = plain and " " not in pair[0] and " " not in pair[1]
    # A pair written as one string is parsed faster, where it means the same.
    return [" ".join(pair) for pair in merges] if plain else merges


def _encoded(ggml: Fields, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return ggml.fail("tokens", "not valid UTF-8")


def _tokenizer_json(
    names: list[str], types: list[int], merges: list[Any], rules: dict[str, Any], info: dict[str, Any]
) -> dict[str, Any]:
    added = [
        {
            "id": i,
            "content": names[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": type != USER_DEFINED,
        }
        for i, type in enumerate(types)
        if type in (CONTROL, UNKNOWN, USER_DEFINED) and names[i]
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
    """Puts BOS and EOS around a text, so that the tokenizers library alone does it too."""
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
            names[token]: {"id": names[token], "ids": [token], "tokens": [names[token]]} for token in before + after
        },
    }
