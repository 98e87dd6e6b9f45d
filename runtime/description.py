"""What the engine needs to know about a model, apart from its weights.

One frozen dataclass, written by the converter, read by the runtime and the core. It is stored in the model
file as JSON (docs/format.md), and read back strictly: a model that is described wrongly must not run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np

from kvrun.errors import ModelFileError

ARCHITECTURES = ("llama",)
ACTIVATIONS = ("silu",)

# Upper limits keep products of sizes far from overflow and a hostile file from asking for endless work.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "n_layers": 1 << 12,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "head_dim": 1 << 10,
    "context_length": 1 << 30,
}
_SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_context_length"),
    "factors": ("factors",),
}


def strict_json(text: str | bytes) -> Any:
    """Parse JSON that this package wrote itself: no repeated keys, no NaN. Any fault is a ValueError."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def no_constants(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    try:
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True)
class ModelDescription:
    """Sizes and arithmetic of a decoder model. The constructor checks every value (ModelFileError).

    ``rope_scaling`` is None or one of
    ``{"type": "linear", "factor"}``,
    ``{"type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_context_length"}``,
    ``{"type": "factors", "factors": [head_dim / 2 numbers]}`` (divisors of the inverse frequencies).

    ``sliding_windows``: for each layer the number of tokens that a query sees, itself included, or None for all
    before it; None when no layer has such a window.
    """

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    activation: str
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    attention_scale: float
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_windows: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, field.type, getattr(self, field.name))
        for name, choices in (("architecture", ARCHITECTURES), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                _bad(name, f"{getattr(self, name)!r} is not supported (supported: {', '.join(choices)})")
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                _bad(name, f"{getattr(self, name)} is not between 1 and {limit}")
        if self.n_heads % self.n_kv_heads:
            _bad("n_kv_heads", f"{self.n_kv_heads} does not divide n_heads = {self.n_heads}")
        if self.head_dim % 2:
            _bad("head_dim", f"{self.head_dim} is odd; rotary embeddings need pairs")
        for name in ("norm_eps", "rope_theta", "attention_scale"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                _bad(name, f"{value} is not a positive number")
            object.__setattr__(self, name, float(value))
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", _checked_scaling(self.rope_scaling, self.head_dim))
        if self.sliding_windows is not None:
            object.__setattr__(self, "sliding_windows", _checked_windows(self.sliding_windows, self.n_layers))

    def to_json(self) -> str:
        """The description as one line of JSON, fields in the order of the class."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ModelDescription:
        """The inverse of `to_json`. ModelFileError names the field that is unknown, missing or impossible."""
        try:
            values = strict_json(text)
        except ValueError as error:
            raise ModelFileError(f"model description: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ModelFileError("model description: not a JSON object")
        known = {field.name: field for field in fields(cls)}
        for name in values:
            if name not in known:
                _bad(name, "unknown field; the file may need a newer kvrun")
        for name, field in known.items():
            if name not in values and field.default is MISSING and field.default_factory is MISSING:
                _bad(name, "missing")
        return cls(**values)

    def rope_inv_freq(self) -> np.ndarray:
        """Rotation angle per position of each pair of channels, in radians: float64 [head_dim / 2]."""
        inv_freq = self.rope_theta ** -(np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        scaling = self.rope_scaling
        if scaling is None:
            return inv_freq
        if scaling["type"] == "linear":
            return inv_freq / scaling["factor"]
        if scaling["type"] == "factors":
            return inv_freq / np.array(scaling["factors"], dtype=np.float64)
        # Llama 3: long wavelengths are slowed by the factor, short ones kept, those between blended.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_context_length"] * inv_freq / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return inv_freq * (keep + (1.0 - keep) / scaling["factor"])

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model and its shape, in file order.

        Matrices (packed weights, [rows, cols] = [out, in]) come first, then the float32 vectors [n].
        """
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, self.hidden_size)}
        matrices = self._layer_matrices()
        for i in range(self.n_layers):
            for name, shape in matrices.items():
                shapes[f"layers.{i}.{name}.weight"] = shape
        if not self.tie_embeddings:
            shapes["head.weight"] = (self.vocab_size, self.hidden_size)
        for i in range(self.n_layers):
            shapes[f"layers.{i}.attn.norm.weight"] = (self.hidden_size,)
            shapes[f"layers.{i}.mlp.norm.weight"] = (self.hidden_size,)
            for name, (rows, _) in matrices.items():
                if self.attention_bias if name.startswith("attn.") else self.mlp_bias:
                    shapes[f"layers.{i}.{name}.bias"] = (rows,)
        shapes["norm.weight"] = (self.hidden_size,)
        return shapes

    def _layer_matrices(self) -> dict[str, tuple[int, int]]:
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "attn.q": (queries, self.hidden_size),
            "attn.k": (keys, self.hidden_size),
            "attn.v": (keys, self.hidden_size),
            "attn.o": (self.hidden_size, queries),
            "mlp.gate": (self.intermediate_size, self.hidden_size),
            "mlp.up": (self.intermediate_size, self.hidden_size),
            "mlp.down": (self.hidden_size, self.intermediate_size),
        }


