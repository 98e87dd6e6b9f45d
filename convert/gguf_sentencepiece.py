"""SentencePiece's tokenizers of GGUF metadata as a tokenizer.model: "llama" is BPE by scores, "t5" is Unigram."""

from __future__ import annotations

from typing import Any

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields
from kvrun.convert.gguf_vocabulary import GgufVocabulary, unique
from kvrun.convert.sentencepiece_model import BPE, BYTE_PIECES, SPACE, UNIGRAM, Normalizer, model_bytes
from kvrun.text.sentencepiece_file import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED

# tokenizer.ggml.model -> SentencePiece's kind, and llama.cpp's defaults if the metadata say nothing else: whether a
# space is put before a text, BOS before it, EOS after it, and the ids of named tokens.
KINDS: dict[str, tuple[int, bool, bool, bool, dict[str, int]]] = {
    "llama": (BPE, True, True, False, {"bos": 1, "eos": 2, "unk": 0}),
    "t5": (UNIGRAM, False, False, True, {"eos": 1, "unk": 2, "pad": 0}),
}
_LARGEST_SCORE = 3e38  # they are float32
# Phi-3's tokens that do not strip the white space after them, which the metadata cannot express.
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def sentencepiece(vocabulary: GgufVocabulary, name: str, strips: bool) -> Vocabulary:
    """`name`: one of `KINDS`. `strips`: special tokens take the white space after them, as Phi-3's do."""
    ggml = vocabulary.ggml
    kind, dummy_prefix, add_bos, add_eos, defaults = KINDS[name]
    info = vocabulary.info(defaults, add_bos, add_eos)
    scores = _scores(ggml, len(vocabulary))
    _settle_unknown(vocabulary, info, defaults["unk"])
    missing = _settle_bytes(vocabulary)
    types = vocabulary.types
    # Tokens that the model's authors defined have spaces in GGUF where SentencePiece has its own sign.
    spaced = [text.replace(" ", SPACE) if type == USER_DEFINED else text for text, type in zip(vocabulary.texts, types)]
    texts = unique(spaced)
    types = [type if new == old else UNUSED for type, new, old in zip(types, texts, spaced)]
    pieces = [*zip(texts, scores, types), *((text, 0.0, BYTE) for text in missing)]
    ids = {key: info[f"{key}_id"] for key in ("unk", "bos", "eos", "pad")}
    normalizer = Normalizer(
        ggml.flag("add_space_prefix", dummy_prefix),
        ggml.flag("remove_extra_whitespaces", False),
        _charsmap(ggml),
    )
    try:
        data = model_bytes(pieces, kind, ids, normalizer)
    except UnicodeEncodeError:
        return ggml.fail("tokens", "not valid UTF-8")
    special = vocabulary.special()
    info |= {"added_tokens": {}, "legacy": True}
    if strips:
        info["rstrip"] = [i for text, i in special.items() if text not in _PHI3_KEEPS]
    ends, notes = tuple(vocabulary.ends()), tuple(vocabulary.notes)
    return Vocabulary("tokenizer.model", data, info, special, notes, ends, len(vocabulary))


def _scores(ggml: Fields, size: int) -> list[float]:
    scores = ggml.get("scores")
    if (
        not isinstance(scores, list)
        or len(scores) != size
        or not all(type(score) in (int, float) and abs(score) < _LARGEST_SCORE for score in scores)
    ):
        return ggml.fail("scores", "missing, or not one number for each token")
    return scores


def _settle_unknown(vocabulary: GgufVocabulary, info: dict[str, Any], default: int) -> None:
    """SentencePiece wants one unknown token; further ones become control tokens."""
    types = vocabulary.types
    unknown = info["unk_id"]
    if unknown is None:
        unknown = next((i for i, type in enumerate(types) if type == UNKNOWN), default)
    if unknown >= len(types):
        vocabulary.ggml.fail("unknown_token_id", "missing, and no token is of the unknown type")
    info["unk_id"] = unknown
    vocabulary.types = [CONTROL if type == UNKNOWN else type for type in types]
    vocabulary.types[unknown] = UNKNOWN


def _settle_bytes(vocabulary: GgufVocabulary) -> list[str]:
    """Tokens that are written as bytes are bytes, whatever the file says. Returns the texts of those that are missing,
    if any is there: SentencePiece wants all 256."""
    texts, types = vocabulary.texts, vocabulary.types
    named = [i for i, text in enumerate(texts) if text in BYTE_PIECES and types[i] not in (UNUSED, UNKNOWN)]
    if len(named) < len(BYTE_PIECES) and BYTE not in types:
        return []
    wrong = [i for i, type in enumerate(types) if type == BYTE and texts[i] not in BYTE_PIECES]
    if wrong:
        vocabulary.ggml.fail("tokens", f"token {wrong[0]} is of the type of bytes, but is not one of <0x00> to <0xFF>")
    other = [i for i in named if types[i] != BYTE]
    if other:
        vocabulary.notes.append(f"{len(other)} tokens <0xNN> are bytes although the file does not say so")
    for i in other:
        types[i] = BYTE
    missing = sorted(BYTE_PIECES - {texts[i] for i in named})
    # A character of one byte needs no byte token if it is a token itself.
    characters = {f"<0x{ord(text):02X}>" for text in texts if len(text) == 1 and text.isascii()}
    needed = [text for text in missing if text not in characters]
    if needed:
        vocabulary.notes.append(f"{len(needed)} of the 256 tokens of bytes are missing: {', '.join(needed[:4])} ...")
    return missing


def _charsmap(ggml: Fields) -> bytes:
    values = ggml.get("precompiled_charsmap", [])
    if not isinstance(values, list) or not all(type(v) is int and -128 <= v < 256 for v in values):
        return ggml.fail("precompiled_charsmap", "not a list of bytes")
    return bytes(value & 0xFF for value in values)
