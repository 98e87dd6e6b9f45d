"""Folders that are not Hugging Face checkpoints in safetensors: what they are, and what to do with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NoReturn

from kvrun.convert.fields import read_json, shown
from kvrun.errors import ConvertError

_SAVE = (
    "transformers.AutoModelForCausalLM.from_pretrained(FOLDER{}).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)
_UNPICKLE = (
    "pickles are refused, since loading one can run any code; save the checkpoint as safetensors: " + _SAVE.format("")
)
_ORIGINAL = "convert the checkpoint that it was made from, or a GGUF file of the model"

# Patterns of names, what such files are, and what to do. The first that matches counts.
_KINDS = (
    (("model_index.json",), "a pipeline of diffusers", "there is no language model to convert"),
    (("ggml-*.bin", "*ggml*.bin", "*.ggml"), "GGML, the format before GGUF", _ORIGINAL),
    (
        ("*.distcp", "global_step*", "zero_to_fp32.py", "mp_rank_*", "pytorch_model_fsdp*"),
        "parts of a training run",
        "put them together with the trainer's own tool (zero_to_fp32.py, accelerate merge-weights) first",
    ),
    (
        ("consolidated*",),
        "the format of Meta or Mistral",
        "convert the model's folder in Hugging Face's format, or a GGUF file of it",
    ),
    (("rank*.engine", "*.engine", "*.plan"), "an engine of TensorRT", _ORIGINAL),
    (("openvino_model*", "*.xml"), "OpenVINO", _ORIGINAL),
    (("vocabulary.json", "vocabulary.txt", "shared_vocabulary.*"), "CTranslate2", _ORIGINAL),
    (("pytorch_model*.bin", "model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"), None, _UNPICKLE),
    (
        ("*.h5", "*.keras"),
        "TensorFlow",
        f"save it as safetensors with transformers 4: {_SAVE.format(', from_tf=True')}",
    ),
    (("*.msgpack",), "Flax", f"save it as safetensors with transformers 4: {_SAVE.format(', from_flax=True')}"),
    (("*.onnx", "onnx"), "ONNX", _ORIGINAL),
    (("*.tflite", "*.task", "*.litertlm"), "LiteRT", _ORIGINAL),
    (("*.mlmodel", "*.mlpackage", "*.mlmodelc"), "Core ML", _ORIGINAL),
    (("*.pte",), "ExecuTorch", _ORIGINAL),
    (("*.npz", "*.npy"), "arrays of NumPy or MLX", _ORIGINAL),
    (("*.nemo",), "NeMo", _ORIGINAL),
)
# What trainers leave beside the weights, which is none of them.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*")


def refuse_other_folders(folder: str) -> None:
    """Raise ConvertError, which says what the folder is and what to do, if it has no config.json, or instead of weights
    in safetensors something else that is known."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConvertError(f"{folder}: cannot read: {error.strerror or error}") from None
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter")]
    complete = "config.json" in names and (weights or "model.safetensors.index.json" in names)
    if complete and weights != [name for name in weights if fnmatchcase(name, "consolidated*")]:
        return
    if "adapter_config.json" in names or any(name.startswith("adapter") for name in names):
        _refuse_adapter(folder, names)
    lacks = "no config.json: not a Hugging Face checkpoint"
    if "config.json" in names:
        lacks = "no safetensors file with weights (model.safetensors)"
    gguf = _first(names, ("*.gguf",))
    if gguf is not None:
        raise ConvertError(f"{folder}: {lacks}; to convert a GGUF file give its name: {os.path.join(folder, gguf)}")
    for patterns, what, to_do in _KINDS:
        found = _first(names, patterns)
        if found is not None:
            what = f"{what}, which kvrun does not read; " if what else ""
            raise ConvertError(f"{os.path.join(folder, found)}: {what}{to_do}")
    if "config.json" not in names:
        raise ConvertError(f"{folder}: {lacks}{_deeper(folder, names)}")


def _first(names: Iterable[str], patterns: tuple[str, ...]) -> str | None:
    names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _NOT_WEIGHTS)]
    return next((name for pattern in patterns for name in names if fnmatchcase(name, pattern)), None)


def _refuse_adapter(folder: str, names: list[str]) -> NoReturn:
    config = read_json(folder, "adapter_config.json")
    base = kind = None
    if config is not None:
        base = next((config.get(name) for name in ("base_model_name_or_path", "model") if name in config), None)
        kind = next((config.get(name) for name in ("peft_type", "fine_tune_type") if name in config), None)
    kind = f" ({shown(kind)[1:-1]})" if isinstance(kind, str) else ""
    base = shown(base)[1:-1] if isinstance(base, str) and base else ""
    of = repr(base) if base else "BASE"
    merge = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({of}), FOLDER)"
    merge += ".merge_and_unload().save_pretrained(NEW_FOLDER)"
    if "adapters.safetensors" in names:
        merge = "mlx_lm.fuse"
    raise ConvertError(
        f"{folder}: an adapter{kind}, not a model; merge it into its base model{base and ' ' + base} first and convert "
        f"the result: {merge}"
    )


def adapters_beside(folder: str) -> list[str]:
    """A line about each adapter that lies in a model's folder; transformers loads it with the model."""
    names = [name for name in sorted(os.listdir(folder)) if fnmatchcase(name, "adapter_model.*")]
    return [f"{name}, an adapter beside the model, which is converted without it" for name in names]


def _deeper(folder: str, names: list[str]) -> str:
    """A hint at a folder inside, of the hub's cache among others, that has a config.json."""
    if "snapshots" in names and os.path.isdir(os.path.join(folder, "snapshots")):
        names = [os.path.join("snapshots", name) for name in sorted(os.listdir(os.path.join(folder, "snapshots")))]
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(os.path.join(path, "config.json")):
            return f"; {path} has one"
    return ""
