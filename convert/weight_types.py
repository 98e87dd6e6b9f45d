"""Which weight type a tensor gets: the types that can be asked for, and what each makes of a model's tensors."""

from __future__ import annotations

import re
import textwrap

from kvrun import _core
from kvrun.convert.tensors import PLAIN, StoredTensor
from kvrun.convert.transcoding import EXACT
from kvrun.files.description import ModelDescription

_BY_BITS = sorted(_core.WEIGHT_TYPES.values(), key=lambda row: -row.bits)

TYPES = (*(row.name for row in _BY_BITS), "q4_k_m", "same")
"""Weight types, the finest first; q4_k_m, a mix of q4_k and q6_k; and "same", the type that a tensor has."""

_SENSITIVE = ("embed.weight", "positions.weight", "head.weight")
_FEW_BITS = 6
"""Embedding and output head do not get fewer: they cost little and matter most."""

_KEPT_WELL = {**EXACT, "q2_k": "q6_k", "f8_e4m3": "bf16"}
"""For types that are not ours: one that holds their values, or else whose rounding is small beside their own. Of all
others q8_0."""


def finer(kind: str) -> str:
    """What embedding and output head become instead of this type: of few bits q8_0, or q6_k where super-blocks fit."""
    row = _core.WEIGHT_TYPES[kind]
    if row.bits >= _FEW_BITS:
        return kind
    return "q8_0" if row.column_multiple == 1 else "q6_k"


def for_any_columns(kind: str) -> str:
    """The type with the fewest bits that has more than this one and takes any number of columns."""
    few = _core.WEIGHT_TYPES[kind].bits
    return [row.name for row in _BY_BITS if row.column_multiple == 1 and row.bits > few][-1]


def types_help() -> str:
    """What a command's help says about the types."""
    blocks = [row for row in _BY_BITS if row.block > 1]
    supers = [row.name for row in blocks if row.column_multiple > 1]
    become: dict[str, list[str]] = {}
    for row in blocks:
        if finer(row.name) != row.name:
            become.setdefault(finer(row.name), []).append(row.name)
    changes = "; ".join(f"of {_listed(kinds)} to {kind}" for kind, kinds in become.items())
    kept = {kind: [old.upper() for old, new in EXACT.items() if new == kind] for kind in sorted(set(EXACT.values()))}
    same = (
        "keep the type of tensors that have one of those below, and every value; also every value of "
        + "; ".join(f"{_listed(old)} as {new}" for new, old in kept.items())
        + ". Others are dequantised and rounded: Q2_K to q6_k, fp8 to bf16, all other types of GGUF to q8_0"
    )
    quantised = (
        f"{_listed([f'{row.bits:.1f}' for row in blocks])} bits per weight, GGML's arithmetic; q4_k is better than q4_1"
        " and q4_0. All matrices are quantised but routers of experts; the type of embedding and output head changes,"
        f" {changes} (a GGUF file that has them in the type asked for keeps them). A tensor that already has its type"
        " keeps every value."
    )
    entries = {
        "same": same,
        ", ".join(row.name for row in _BY_BITS if row.block == 1): "plain numbers",
        ", ".join(row.name for row in blocks): quantised,
        "q4_k_m": "q4_k, but q6_k for the output head and, in half of the layers, V and down: llama.cpp's Q4_K_M",
    }
    lines = ["types:"]
    for names, text in entries.items():
        first = f"  {names:8}" if len(names) < 8 else f"  {names}\n{'':10}"
        lines.append(first + textwrap.fill(text, 98).replace("\n", f"\n{'':10}"))
    others = " and ".join(f"{kind} becomes {for_any_columns(kind)}" for kind in supers)
    return "\n".join(lines) + f"\n\n{_listed(supers)} take a multiple of 256 columns; with another number {others}.\n"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def target_type(name: str, tensor: StoredTensor, asked: str, description: ModelDescription) -> str:
    """The weight type of a matrix in the model file, one that its shape allows."""
    kind = wanted_type(name, tensor, asked, description)
    return for_any_columns(kind) if tensor.shape[-1] % _core.column_multiple(kind) else kind


def wanted_type(name: str, tensor: StoredTensor, asked: str, description: ModelDescription) -> str:
    """The same whatever its shape."""
    if asked == "same":
        return tensor.type if tensor.type in _core.WEIGHT_TYPES else _KEPT_WELL.get(tensor.type, "q8_0")
    if name.endswith("mlp.router.weight") and asked not in PLAIN:  # small, and a choice may hang on its last digit
        return tensor.type if tensor.type in PLAIN else "f16"
    if asked == "q4_k_m":
        return _of_the_mix(name, description)
    if name in _SENSITIVE and tensor.type != asked:
        return finer(asked)
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
