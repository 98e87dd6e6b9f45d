"""Checkpoints in fp8: float8_e4m3fn times a factor, which a block of a matrix has (DeepSeek-V3, Qwen3-FP8), a row, or
all of it (Ministral 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import numpy as np

from kvrun.convert.quantised import WHOLE
from kvrun.convert.tensors import PLAIN, StoredTensor
from kvrun.errors import ConvertError

_SUFFIXES = ("_scale_inv", "_scale")
"""What the name of the factors has after that of a matrix; the first is DeepSeek's, and as little an inverse."""
_OF_INPUTS = (".activation_scale", ".input_scale")
"""Tensors beside such a matrix: factors of its inputs, which kvrun quantises in its own way."""


def _values() -> np.ndarray:
    """The numbers of all 256 codes: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities, and NaN
    when all but the sign are ones (Micikevicius et al. 2022)."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


VALUES = _values()


@dataclass(frozen=True)
class Fp8Tensor(StoredTensor):
    """A matrix of fp8 codes. Value (r, c) is that of its code times factor (r // block[0], c // block[1])."""

    factors: StoredTensor = field(kw_only=True)
    block: tuple[int, int] = (1, 1)
    start: int = 0
    """Where the whole matrix starts in the file; this tensor may be only some of its rows."""

    def floats(self, start: int, stop: int) -> np.ndarray:
        """The values of rows start to stop: float32 [rows, cols], code times factor rounded to float32."""
        first = (self.offset - self.start) // self.row_bytes
        rows = np.arange(start, stop)
        if self.row_order:
            size = len(self.row_order)
            rows = rows // size * size + np.array(self.row_order)[rows % size]
        factors = self.factors.floats(0, self.factors.rows).reshape(-1, -(-self.shape[1] // self.block[1]))
        factors = factors[(first + rows) // self.block[0]]
        with np.errstate(over="ignore", invalid="ignore"):  # found where the values are used
            values: np.ndarray = (
                VALUES[self.raw(start, stop)] * np.repeat(factors, self.block[1], axis=1)[:, : self.shape[1]]
            )
        return values


def with_factors(tensors: dict[str, StoredTensor], block: tuple[int, int] | None) -> dict[str, StoredTensor]:
    """fp8 matrices together with their factors, which are tensors of their own: NAME_scale_inv or NAME_scale. `block`
    has the rows and columns that one of them is for, unless it is for a row or for the whole matrix."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.type != "f8_e4m3":
            continue
        if block is None:
            raise ConvertError(
                f"{tensor.path}: tensor {name} has type F8_E4M3, but config.json has no quantization_config "
                "to say how it is scaled"
            )
        factors = next((result.pop(name + suffix) for suffix in _SUFFIXES if name + suffix in result), None)
        if factors is None:
            raise ConvertError(f"{tensor.path}: tensor {name}{_SUFFIXES[0]} is missing: {name} is in fp8")
        for other in _OF_INPUTS:
            result.pop(name.removesuffix(".weight") + other, None)
        result[name] = _joined(tensor, factors, block)
    return result


def _joined(tensor: StoredTensor, factors: StoredTensor, block: tuple[int, int]) -> Fp8Tensor:
    if len(tensor.shape) == 2 and 0 not in tensor.shape and factors.type in PLAIN:
        rows, cols = tensor.shape
        for height, width in (block, (rows, cols), (1, cols)):
            height, width = min(height, rows), min(width, cols)
            grid = (-(-rows // height), -(-cols // width))
            one_dimension = grid[1] == 1 and factors.shape in ((grid[0],), ()) and grid[0] == math.prod(factors.shape)
            if factors.shape == grid or one_dimension:
                values = {f.name: getattr(tensor, f.name) for f in fields(StoredTensor)}
                return Fp8Tensor(**values, factors=factors, block=(height, width), start=tensor.offset)
    blocks = f" or each block of {block[0]} x {block[1]}" if block != WHOLE else ""
    raise ConvertError(
        f"{factors.path}: tensor {factors.name} is {factors.type} {list(factors.shape)}, but {tensor.name} "
        f"{list(tensor.shape)} takes one float, or one for each row{blocks}"
    )
