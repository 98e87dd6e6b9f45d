"""A SentencePiece model written from its pieces, with the few Protocol Buffers messages that this takes.

The messages are ModelProto (1: pieces, 2: trainer_spec, 3: normalizer_spec) of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvrun.text.sentencepiece_file import BYTE, varint

UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
"""How a space is written inside a piece."""

BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))

_VARINT, _BYTES, _FLOAT = 0, 2, 5  # wire types


@dataclass(frozen=True)
class Normalizer:
    """What is done to a text before it is split; `charsmap` is SentencePiece's compiled table of replacements."""

    dummy_prefix: bool
    remove_extra_spaces: bool = False
    charsmap: bytes = b""


def model_bytes(
    pieces: Sequence[tuple[str, float, int]],
    kind: int,
    ids: dict[str, int | None],
    normalizer: Normalizer,
) -> bytes:
    """A `tokenizer.model` with these pieces (text, score, type), of `kind` UNIGRAM or BPE.

    `ids`: those of "unk", "bos", "eos" and "pad", None if there is no such token. Byte fallback is on if all 256
    byte pieces are there. Raises UnicodeEncodeError for text that UTF-8 cannot encode.
    """
    out = bytearray()
    for text, score, type in pieces:
        out += _message(1, _text(1, text) + _float(2, score) + _number(3, type))
    has_bytes = {text for text, _, type in pieces if type == BYTE} >= BYTE_PIECES
    trainer = _number(3, kind) + _number(4, len(pieces)) + _number(35, int(has_bytes))
    # The fields of the ids and of the texts that belong to them; an id of -1 means that there is none.
    for name, id_field, text_field in (("unk", 40, 45), ("bos", 41, 46), ("eos", 42, 47), ("pad", 43, 48)):
        token = ids.get(name)
        trainer += _number(id_field, -1 if token is None else token)
        if token is not None:
            trainer += _text(text_field, pieces[token][0])
    rules = _text(1, "identity") + _message(2, normalizer.charsmap)
    rules += _number(3, int(normalizer.dummy_prefix)) + _number(4, int(normalizer.remove_extra_spaces))
    return bytes(out) + _message(2, trainer) + _message(3, rules + _number(5, 1))


def _number(field: int, value: int) -> bytes:
    return varint(field << 3 | _VARINT) + varint(value)


def _float(field: int, value: float) -> bytes:
    return varint(field << 3 | _FLOAT) + struct.pack("<f", value)


def _message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | _BYTES) + varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode("utf-8"))
