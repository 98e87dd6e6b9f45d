"""Checkpoints in fp8: float8_e4m3fn with a factor for each block of a matrix (DeepSeek-V3, Qwen3-FP8)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvrun.convert.fields import Fields, shown
from kvrun.convert.tensors import PLAIN, StoredTensor
from kvrun.errors import ConvertError

_FIELD = "quantization_config"
_SUFFIX = "_scale_inv"


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
        factors = self.factors.floats(0, self.factors.rows)[(first + rows) // self.block[0]]
        values: np.ndarray = (
            VALUES[self.raw(start, stop)] * np.repeat(factors, self.block[1], axis=1)[:, : self.shape[1]]
        )
        return values


def block_shape(config: Fields) -> tuple[int, int] | None:
    """The block size of an fp8 checkpoint, None if it is not quantised. Raises ConvertError for any other method."""
    settings = config.get(_FIELD)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method != "fp8":
        config.fail(_FIELD, f"quant_method {shown(method)} is not supported (fp8 is); use the original checkpoint")
    if settings.get("fmt", "e4m3") != "e4m3":
        config.fail(_FIELD, f"fmt {shown(settings['fmt'])} is not supported (e4m3 is)")
    block = settings.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in block):
        config.fail(_FIELD, "weight_block_size is not two numbers: only fp8 with factors for blocks is supported")
    return block[0], block[1]


def without_quantization(config: Fields) -> Fields:
    """The config as it would be if the checkpoint were not quantised."""
    return config.without(_FIELD)


def with_factors(tensors: dict[str, StoredTensor], block: tuple[int, int] | None) -> dict[str, StoredTensor]:
    """fp8 matrices together with their factors, which are tensors of their own: NAME.weight_scale_inv."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.type != "f8_e4m3":
            continue
        if block is None:
            raise ConvertError(
                f"{tensor.path}: tensor {name} has type F8_E4M3, but config.json has no {_FIELD} "
                "to say how it is scaled"
            )
        factors = result.pop(name + _SUFFIX, None)
        if factors is None:
            raise ConvertError(f"{tensor.path}: tensor {name}{_SUFFIX} is missing: {name} is in fp8")
        result[name] = _joined(tensor, factors, block)
    return result


def _joined(tensor: StoredTensor, factors: StoredTensor, block: tuple[int, int]) -> Fp8Tensor:
    shape = tuple(-(-n // b) for n, b in zip(tensor.shape, block, strict=False))
    if len(tensor.shape) != 2 or factors.shape != shape or factors.type not in PLAIN:
        raise ConvertError(
            f"{factors.path}: tensor {factors.name} is {factors.type} {list(factors.shape)}, but {tensor.name} "
            f"{list(tensor.shape)} takes one float for each block of {block[0]} x {block[1]}"
        )
    return Fp8Tensor(
        tensor.name,
        tensor.path,
        tensor.offset,
        tensor.shape,
        tensor.type,
        tensor.row_bytes,
        factors=factors,
        block=block,
        start=tensor.offset,
    )
