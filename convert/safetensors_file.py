"""Reader of the header of a safetensors file: which tensors lie where.

It takes what the format's own reader takes (github.com/huggingface/safetensors) and refuses what that refuses. The
header is strict JSON; the tensors, in the order of their offsets, cover the data from its first byte to its last.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, BinaryIO

from kvrun.convert.fields import shown
from kvrun.convert.small_files import POINTER, refuse_pointer
from kvrun.convert.tensors import StoredTensor
from kvrun.errors import ConvertError
from kvrun.files.regular import open_regular

DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8_e4m3"}
"""The dtypes that can be read, and their names in a `StoredTensor`."""

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
_FIELDS = ("dtype", "shape", "data_offsets")
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000
_SIZES = range(1 << 64)


def read_safetensors_header(path: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Raises ConvertError if it is damaged.

    A tensor of a dtype that cannot be read has this dtype as its type, and one may have no values: the model may not
    need them.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            entries, start = _header(path, file, size)
    except OSError as error:
        raise ConvertError(f"{path}: cannot read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConvertError(f"{path}: damaged safetensors header: {reason}") from None
    _check_cover(path, entries, start, size)
    return {name: _stored(path, name, *entry, start) for name, entry in entries.items()}


_Entry = tuple[str, tuple[int, ...], tuple[int, int]]
"""dtype, shape, offsets of the first byte and of the one after the last, in the data."""


def _header(path: str, file: BinaryIO, size: int) -> tuple[dict[str, _Entry], int]:
    """The entries of the tensors, each sound in itself, and where the data starts."""
    start = file.read(len(POINTER))
    refuse_pointer(path, start)
    file.seek(8)
    length = int.from_bytes(start[:8], "little")
    if size < 10 or not 2 <= length <= _MAX_HEADER:
        raise ConvertError(f"{path}: not a safetensors file (or an empty or partly downloaded one)")
    if 8 + length > size:
        raise ConvertError(f"{path}: truncated: the header has {length} bytes, the file {size}")
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {8 + error.start})") from None
    header = _strict_json(text)
    if not isinstance(header, dict):
        raise ValueError("not a JSON object")
    metadata = header.pop(_METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is not an object of texts")
    return {name: _entry(name, value) for name, value in header.items()}, 8 + length


def _strict_json(text: str) -> Any:
    """What the format's reader makes of a text: NaN, numbers that no float holds, broken surrogates and an entry that
    has a field twice are refused; of tensors with one name the last counts."""

    def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            for name in (*_FIELDS, _METADATA):
                if names.count(name) > 1:
                    raise ValueError(f"{name} appears twice")
        return result

    def finite(digits: str) -> float:
        if math.isinf(float(digits)):
            raise ValueError(f"the number {digits[:20]} is out of range")
        return float(digits)

    def integer(digits: str) -> float:
        return finite(digits) if digits == "-0" or len(digits) > 300 else int(digits)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    value = json.loads(
        text, object_pairs_hook=unique_fields, parse_float=finite, parse_int=integer, parse_constant=no_constant
    )
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError, a ValueError
    return value


def _entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict):
        raise ValueError(f"tensor {name[:80]}: not an object")
    fields: list[Any] = [value.get(field) for field in _FIELDS]
    dtype, shape, offsets = fields
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name[:80]}: dtype {shown(dtype)} is none of safetensors' dtypes")
    if not _are_sizes(shape):
        raise ValueError(f"tensor {name[:80]}: shape {shown(shape)} is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name[:80]}: data_offsets {shown(offsets)} are not two numbers")
    count = 1
    for n in (*shape, _BITS[dtype]):  # in this order, since no product may overflow on the way to a size of zero
        count *= n
        if count not in _SIZES:
            raise ValueError(f"tensor {name[:80]}: shape {shown(shape)} is too large")
    if count != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"tensor {name[:80]}: {dtype} {shown(shape)} takes {count / 8:g} bytes, but data_offsets are "
            f"{offsets[0]} and {offsets[1]}"
        )
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n in _SIZES for n in values)


def _check_cover(path: str, entries: dict[str, _Entry], start: int, size: int) -> None:
    """Raise ConvertError unless the tensors cover the data without overlaps and holes."""
    position = 0
    for name, (_, _, (first, last)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if first != position:
            what = "overlaps the one before it" if first < position else f"leaves a hole of {first - position} bytes"
            raise ConvertError(f"{path}: damaged safetensors header: tensor {name[:80]} {what}")
        position = last
        if start + last > size:
            raise ConvertError(
                f"{path}: truncated: tensor {name[:80]} ends at byte {start + last}, the file has {size}; "
                "download it again"
            )
    if start + position < size:
        raise ConvertError(f"{path}: {size - start - position} bytes too many after the last tensor; download it again")


def _stored(
    path: str, name: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, int], start: int
) -> StoredTensor:
    if dtype not in DTYPES:
        return StoredTensor(name, path, start + offsets[0], shape, dtype, 0)
    row_bytes = _BITS[dtype] // 8 * math.prod(shape[-1:])
    return StoredTensor(name, path, start + offsets[0], shape, DTYPES[dtype], row_bytes)
