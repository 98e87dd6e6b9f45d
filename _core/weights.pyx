"""Packing of weight matrices into the interleaved layout of the model file (``kernels/kernels.h``), and back."""

from typing import NamedTuple

from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc

import numpy as np

from .kernels cimport (KV_N_WEIGHT_TYPES, KV_PANEL, kv_pack_panel, kv_packed_bytes, kv_quantize_row, kv_raw_row_bytes,
                       kv_unpack_row, kv_weight, kv_weight_of)


class WeightType(NamedTuple):
    """A row of the kernels' table of weight types."""
    name: str
    """GGML's name of the type, in small letters."""
    number: int
    """In the kernels: enum kv_weight_type."""
    ggml_number: int
    """Of the type in GGUF files."""
    block: int
    """Columns of a row that make a block of GGML's, 1 for plain numbers."""
    block_bytes: int
    """Bytes of such a block."""
    column_multiple: int
    """What the columns of a matrix must be a multiple of."""
    takes_int8: bool
    """Whether products take inputs quantised to int8."""

    @property
    def bits(self):
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block


cdef _row(int number):
    cdef const kv_weight* row = kv_weight_of(number)
    return WeightType(row.name.decode(), number, row.ggml_number, row.block, row.block_bytes, row.column_multiple,
                      bool(row.takes_int8))


WEIGHT_TYPES = {row.name: row for row in map(_row, range(KV_N_WEIGHT_TYPES))}
"""The weight types by name, in the order of their numbers."""

_LARGEST = 1 << 48  # elements; keeps every size below far from overflow


cpdef int type_id(str type) except -1:
    """Number of a weight type in the kernels. ValueError for a name that is not one."""
    try:
        return WEIGHT_TYPES[type].number
    except KeyError:
        raise ValueError(f"weight type {type!r} is not one of {', '.join(WEIGHT_TYPES)}") from None


def column_multiple(str type):
    """What the columns of a matrix of this type must be a multiple of: 256 for those with super-blocks, else 1."""
    return kv_weight_of(type_id(type)).column_multiple


def packed_size(str type, rows, cols):
    """Bytes of a packed matrix [rows, cols], a multiple of 64.

    Raises ValueError for an unknown type, an impossible shape, or one that the type cannot have.
    """
    id = type_id(type)
    if cols % column_multiple(type):
        raise ValueError(f"{type} takes a multiple of {column_multiple(type)} columns, not {cols}")
    if rows < 1 or cols < 1 or rows * cols > _LARGEST:
        raise ValueError(f"a matrix cannot have the shape [{rows}, {cols}]")
    return kv_packed_bytes(id, rows, cols)


def raw_size(str type, rows, cols):
    """Bytes of the same matrix row by row: GGML blocks, or plain elements for the float types."""
    packed_size(type, rows, cols)
    return rows * kv_raw_row_bytes(type_id(type), cols)


def pack_raw(str type, raw, rows, cols):
    """Interleaves a matrix given row by row, changing no value.

    raw: uint8 [raw_size(type, rows, cols)], GGML blocks or little-endian elements.
    Returns uint8 [packed_size(type, rows, cols)]. Raises ValueError when raw has another size.
    """
    cdef const uint8_t[::1] source = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    if source.shape[0] != raw_size(type, rows, cols):
        raise ValueError(f"{type} [{rows}, {cols}] takes {raw_size(type, rows, cols)} bytes, not {source.shape[0]}")
    out = np.empty(packed_size(type, rows, cols), np.uint8)
    cdef uint8_t[::1] target = out
    cdef int id = type_id(type)
    cdef int64_t n_rows = rows, n_cols = cols, row, row_bytes = kv_raw_row_bytes(id, n_cols)
    cdef int64_t panel_bytes = kv_packed_bytes(id, KV_PANEL, n_cols)
    with nogil:
        row = 0
        while row < n_rows:
            kv_pack_panel(id, &source[row * row_bytes], min(KV_PANEL, n_rows - row), n_cols,
                          &target[row // KV_PANEL * panel_bytes])
            row += KV_PANEL
    return out


def pack(str type, a):
    """Quantises or converts (to nearest even) and interleaves a matrix.

    a: float32 [rows, cols]; for block types cols is padded with zeros to a multiple of 32. Types with
    blocks are rounded as GGML's reference does; those with super-blocks search for the least squared error.
    Returns uint8 [packed_size(type, rows, cols)]. Raises ValueError as that does.
    """
    cdef const float[:, ::1] source = np.ascontiguousarray(a, np.float32)
    out = np.empty(packed_size(type, source.shape[0], source.shape[1]), np.uint8)
    cdef uint8_t[::1] target = out
    cdef int id = type_id(type)
    cdef int64_t n_rows = source.shape[0], n_cols = source.shape[1], row, i, n
    cdef int64_t row_bytes = kv_raw_row_bytes(id, n_cols), panel_bytes = kv_packed_bytes(id, KV_PANEL, n_cols)
    cdef uint8_t* raw = <uint8_t*>malloc(KV_PANEL * row_bytes)
    if raw == NULL:
        raise MemoryError
    with nogil:
        row = 0
        while row < n_rows:
            n = min(KV_PANEL, n_rows - row)
            for i in range(n):
                kv_quantize_row(id, &source[row + i, 0], n_cols, raw + i * row_bytes)
            kv_pack_panel(id, raw, n, n_cols, &target[row // KV_PANEL * panel_bytes])
            row += KV_PANEL
    free(raw)
    return out


def unpack(str type, packed, rows, cols):
    """The values of a packed matrix: float32 [rows, cols], computed as GGML does in float32.

    Raises ValueError when packed is not packed_size(type, rows, cols) bytes.
    """
    cdef const uint8_t[::1] source = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    if source.shape[0] != packed_size(type, rows, cols):
        raise ValueError(f"{type} [{rows}, {cols}] is {packed_size(type, rows, cols)} bytes packed, "
                         f"not {source.shape[0]}")
    out = np.empty((rows, cols), np.float32)
    cdef float[:, ::1] target = out
    cdef int id = type_id(type)
    cdef int64_t row, n_cols = cols
    with nogil:
        for row in range(target.shape[0]):
            kv_unpack_row(id, &source[0], n_cols, row, &target[row, 0])
    return out
