"""SentencePiece's tokenizers of GGUF metadata as a tokenizer.model: "llama" is BPE by scores, "t5" is Unigram."""

from __future__ import annotations

from typing import Any

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields
from kvrun.convert.gguf_vocabulary import GgufVocabulary, unique
from kvrun.convert.sentencepiece_model import BPE, BYTE_PIECES, SPACE, UNIGRAM, Normalizer, model_bytes
from kvrun.text.backends import refusal
from kvrun.text.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

# tokenizer.ggml.model -> SentencePiece's kind, and llama.cpp's defaults if the metadata say nothing else: whether a
# space is put before a text, BOS before it, EOS after it, and the ids of named tokens.
KINDS: dict[str, tuple[int, bool, bool, bool, dict[str, int]]] = {
    "llama": (BPE, True, True, False, {"bos": 1, "eos": 2, "unk": 0}),
    "t5": (UNIGRAM, False, False, True, {"eos": 1, "unk": 2, "pad": 0}),
}
_LARGEST_SCORE = 3e38  # they are float32
# Phi-3's tokens that do not strip the white space after them, which the metadata cannot express.
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def sentencepiece(ggml: Fields, name: str, strips: bool) -> Vocabulary:
    """`name`: one of `KINDS`. `strips`: special tokens take the white space after them, as Phi-3's do."""
    kind, dummy_prefix, add_bos, add_eos, defaults = KINDS[name]
    vocabulary = GgufVocabulary(ggml, defaults)
    info = vocabulary.info(add_bos, add_eos)
    scores = _scores(ggml, len(vocabulary))
    _settle_unknown(vocabulary, info, defaults["unk"])
    lacking = _settle_bytes(vocabulary)
    ids = {key: info[f"{key}_id"] for key in ("unk", "bos", "eos", "pad")}
    shrinks = ggml.flag("remove_extra_whitespaces", False)
    normalizer = Normalizer(
        ggml.flag("add_space_prefix", dummy_prefix),
        shrinks and kind == UNIGRAM,  # as in llama.cpp; files of the other kind do not mean it
        _charsmap(ggml),
    )
    apart = _found_apart(vocabulary) if normalizer.dummy_prefix else {}
    texts, types = _pieces(vocabulary, set(apart.values()))
    try:
        pieces = [*zip(texts, scores, types), *((text, 0.0, BYTE) for text in lacking)]
        data = model_bytes(pieces, kind, ids, normalizer)
    except UnicodeEncodeError:
        return ggml.fail("tokens", "not valid UTF-8")
    _check(ggml, data)
    special = vocabulary.special()
    info |= {"added_tokens": apart, "visible": [*apart.values()], "legacy": True}
    if strips:
        info["rstrip"] = [i for text, i in (special | apart).items() if text not in _PHI3_KEEPS]
    ends, notes = tuple(vocabulary.ends()), tuple(vocabulary.notes)
    return Vocabulary("tokenizer.model", data, info, special, notes, ends, len(vocabulary))


def _check(ggml: Fields, data: bytes) -> None:
    """The library itself finds what else may be wrong, such as a damaged table of replacements."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=data)
    except Exception as error:
        ggml.fail("model", f"the tokenizer cannot be built: {refusal(error)}")


def _found_apart(vocabulary: GgufVocabulary) -> dict[str, int]:
    """Ids by text of the tokens that are found in a text before anything else, so that what follows them is a text of
    its own with a space before it. Those with SentencePiece's sign for a space are left to SentencePiece."""
    tokens = enumerate(zip(vocabulary.texts, vocabulary.types))
    return {text: i for i, (text, type) in tokens if type == USER_DEFINED and SPACE not in text}


def _pieces(vocabulary: GgufVocabulary, apart: set[int]) -> tuple[list[str], list[int]]:
    """Texts and types as SentencePiece has them. In GGUF, tokens that the model's authors defined are written with
    spaces; llama.cpp takes unused tokens like others, as the tokenizers library does. Those in `apart` are not for
    SentencePiece to find."""
    types = [NORMAL if type == UNUSED else type for type in vocabulary.types]
    types = [UNUSED if i in apart else type for i, type in enumerate(types)]
    spaced = [text.replace(" ", SPACE) if type == USER_DEFINED else text for text, type in zip(vocabulary.texts, types)]
    texts = unique(spaced)
    return texts, [type if new == old else UNUSED for type, new, old in zip(types, texts, spaced)]


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
    """Make tokens that are written as bytes bytes, whatever the file says. Returns those that are lacking, if there are
    any: SentencePiece wants all 256 or none, and the runtime takes ids beyond the vocabulary for unknown ones."""
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
    missing = BYTE_PIECES - {texts[i] for i in named}
    # A character of one byte may be there as itself, as Gemma's tab is: that is the byte's token then.
    characters = {f"<0x{ord(text):02X}>": i for i, text in enumerate(texts) if len(text) == 1 and text.isascii()}
    for text in missing & characters.keys():
        texts[characters[text]] = text
        other.append(characters[text])
    lacking = sorted(missing - characters.keys())
    if lacking:
        number = f"{len(lacking)} of the 256 byte tokens"
        vocabulary.notes.append(f"{number} are missing, the first is {lacking[0]}: what needs them is unknown")
    for i in other:
        types[i] = BYTE
    return lacking


def _charsmap(ggml: Fields) -> bytes:
    values = ggml.get("precompiled_charsmap", [])
    if not isinstance(values, list) or not all(type(v) is int and -128 <= v < 256 for v in values):
        return ggml.fail("precompiled_charsmap", "not a list of bytes")
    return bytes(value & 0xFF for value in values)
