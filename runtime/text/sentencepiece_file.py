"""The pieces in the bytes of a tokenizer.model: what the SentencePiece library does not tell or do.

The file is a Protocol Buffers message, ModelProto of sentencepiece_model.proto; its field 1 is there once for each
piece, a message in which field 3 is the type, and field 3 the normalizer_spec, in which field 3 is add_dummy_prefix.
"""

from __future__ import annotations

from collections.abc import Iterator

_PIECE, _TYPE = 1, 3
_NORMALIZER, _DUMMY_PREFIX = 3, 3
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; GGUF numbers them in the same way."""


def varint(value: int) -> bytes:
    """A number as Protocol Buffers write it; negative ones in 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def piece_types(data: bytes) -> list[int]:
    """The type of each piece: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Raises ValueError if
    `data` is damaged."""
    return [_type(data, value, stop) for field, _, value, stop in _fields(data, 0, len(data)) if field == _PIECE]


def first_pieces(data: bytes, n: int) -> bytes:
    """The same model with its first `n` pieces only, and after them what others are bytes, since the library wants all
    of these. Raises ValueError if `data` is damaged."""
    out, pieces = bytearray(), 0
    for field, start, value, stop in _fields(data, 0, len(data)):
        pieces += field == _PIECE
        if field != _PIECE or pieces <= n or _type(data, value, stop) == BYTE:
            out += data[start:stop]
    return bytes(out)


def as_control(data: bytes, pieces: set[int]) -> bytes:
    """The same model, in which these pieces, by number, are of the type CONTROL, so that they are found in no text.
    Raises ValueError if `data` is damaged."""
    out, number = bytearray(), 0
    for field, start, value, stop in _fields(data, 0, len(data)):
        if field == _PIECE and number in pieces:
            # Of a field that is there twice the last value counts.
            piece = data[value:stop] + bytes([_TYPE << 3 | _VARINT, CONTROL])
            out += bytes([_PIECE << 3 | _BYTES]) + varint(len(piece)) + piece
        else:
            out += data[start:stop]
        number += field == _PIECE
    return bytes(out)


def with_dummy_prefix(data: bytes, wanted: bool) -> bytes:
    """The same model, which puts a space before a text or does not."""
    # A repeated occurrence of an embedded message is merged into the first, and the last value of a field holds.
    spec = bytes([_DUMMY_PREFIX << 3 | _VARINT, wanted])
    return data + bytes([_NORMALIZER << 3 | _BYTES]) + varint(len(spec)) + spec


def _type(data: bytes, start: int, stop: int) -> int:
    """The type of the piece in data[start:stop]."""
    kind = NORMAL
    for field, _, value, _ in _fields(data, start, stop):
        if field == _TYPE:
            kind = _varint(data, value, stop)[0]
    return kind


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the message in data[start:stop]: number, where the field, its value and the next field begin."""
    while start < stop:
        tag, value = _varint(data, start, stop)
        kind = tag & 7
        if kind == _VARINT:
            end = _varint(data, value, stop)[1]
        elif kind == _BYTES:
            length, value = _varint(data, value, stop)
            end = value + length
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            end = value + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise ValueError("damaged: a field of unknown kind")
        if end > stop:
            raise ValueError("damaged: a field ends beyond its message")
        yield tag >> 3, start, value, end
        start = end


def _varint(data: bytes, start: int, stop: int) -> tuple[int, int]:
    """The number that begins at `start`, and where it ends."""
    number = 0
    for i in range(start, min(stop, start + 10)):
        number |= (data[i] & 0x7F) << 7 * (i - start)
        if not data[i] & 0x80:
            return number, i + 1
    raise ValueError("damaged: a number without an end")
