"""A tensor as it lies in a checkpoint: rows at an offset in a file, read in slabs as they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from kvrun import _core
from kvrun.convert.transcoding import EXACT, transcoded
from kvrun.errors import ConvertError
from kvrun.files.regular import open_regular

SLAB = 16 << 20
"""About so many bytes of float32 values are in work at once."""

PLAIN = {row.name: row.block_bytes for row in _core.WEIGHT_TYPES.values() if row.block == 1}
"""Types of plain numbers, and the bytes of a number."""


@cache
def is_readable(kind: str) -> bool:
    """Whether there are values behind raw rows of this type: one of ours, or of GGML's that the gguf package reads."""
    if kind in _core.WEIGHT_TYPES:
        return True
    import gguf

    try:
        number = gguf.GGMLQuantizationType[kind.upper()]
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except (KeyError, NotImplementedError):
        return False
    return True


@dataclass(frozen=True)
class StoredTensor:
    """`type` is a weight type of ours or, in lower case, another of GGML's. Shape [rows, cols] or [n]."""

    name: str
    path: str
    offset: int
    shape: tuple[int, ...]
    type: str
    row_bytes: int
    row_order: tuple[int, ...] = ()
    """Not empty: rows come in groups of this many, and row i of a group is stored at row_order[i] of it."""

    @cached_property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def with_rows_from(self, order: tuple[int, ...]) -> StoredTensor:
        """The same tensor, its rows put in another order as they are read; of a vector, the values."""
        if len(self.shape) == 2:
            return replace(self, row_order=order)
        return replace(self, shape=(*self.shape, 1), row_bytes=self.row_bytes // self.shape[0], row_order=order)

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Row ranges (start, stop) that cover the tensor, of whole panels of 16 rows and whole groups."""
        unit = math.lcm(16, len(self.row_order) or 1)
        step = max(1, SLAB // (4 * max(1, self.shape[-1]) * unit)) * unit
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as stored: uint8 [rows, row_bytes]."""
        data: np.ndarray = np.empty((stop - start, self.row_bytes), np.uint8)
        try:
            # Not a memory map: the pages of one would count as memory in use.
            with open(self.path, "rb", buffering=0, opener=open_regular) as file:
                file.seek(self.offset + start * self.row_bytes)
                view, done = data.reshape(-1).data, 0
                while done < len(view):
                    n = file.readinto(view[done : done + (1 << 30)])
                    if not n:
                        raise ConvertError(f"{self.path}: truncated within tensor {self.name}")
                    done += n
        except OSError as error:
            raise ConvertError(f"{self.path}: cannot read: {error.strerror}") from None
        if self.row_order:
            groups = data.reshape(-1, len(self.row_order), self.row_bytes)
            data = groups[:, list(self.row_order)].reshape(data.shape)
        return data

    def floats(self, start: int, stop: int) -> np.ndarray:
        """The values of rows start to stop: float32 [rows, cols]. Exact for every type of ours."""
        raw = self.raw(start, stop)
        if self.type == "f32":
            return raw.view("<f4")
        if self.type == "f16":
            return raw.view("<f2").astype(np.float32)
        if self.type == "bf16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return self._dequantized(raw)

    def vector(self) -> np.ndarray:
        """All values of a small tensor: float32 [n]."""
        return self.floats(0, self.rows).reshape(-1)

    def packed(self, start: int, stop: int, type: str, rounded: Callable[[int], None] | None = None) -> np.ndarray:
        """Rows start to stop in the core's layout: uint8 [n]. If `type` is the tensor's, or the one in `EXACT` for it,
        no value changes; of a type that cannot quite be kept, `rounded` is called with the number of blocks that did.
        """
        if type == self.type:
            return _core.pack_raw(type, self.raw(start, stop), stop - start, self.shape[1])
        if type == EXACT.get(self.type):
            with suppress(OverflowError):  # then the range of the values is at fault, which is refused below
                blocks, changed = transcoded(self.type, self.raw(start, stop))
                if changed and rounded:
                    rounded(changed)
                return _core.pack_raw(type, blocks, stop - start, self.shape[1])
        values = self.floats(start, stop)
        self._check_range(values, type)
        return _core.pack(type, values)

    def _check_range(self, values: np.ndarray, type: str) -> None:
        # min and max of an array with a NaN are NaN.
        largest = max(-float(values.min()), float(values.max()))
        if not math.isfinite(largest):
            raise ConvertError(f"{self.path}: tensor {self.name} holds NaN or infinite values")
        if largest > 65504 and type not in ("f32", "bf16"):
            raise ConvertError(
                f"{self.path}: tensor {self.name} holds {largest:g}, too large for {type}: use --type bf16 or f32"
            )

    def _dequantized(self, raw: np.ndarray) -> np.ndarray:
        import gguf

        with np.errstate(all="ignore"):  # a scale that is no number is found where the values are used
            values: np.ndarray = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.type.upper()])
        return values.astype(np.float32, copy=False)
