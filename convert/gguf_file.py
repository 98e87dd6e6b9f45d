"""Reader of the GGUF container: metadata and where the tensors lie.

Follows the published specification, versions 2 and 3, little-endian. Names are unique, and the tensors' data lies in
their order with nothing between but padding, as llama.cpp demands. A vocabulary has hundreds of thousands of strings;
read one after the other they take a fraction of a second and no more memory than they need.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from kvrun import _core
from kvrun.convert.fields import shown
from kvrun.convert.tensors import StoredTensor
from kvrun.errors import ConvertError
from kvrun.files.regular import open_regular

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_DEPTH = 4
_MAX_HEADER = 1 << 27
"""Bytes of metadata and names that a file may have; the largest vocabularies take a fifth of it."""
_MAX_ALIGNMENT = 1 << 30
_OURS = {row.ggml_number: row for row in _core.WEIGHT_TYPES.values()}
_REMOVED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Types that llama.cpp has had, by number."""


class GgufFile:
    """`metadata`: values by key; `tensors`: by name, shapes as [rows, cols]. ConvertError if unusable."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with open(path, "rb", opener=open_regular) as file:
                self._read(_Cursor(file, os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise ConvertError(f"{path}: cannot read: {error.strerror or error}") from None
        except ValueError as error:
            raise ConvertError(f"{path}: not a readable GGUF file: {error}") from None

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version = cursor.scalar("<I")
        if version & 0xFFFF == 0 and version:
            raise ValueError("it is big-endian; convert it with gguf-convert-endian of the Python package gguf")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported (2 and 3 are)")
        n_tensors, n_values = cursor.count(24), cursor.count(12)
        for _ in range(n_values):
            key = cursor.string()
            if not key or key in self.metadata:
                raise ValueError(f"the key {key[:80]} appears twice" if key else "a key is empty")
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shown(alignment)}")
        for _ in range(n_tensors):
            name, shape, number, offset = self._tensor_info(cursor)
            if name in self.tensors:
                raise ValueError(f"tensor {name[:80]} appears twice")
            self.tensors[name] = _stored_tensor(self.path, name, shape, number, offset)
        self._place(-(-cursor.position // alignment) * alignment, alignment, cursor.file_size)

    def _tensor_info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = cursor.string(), cursor.scalar("<I")
        if n_dims > 4:
            raise ValueError(f"tensor {name[:80]} has {n_dims} dimensions")
        dims = [cursor.scalar("<Q") for _ in range(n_dims)]
        return name, tuple(reversed(dims)) or (1,), cursor.scalar("<I"), cursor.scalar("<Q")

    def _place(self, data_start: int, alignment: int, size: int) -> None:
        """Check where the tensors lie in the data, and make their offsets those in the file."""
        expected = 0
        for name, tensor in self.tensors.items():
            if tensor.offset != expected:
                raise ValueError(f"tensor {name[:80]} is at byte {tensor.offset} of the data, not at {expected}")
            end = data_start + expected + tensor.nbytes
            if end > size:
                raise ConvertError(
                    f"{self.path}: truncated: tensor {name[:80]} ends at byte {end}, the file has {size}; "
                    "download it again"
                )
            self.tensors[name] = replace(tensor, offset=data_start + expected)
            expected += -(-tensor.nbytes // alignment) * alignment


class _Cursor:
    """A position in the header. Every read is checked against the end of the file, and against what a header may have;
    a fault is a ValueError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.file_size, self.position = file, size, 0
        self.size = min(size, _MAX_HEADER)

    def take(self, n: int) -> bytes:
        self._check(n)
        self.position += n
        data = self.file.read(n)
        if len(data) < n:
            raise ValueError("truncated within its header")
        return data

    def _check(self, n: int) -> None:
        if n > self.file_size - self.position:
            raise ValueError("truncated within its header, or damaged")
        if n > self.size - self.position:
            raise ValueError(f"its header has more than {_MAX_HEADER} bytes")

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, smallest: int) -> int:
        """A number of items of at least `smallest` bytes each, which must have room in the file."""
        n: int = self.scalar("<Q")
        self._check(n * smallest)
        return n

    def string(self) -> str:
        # Invalid UTF-8 is kept apart from U+FFFD: nothing that is used may hold it, but not all is used.
        return self.take(self.count(1)).decode("utf-8", "surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _FLOAT32:
            # The shortest decimal that gives this float32: 1e-05 and not 9.999999747378752e-06.
            return float(str(np.float32(self.scalar("<f"))))
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise ValueError(f"unknown type of value {kind}, or too deep an array")
        inner = self.scalar("<I")
        if inner not in _SCALARS:
            return [self.value(inner, depth + 1) for _ in range(self.count(8 if inner == _STRING else 12))]
        dtype = np.dtype(_SCALARS[inner])
        numbers: list[Any] = np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype).tolist()
        return numbers


def _stored_tensor(path: str, name: str, shape: tuple[int, ...], number: int, offset: int) -> StoredTensor:
    if number in _OURS:
        kind, block, width = _OURS[number].name, _OURS[number].block, _OURS[number].block_bytes
    else:
        kind, block, width = _other_type(path, name, number)
    if shape[-1] % block or not 0 < math.prod(shape) <= 1 << 48:
        raise ValueError(f"tensor {name[:80]} has the impossible shape {list(shape)}")
    return StoredTensor(name, path, offset, shape, kind, shape[-1] // block * width)


def _other_type(path: str, name: str, number: int) -> tuple[str, int, int]:
    """(name, values in a block, bytes of a block) of a type that the gguf package knows."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
        return kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        pass
    what = f"type {_REMOVED[number]}, which llama.cpp has removed" if number in _REMOVED else f"unknown type {number}"
    raise ConvertError(f"{path}: tensor {name[:80]} has the {what}; use a file of another type") from None