def _bad(name: str, reason: str) -> None:
    raise ModelFileError(f"model description, field {name}: {reason}")


def _is_number(value: Any) -> bool:
    # An integer that no float can hold is as unusable as a string.
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 63
    return isinstance(value, float)


def _check_type(name: str, annotation: str, value: Any) -> None:
    checks = {
        "str": lambda v: isinstance(v, str),
        "bool": lambda v: isinstance(v, bool),
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "float": _is_number,
        "dict[str, Any] | None": lambda v: v is None or isinstance(v, dict),
        "tuple[int | None, ...] | None": lambda v: v is None or isinstance(v, (tuple, list)),
    }
    if not checks[annotation](value):
        _bad(name, f"{_shortened(value)} is not of type {annotation.replace('[str, Any]', '')}")


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= 60 else text[:57] + "..."


def _checked_windows(windows: Sequence[Any], n_layers: int) -> tuple[int | None, ...] | None:
    """The windows as a tuple, None if all of them are."""
    if len(windows) != n_layers:
        _bad("sliding_windows", f"{len(windows)} entries for {n_layers} layers")
    for window in windows:
        if window is not None and (type(window) is not int or not 1 <= window <= _LIMITS["context_length"]):
            _bad("sliding_windows", f"{_shortened(window)} is not between 1 and {_LIMITS['context_length']}")
    return tuple(windows) if any(windows) else None


def _checked_scaling(scaling: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The scaling with its numbers as floats, in a fixed order."""
    kind = scaling.get("type")
    if not isinstance(kind, str) or kind not in _SCALING_FIELDS:
        _bad("rope_scaling", f"type {_shortened(kind)} is not supported ({', '.join(_SCALING_FIELDS)})")
    expected = _SCALING_FIELDS[kind]
    if set(scaling) != {"type", *expected}:
        _bad("rope_scaling", f"type {kind} has exactly the fields {', '.join(expected)}")
    values: dict[str, Any] = {"type": kind}
    for name in expected:
        numbers = scaling[name] if name == "factors" else [scaling[name]]
        if not isinstance(numbers, list) or not all(
            _is_number(v) and math.isfinite(v) and v > 0 for v in numbers
        ):
            _bad("rope_scaling", f"{name} = {_shortened(scaling[name])} is not positive")
        values[name] = [float(v) for v in numbers] if name == "factors" else float(numbers[0])
    if kind == "factors" and len(values["factors"]) != head_dim // 2:
        _bad("rope_scaling", f"{len(values['factors'])} factors where head_dim needs {head_dim // 2}")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        _bad("rope_scaling", "high_freq_factor is not above low_freq_factor")
    return values
