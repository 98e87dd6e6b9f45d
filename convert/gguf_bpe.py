"""Byte-level BPE of GGUF metadata as a tokenizer.json; also BPE over text with bytes beside it, as Gemma 4 has it."""

from __future__ import annotations

import json
from typing import Any

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields, shown
from kvrun.convert.gguf_vocabulary import SPECIAL, GgufVocabulary
from kvrun.convert.pre_tokenizers import DEFAULT, GEMMA4, LLAMA3, PRE_TOKENIZERS, PreTokenizer
from kvrun.convert.sentencepiece_model import SPACE
from kvrun.text.backends import refusal
from kvrun.text.sentencepiece_file import USER_DEFINED

_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|eot_id|>")
# What llama.cpp takes if the metadata do not say: it is Falcon's token.
_DEFAULT_IDS = {"bos": 11, "eos": 11}


def byte_level(ggml: Fields) -> Vocabulary:
    """`tokenizer.ggml.model` "gpt2"."""
    vocabulary = GgufVocabulary(ggml, _DEFAULT_IDS)
    rules = PRE_TOKENIZERS[_pre_tokenizer_name(vocabulary)]
    if not rules.has_bos:
        vocabulary.defaults = {"eos": _DEFAULT_IDS["eos"]}
    return _bpe(vocabulary, rules)


def gemma4(ggml: Fields) -> Vocabulary:
    """`tokenizer.ggml.model` "gemma4"."""
    return _bpe(GgufVocabulary(ggml, {}), PRE_TOKENIZERS[GEMMA4])


def _bpe(vocabulary: GgufVocabulary, rules: PreTokenizer) -> Vocabulary:
    info = vocabulary.info(rules.add_bos, False)
    if rules is PRE_TOKENIZERS[GEMMA4] and not info["add_bos"] and info["bos_id"] is not None:
        # Gemma 4 fails without; some of its files say otherwise.
        info["add_bos"] = True
        vocabulary.notes.append("BOS is put before a text although the file says otherwise: Gemma 4 needs it")
    spec = _tokenizer_json(vocabulary, _merges(vocabulary), rules, info)
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        vocabulary.ggml.fail("tokens", "not valid UTF-8")
    _check(vocabulary.ggml, data)
    ends, notes = tuple(vocabulary.ends()), tuple(vocabulary.notes)
    return Vocabulary("tokenizer.json", data, info, vocabulary.special(), notes, ends, len(vocabulary))


def _check(ggml: Fields, data: bytes) -> None:
    """The library itself finds what else may be wrong."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_buffer(data)
    except BaseException as error:
        ggml.fail("model", f"the tokenizer cannot be built: {refusal(error)}")


def _pre_tokenizer_name(vocabulary: GgufVocabulary) -> str:
    name: str = vocabulary.ggml.text("pre", "") or DEFAULT
    if name not in PRE_TOKENIZERS:
        vocabulary.ggml.fail("pre", f"pre-tokenizer {shown(name)} is unknown; docs/models.md lists the known ones")
    if name != DEFAULT:
        return name
    if set(_LLAMA3_TOKENS) <= set(vocabulary.texts):
        vocabulary.notes.append(f"no pre-tokenizer is named; by its tokens it is Llama 3's ({LLAMA3})")
        return LLAMA3
    vocabulary.notes.append(
        "no pre-tokenizer is named: text is cut by llama.cpp's default rules, which may not be the model's;"
        " a newer GGUF file of the model is better"
    )
    return name


def _merges(vocabulary: GgufVocabulary) -> list[str] | list[list[str]]:
    known, merges, plain = set(vocabulary.texts), [], True
    for merge in vocabulary.list_of_texts("merges", empty=True):
        # The second part begins after the first space that is not the first character.
        cut = merge.find(" ", 1)
        pair = [merge[:cut], merge[cut + 1 :]]
        if cut < 0 or any(part not in known for part in (*pair, "".join(pair))):
            reason = f"{merge[:60]!r} joins tokens that the vocabulary does not have"
            return vocabulary.ggml.fail("merges", reason)
        merges.append(pair)
        plain = plain and " " not in pair[0] and " " not in pair[1]
    # A pair written as one string is parsed faster, where it means the same.
    return [" ".join(pair) for pair in merges] if plain else merges


def _tokenizer_json(
    vocabulary: GgufVocabulary, merges: list[Any], rules: PreTokenizer, info: dict[str, Any]
) -> dict[str, Any]:
    names = vocabulary.texts
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, names[i], kind in SPECIAL)
            for i, kind in enumerate(vocabulary.types)
            if kind in SPECIAL or kind == USER_DEFINED
        ],
        "normalizer": rules.normalizer(),
        "pre_tokenizer": rules.json(),
        "post_processor": _post_processor(names, info),
        "decoder": _decoder(rules),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if rules.byte_letters or info["unk_id"] is None else names[info["unk_id"]],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": not rules.byte_letters,
            "byte_fallback": not rules.byte_letters,
            "ignore_merges": rules.ignore_merges,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }


def _added_token(token: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, **flags, "special": special}


def _decoder(rules: PreTokenizer) -> dict[str, Any]:
    if rules.byte_letters:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]}


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
