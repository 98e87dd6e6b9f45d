"""What a Hugging Face config says about quantised weights. Weights in fp8 are taken (`kvrun.convert.fp8`), all others
refused in one line that says what they are and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NoReturn

from kvrun.convert.fields import Fields, shown
from kvrun.errors import ConvertError

WHOLE = (1 << 31, 1 << 31)
"""The block of a matrix that has one factor."""

_FIELDS = ("quantization_config", "compression_config")
_MLX = "quantization"
"""MLX's own field, which it repeats as quantization_config only in newer versions; others may mean anything by it."""
_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fouroversix": "Four Over Six",
    "fp-quant": "FP-Quant",
    "fp8": "fp8",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "intel/auto-round": "AutoRound",
    "metal": "Metal kernels' affine codes",
    "mlx": "MLX",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "quanto",
    "quark": "AMD Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""Methods by their name in configs, with - for _."""

_PACKED = {
    r"\.qweight": "GPTQ or AWQ",
    r"\.weight_packed": "compressed-tensors",
    r"\.SCB|\.weight\.(absmax|quant_map|quant_state\..*)": "bitsandbytes",
    r"_proj_blocks": "MXFP4",
    r"\.W_q": "HQQ",
    r"\.weight\._data": "quanto",
    r"\.biases": "MLX",
}
"""Ends of the names of tensors that only quantised checkpoints have."""

_INSTEAD = "convert an unquantised checkpoint of the model, or a GGUF file of it"


def fp8_block(config: Fields, text: Fields) -> tuple[int, int] | None:
    """The rows and columns of a matrix in fp8 that have a factor in common, None if the checkpoint is not quantised.
    `text` is the part of the config that the text model has, or all of it. Raises ConvertError for other methods."""
    for fields in (config, text):
        for name in _FIELDS:
            if name in fields:
                return _block(fields, name)
        mlx = fields.get(_MLX)
        if isinstance(mlx, dict) and "bits" in mlx:
            _refuse(fields, _MLX, _NAMES["mlx"])
    return None


def refuse_packed(where: str, names: Iterable[str]) -> None:
    """Raise ConvertError if the names of tensors show that the checkpoint is quantised, whatever its config says."""
    for name in names:
        for end, method in _PACKED.items():
            if re.search(f"(?:{end})$", name):
                raise ConvertError(
                    f"{where}: tensor {name}: quantised with {method}, which is not supported; {_INSTEAD}"
                )


def _block(fields: Fields, name: str) -> tuple[int, int]:
    settings = fields.get(name)
    if not isinstance(settings, dict):
        fields.fail(name, "not a JSON object")
    method = settings.get("quant_method")
    if settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True:
        method = "bitsandbytes"
    elif method is None and "bits" in settings and "group_size" in settings:
        method = "mlx"
    known = method.lower().replace("_", "-") if isinstance(method, str) else ""
    block, detail = _FP8.get(known, _none)(settings)
    if block is None:
        _refuse(
            fields, name, f"{_NAMES[known]}{detail}" if known in _NAMES else f"quant_method {shown(method)}{detail}"
        )
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(n) is int and 0 < n < 1 << 32 for n in block)
    ):
        fields.fail(name, f"blocks of {shown(block)} are not two numbers")
    return block[0], block[1]


def _refuse(fields: Fields, name: str, what: str) -> NoReturn:
    fields.fail(name, f"quantised with {what}, which is not supported (fp8 is); {_INSTEAD}")


_Block = tuple[Any, str]
"""The block as the settings have it, None for what is not fp8; what else to say about that."""


def _none(settings: dict[str, Any]) -> _Block:
    return None, ""


def _fp8(settings: dict[str, Any]) -> _Block:
    """DeepSeek's blocks; null for one factor to a matrix (Ministral 3)."""
    kind = settings.get("fmt", "e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        return None, f" and fmt {shown(kind)}"
    block = settings.get("weight_block_size", [128, 128])
    return WHOLE if block is None else block, ""


def _rows(settings: dict[str, Any]) -> _Block:
    """FBGEMM's: a factor for each row."""
    return (1, WHOLE[1]), ""


def _compressed(settings: dict[str, Any]) -> _Block:
    """compressed-tensors: groups of layers, each with a scheme of its own."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    blocks = []
    for scheme in schemes:
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if not isinstance(weights, dict) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            break
        if weights.get("strategy") not in ("tensor", "channel", "block"):
            break
        blocks.append(weights.get("block_structure") if weights["strategy"] == "block" else WHOLE)
    sparse = settings.get("sparsity_config") or {}
    plain = (
        not settings.get("transform_config") and isinstance(sparse, dict) and sparse.get("format", "dense") == "dense"
    )
    if schemes and len(blocks) == len(schemes) and plain:
        return blocks[0], ""
    return None, f" ({shown(settings.get('format'))})"


def _modelopt(settings: dict[str, Any]) -> _Block:
    algorithm = settings.get("quant_algo")
    return (WHOLE, "") if algorithm == "FP8" else (None, f" ({shown(algorithm)})")


_FP8 = {
    "fp8": _fp8,
    "fbgemm-fp8": _rows,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
}
"""Methods that can be fp8."""
