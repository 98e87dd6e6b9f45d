"""Which weight type a tensor gets: the types that can be asked for, and what each makes of a model's tensors."""

from __future__ import annotations

import re

from kvrun import _core
from kvrun.convert.tensors import PLAIN, StoredTensor
from kvrun.files.description import ModelDescription

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_k_m", "q4_k", "q4_1", "q4_0", "same")
"""Weight types; q4_k_m, a mix of q4_k and q6_k; and "same", the type that a tensor has."""

_SENSITIVE = ("embed.weight", "positions.weight", "head.weight")
_FINER = {"q4_0": "q8_0", "q4_1": "q8_0", "q4_k": "q6_k"}
"""What embedding and output head become instead: they cost little and matter most."""

_NEAREST = {"q4_k": "q4_1", "q6_k": "q8_0"}
"""What a matrix becomes whose columns are no whole number of super-blocks."""

_KEPT_WELL = {"q2_k": "q6_k", "q3_k": "q6_k", "f8_e4m3": "bf16"}
"""For types that are not ours: one whose rounding is small beside their own. Of all others q8_0."""


def target_type(name: str, tensor: StoredTensor, asked: str, description: ModelDescription) -> str:
    """The weight type of a matrix in the model file, one that its shape allows."""
    kind = wanted_type(name, tensor, asked, description)
    return _NEAREST[kind] if tensor.shape[-1] % _core.column_multiple(kind) else kind


def wanted_type(name: str, tensor: StoredTensor, asked: str, description: ModelDescription) -> str:
    """The same whatever its shape."""
    if asked == "same":
        return tensor.type if tensor.type in _core.WEIGHT_TYPES else _KEPT_WELL.get(tensor.type, "q8_0")
    if name.endswith("mlp.router.weight") and asked not in PLAIN:  # small, and a choice may hang on its last digit
        return tensor.type if tensor.type in PLAIN else "f16"
    if asked == "q4_k_m":
        return _of_the_mix(name, description)
    if name in _SENSITIVE and tensor.type != asked:
        return _FINER.get(asked, asked)
    return asked


def _of_the_mix(name: str, description: ModelDescription) -> str:
    """What llama.cpp's type Q4_K_M makes of a tensor: q6_k for the output head, and for V and down in half of the
    layers, the first and the last eighth and every third between; with eight experts q8_0 for K and V; else q4_k. Where
    that has Q5_K (O beside eight experts, and V in 80 layers with several heads to one, as in Llama 2 and 3 of 70B),
    q6_k is the nearest that is not coarser."""
    if name == "embed.weight":
        return "q6_k" if description.tie_embeddings else "q4_k"
    if name in _SENSITIVE:
        return "q6_k"
    of_layer = re.fullmatch(r"layers\.(\d+)\.(?:.+\.)?(\w+)\.weight", name)
    part = of_layer[2] if of_layer else ""
    if description.n_experts == 8 and part in ("k", "v", "o"):
        return "q6_k" if part == "o" else "q8_0"
    if of_layer is None or part not in ("v", "down"):
        return "q4_k"
    i, n = int(of_layer[1]), description.n_layers
    if part == "v" and n == 80 and description.n_kv_heads < description.n_heads:
        return "q6_k"
    return "q6_k" if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else "q4_k"
