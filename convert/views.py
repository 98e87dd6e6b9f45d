"""Tensors that are stored in another form than in the model file: as parts, transposed, norms less one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvrun.convert.tensors import StoredTensor
from kvrun.errors import ConvertError, ModelFileError
from kvrun.files.model_file import map_file
from kvrun.files.regular import open_regular


def rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Rows start to stop of a matrix, or values start to stop of a vector."""
    if len(tensor.shape) == 1:
        width = tensor.row_bytes // tensor.shape[0]
        return replace(
            tensor,
            offset=tensor.offset + start * width,
            shape=(stop - start,),
            row_bytes=(stop - start) * width,
        )
    shape = (stop - start, *tensor.shape[1:])
    if isinstance(tensor, TransposedTensor):
        return replace(tensor, shape=shape, first=tensor.first + start)
    return replace(tensor, shape=shape, offset=tensor.offset + start * tensor.row_bytes)


@dataclass(frozen=True)
class TransposedTensor(StoredTensor):
    """A matrix of plain numbers that is stored transposed, as `stored_rows` rows of `stored_cols` columns, or a part of
    it: ours begin at column `first`."""

    stored_cols: int = 0
    first: int = 0

    @classmethod
    def of(cls, tensor: StoredTensor) -> TransposedTensor:
        rows, cols = tensor.shape
        width = tensor.row_bytes // max(1, cols)
        return cls(
            tensor.name,
            tensor.path,
            tensor.offset,
            (cols, rows),
            tensor.type,
            rows * width,
            stored_cols=cols,
        )

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, as if they were stored one after the other: uint8 [rows, row_bytes]."""
        cols = self.shape[1]
        width = self.row_bytes // cols
        try:
            with open(self.path, "rb", opener=open_regular) as file:
                data = map_file(self.path, file.fileno(), self.offset + cols * self.stored_cols * width)
        except (OSError, ModelFileError) as error:
            raise ConvertError(f"{self.path}: cannot read tensor {self.name}: {error}") from None
        stored = np.frombuffer(memoryview(data), np.uint8, offset=self.offset).reshape(cols, self.stored_cols, width)
        part = stored[:, self.first + start : self.first + stop]
        return np.ascontiguousarray(part.transpose(1, 0, 2)).reshape(stop - start, self.row_bytes)


@dataclass(frozen=True)
class ShiftedTensor(StoredTensor):
    """A vector whose values are the stored ones plus `shift`, added in float32 as the model does."""

    shift: float = 0.0

    @classmethod
    def of(cls, tensor: StoredTensor, shift: float) -> ShiftedTensor:
        return cls(
            tensor.name,
            tensor.path,
            tensor.offset,
            tensor.shape,
            tensor.type,
            tensor.row_bytes,
            tensor.row_order,
            shift=shift,
        )

    def floats(self, start: int, stop: int) -> np.ndarray:
        values: np.ndarray = super().floats(start, stop) + np.float32(self.shift)
        return values
