"""What the engine needs to know about a model, apart from its weights.

One frozen dataclass, written by the converter, read by the runtime and the core. It is stored in the model
file as JSON (docs/format.md), and read back strictly: a model with a wrong description must not run.
"""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NoReturn

import numpy as np

from kvrun.errors import ModelFileError

ARCHITECTURES = (
    "llama",
    "gpt2",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "mixtral",
    "qwen3moe",
)
"""The family of a model, for people to read: everything that it computes follows from the other fields."""
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "architecture": ARCHITECTURES,
    "activation": ("silu", "gelu", "gelu_tanh"),
    "norm": ("rms", "layer"),
    "qk_norm": (None, "head", "all"),
}

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
_MOST_EXPERTS, _LARGEST_EXPERT = 1 << 12, 1 << 22
MAX_TENSORS = 1 << 18
"""Tensors of a model: about as many as the largest header has room for."""
_FLOAT32 = (2.0**-126, 2.0**127)  # the core computes in float32; what is smaller than its smallest would become 0
_FASTEST = 1e6  # radians a position: no rotary embedding turns so fast, and positions times it are exact enough


def strict_json(text: str | bytes) -> Any:
    """Parse JSON that this package wrote itself: no repeated keys, no NaN, no number that a float cannot hold. Raises
    ValueError for any fault."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def no_constants(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{digits[:20]} is too large a number")
        return value

    # Collecting garbage while millions of values are made would look at all of them again and again, and free nothing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        if collecting:
            gc.enable()


def text_json(text: str) -> Any:
    """`strict_json` whose texts UTF-8 can encode: escapes can stand for halves of characters."""
    value = strict_json(text)
    try:
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not valid text") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


@dataclass(frozen=True)
class RopeTables:
    """`inv_freq`, `amplitude`: float64 [tables, head_dim / 2]; `of_layer`: int64 [n_layers], each layer's table.

    Pair i turns by position * inv_freq[i] radians, not at all if that is 0, and is multiplied by amplitude[i].
    """

    inv_freq: np.ndarray
    amplitude: np.ndarray
    of_layer: np.ndarray


def frequencies(theta: float, scaling: Mapping[str, Any] | None, pairs: int, ctx: int) -> tuple[np.ndarray, float]:
    """(angle per position of each pair: float64 [pairs], amplitude) for a checked rope_scaling."""
    exponents = np.arange(pairs, dtype=np.float64) / pairs
    plain = theta**-exponents
    kind, s = (scaling["type"], scaling) if scaling else ("none", {})
    if kind == "linear":
        return plain / s["factor"], 1.0
    if kind == "factors":
        return plain / np.array(s["factors"]), 1.0
    if kind == "dynamic" and ctx > s["original_context_length"]:
        # "Dynamic NTK": the base grows with the length, so that the slowest pair is slowed by the factor.
        growth = s["factor"] * ctx / s["original_context_length"] - (s["factor"] - 1)
        return (theta * growth ** (pairs / (pairs - 1) if pairs > 1 else 1.0)) ** -exponents, 1.0
    if kind == "llama3":
        # Long wavelengths are slowed by the factor, short ones kept, those between blended.
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_context_length"] * plain / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * (keep + (1.0 - keep) / s["factor"]), 1.0
    if kind == "yarn":  # the same, but by the index of the pair (Peng et al. 2023)
        slow = np.clip((np.arange(pairs) - s["low"]) / (s["high"] - s["low"]), 0.0, 1.0)
        return plain * (1.0 - slow + slow / s["factor"]), s["attention_factor"]
    if kind == "longrope":  # Ding et al. 2024
        factors = s["long_factors" if ctx > s["original_context_length"] else "short_factors"]
        return plain / np.array(factors), s["attention_factor"]
    return plain, 1.0


@dataclass(frozen=True)
class ModelDescription:
    """Sizes and arithmetic of a decoder model. The constructor checks every value and raises ModelFileError.

    The defaults turn everything off that not all models have. docs/format.md says what each field means.

    ``sliding_windows``: for each layer the number of tokens that a query sees, itself included, or None for all
    before it; None when no layer has such a window. ``rope_local``: theta and scaling of the layers that have one,
    where they differ from the others'. ``rope_layers``: for each layer whether it has RoPE; None when all have.
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
    rope_theta: float | None
    rope_scaling: dict[str, Any] | None
    attention_scale: float
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_windows: tuple[int | None, ...] | None = None
    norm: str = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str | None = None
    attention_out_bias: bool | None = None
    mlp_gated: bool = True
    learned_positions: bool = False
    rotary_dim: int | None = None
    rope_local: dict[str, Any] | None = None
    rope_layers: tuple[bool, ...] | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    n_experts: int | None = None
    experts_used: int | None = None
    expert_size: int | None = None
    normalize_experts: bool = True
    expert_layers: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice) for choice in choices if choice)
                _bad(name, f"{shortened(getattr(self, name))} is not supported (supported: {known})")
        for name, limit in _LIMITS.items():
            _check_between(name, getattr(self, name), limit)
        if self.attention_out_bias == self.attention_bias:  # so that equal descriptions compare equal
            object.__setattr__(self, "attention_out_bias", None)
        if self.n_heads % self.n_kv_heads:
            _bad("n_kv_heads", f"{self.n_kv_heads} does not divide n_heads = {self.n_heads}")
        if self.head_dim % 2:
            _bad("head_dim", f"{self.head_dim} is odd; rotary embeddings need pairs")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None:
                if not _FLOAT32[0] <= value <= _FLOAT32[1]:
                    _bad(name, f"{value} is not a positive number that float32 has")
                object.__setattr__(self, name, float(value))
        if self.sliding_windows is not None:
            object.__setattr__(self, "sliding_windows", _checked_windows(self.sliding_windows, self.n_layers))
        self._check_rope()
        self._check_experts()
        if self.n_tensors > MAX_TENSORS:
            _bad("n_experts", f"the model would have {self.n_tensors} tensors, a file has room for {MAX_TENSORS}")

    def _check_rope(self) -> None:
        if self.rotary_dim is not None and not (0 < self.rotary_dim < self.head_dim and self.rotary_dim % 2 == 0):
            _bad("rotary_dim", f"{shortened(self.rotary_dim)} is not an even number below head_dim = {self.head_dim}")
        pairs = (self.rotary_dim or self.head_dim) // 2
        if self.rope_layers is not None:
            object.__setattr__(self, "rope_layers", _checked_layers("rope_layers", self.rope_layers, self.n_layers))
        if self.rope_theta is None:
            for name in ("rope_scaling", "rope_local", "rope_layers", "rotary_dim"):
                if getattr(self, name) is not None:
                    _bad(name, "there is no rope_theta")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", checked_scaling("rope_scaling", self.rope_scaling, pairs))
        local = self.rope_local
        if local is not None:
            if self.sliding_windows is None:
                _bad("rope_local", "no layer has a window in sliding_windows")
            if set(local) != {"theta", "scaling"} or not _is_positive(local["theta"]):
                _bad("rope_local", "not an object with a positive theta, and scaling")
            scaling = local["scaling"]
            if scaling is not None:
                scaling = checked_scaling("rope_local.scaling", scaling, pairs)
            object.__setattr__(self, "rope_local", {"theta": float(local["theta"]), "scaling": scaling})
        ropes = [("rope_theta", self.rope_theta, self.rope_scaling)]
        if self.rope_local is not None:
            ropes.append(("rope_local", self.rope_local["theta"], self.rope_local["scaling"]))
        for name, theta, scaling in ropes:
            if theta is not None and not _can_turn(theta, scaling, pairs):
                _bad(name, "its frequencies" + (", with rope_scaling," if scaling else "") + " are beyond all numbers")

    def _check_experts(self) -> None:
        if self.n_experts is None:
            for name in ("experts_used", "expert_size", "expert_layers"):
                if getattr(self, name) is not None:
                    _bad(name, "there is no n_experts")
            return
        for name, limit in (
            ("n_experts", _MOST_EXPERTS),
            ("experts_used", self.n_experts),
            ("expert_size", _LARGEST_EXPERT),
        ):
            _check_between(name, getattr(self, name), limit)
        if self.mlp_bias or not self.mlp_gated:
            _bad("n_experts", "experts have a gate and no biases: mlp_gated, mlp_bias")
        if self.expert_layers is not None:
            layers = _checked_layers("expert_layers", self.expert_layers, self.n_layers)
            object.__setattr__(self, "expert_layers", layers)

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward step of a layer is a mixture of experts."""
        return self.n_experts is not None and (self.expert_layers is None or self.expert_layers[layer])

    def to_json(self) -> str:
        """The description as one line of JSON, fields in the order of the class."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ModelDescription:
        """The inverse of `to_json`. Raises ModelFileError naming a field that is unknown, missing or impossible."""
        try:
            values = text_json(text)
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

    @property
    def usual_context(self) -> int:
        """The default size of a cache, in tokens. If the rotary embedding has other frequencies for long texts, this is
        the length up to which those for short texts are valid."""
        scaling = self.rope_scaling
        if scaling is not None and scaling["type"] in ("longrope", "dynamic"):
            return min(self.context_length, int(scaling["original_context_length"]))
        return self.context_length

    def rope_tables(self, ctx: int | None = None) -> RopeTables:
        """The tables that the layers choose from; the first is that of most layers. Some kinds of scaling depend on
        `ctx`, the number of tokens that can be seen at once (by default the context the model was trained with)."""
        pairs = (self.rotary_dim or self.head_dim) // 2
        ropes: list[tuple[float, dict[str, Any] | None] | None] = []
        if self.rope_theta is not None:
            ropes.append((self.rope_theta, self.rope_scaling))
        if self.rope_local is not None:
            ropes.append((self.rope_local["theta"], self.rope_local["scaling"]))
        ropes.append(None)
        inv_freq, amplitude = (
            np.zeros((len(ropes), self.head_dim // 2)),
            np.ones((len(ropes), self.head_dim // 2)),
        )
        for i, rope in enumerate(ropes):
            if rope is not None:
                inv_freq[i, :pairs], amplitude[i, :pairs] = frequencies(*rope, pairs, ctx or self.context_length)
        none, windows = len(ropes) - 1, self.sliding_windows or (None,) * self.n_layers
        of_layer = [
            none
            if self.rope_theta is None or (self.rope_layers and not self.rope_layers[i])
            else int(self.rope_local is not None and windows[i] is not None)
            for i in range(self.n_layers)
        ]
        if none not in of_layer and none > 0:
            inv_freq, amplitude = inv_freq[:none], amplitude[:none]
        return RopeTables(inv_freq, amplitude, np.array(of_layer, np.int64))

    @property
    def n_tensors(self) -> int:
        """The number of the model's tensors, found without naming them."""
        ends = 2 + self.learned_positions + (not self.tie_embeddings) + (self.norm == "layer")
        n, norms = ends, len(self._layer_norms())
        for experts, layers in Counter(map(self.has_experts, range(self.n_layers))).items():
            matrices = self._layer_matrices(experts)
            n += layers * (norms + len(matrices) + sum(map(self._has_bias, matrices)))
        return n

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model and its shape, in file order: `tensors` as a table."""
        return dict(self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of the model, in file order.

        Matrices (packed weights, [rows, cols] = [out, in]) come first, then the float32 vectors [n].
        """
        yield "embed.weight", (self.vocab_size, self.hidden_size)
        if self.learned_positions:
            yield "positions.weight", (self.context_length, self.hidden_size)
        norms = self._layer_norms()
        matrices = {kind: self._layer_matrices(kind) for kind in set(map(self.has_experts, range(self.n_layers)))}
        for i in range(self.n_layers):
            for name, shape in matrices[self.has_experts(i)].items():
                yield f"layers.{i}.{name}.weight", shape
        if not self.tie_embeddings:
            yield "head.weight", (self.vocab_size, self.hidden_size)
        for i in range(self.n_layers):
            for name, size in norms.items():
                yield f"layers.{i}.{name}", (size,)
            for name, (rows, _) in matrices[self.has_experts(i)].items():
                if self._has_bias(name):
                    yield f"layers.{i}.{name}.bias", (rows,)
        yield "norm.weight", (self.hidden_size,)
        if self.norm == "layer":
            yield "norm.bias", (self.hidden_size,)

    def _layer_matrices(self, experts: bool) -> dict[str, tuple[int, int]]:
        """Matrices of a layer, with experts or without, and their shapes."""
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        matrices = {
            "attn.q": (queries, self.hidden_size),
            "attn.k": (keys, self.hidden_size),
            "attn.v": (keys, self.hidden_size),
            "attn.o": (self.hidden_size, queries),
        }
        stems, inner = ["mlp."], self.intermediate_size
        if experts:
            matrices["mlp.router"] = (self.n_experts or 0, self.hidden_size)
            stems, inner = [f"mlp.experts.{e}." for e in range(self.n_experts or 0)], self.expert_size or 0
        for stem in stems:
            if self.mlp_gated:
                matrices[f"{stem}gate"] = (inner, self.hidden_size)
            matrices[f"{stem}up"] = (inner, self.hidden_size)
            matrices[f"{stem}down"] = (self.hidden_size, inner)
        return matrices

    def _layer_norms(self) -> dict[str, int]:
        """Vectors of a layer's norms and their sizes."""
        parts = ("weight", "bias") if self.norm == "layer" else ("weight",)
        kinds = [kind for kind, there in (("norm", self.pre_norms), ("post_norm", self.post_norms)) if there]
        norms = {
            f"{step}.{kind}.{part}": self.hidden_size for kind in kinds for step in ("attn", "mlp") for part in parts
        }
        if self.qk_norm is not None:
            heads = (1, 1) if self.qk_norm == "head" else (self.n_heads, self.n_kv_heads)
            norms |= {f"attn.{x}_norm.weight": n * self.head_dim for x, n in zip("qk", heads, strict=True)}
        return norms

    def _has_bias(self, matrix: str) -> bool:
        if matrix == "attn.o" and self.attention_out_bias is not None:
            return self.attention_out_bias
        return self.attention_bias if matrix.startswith("attn.") else self.mlp_bias


_POSITIVE = (
    "norm_eps",
    "rope_theta",
    "attention_scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "attention_softcap",
    "logit_softcap",
)


def _bad(name: str, reason: str) -> NoReturn:
    raise ModelFileError(f"model description, field {name}: {reason}")


def _is_number(value: Any) -> bool:
    # An integer that no float can hold is as unusable as a string.
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 63
    return isinstance(value, float)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value > 0


def _check_type(name: str, annotation: str, value: Any) -> None:
    if value is None and annotation.endswith(" | None"):
        return
    checks: dict[str, Callable[[Any], bool]] = {
        "str": lambda v: isinstance(v, str),
        "bool": lambda v: isinstance(v, bool),
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "float": _is_number,
        "dict[str, Any]": lambda v: isinstance(v, dict),
        "tuple[int | None, ...]": lambda v: isinstance(v, (tuple, list)),
        "tuple[bool, ...]": lambda v: isinstance(v, (tuple, list)),
    }
    if not checks[annotation.removesuffix(" | None")](value):
        _bad(name, f"{shortened(value)} is not of type {annotation.replace('[str, Any]', '')}")


def shortened(value: Any) -> str:
    """A value from a file, for a message."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        text = "a deeply nested value" if isinstance(value, (list, dict)) else "an endless number"
    return text if len(text) <= 60 else text[:57] + "..."


def _check_between(name: str, value: int | None, limit: int) -> None:
    if value is None or not 1 <= value <= limit:
        _bad(name, f"{shortened(value)} is not between 1 and {limit}")


def _can_turn(theta: float, scaling: Mapping[str, Any] | None, pairs: int) -> bool:
    """Whether all angles and amplitudes are numbers to compute with, whatever the length of the text."""
    with np.errstate(all="ignore"):
        tables = [frequencies(theta, scaling, pairs, ctx) for ctx in (1, _LIMITS["context_length"])]
    turns = np.array([table for table, _ in tables])
    return bool(np.all((turns >= 0) & (turns <= _FASTEST))) and all(a <= _FLOAT32[1] for _, a in tables)


def _checked_windows(windows: Sequence[Any], n_layers: int) -> tuple[int | None, ...] | None:
    """The windows as a tuple, or None if no layer has one."""
    if len(windows) != n_layers:
        _bad("sliding_windows", f"{len(windows)} entries for {n_layers} layers")
    for window in windows:
        if window is not None and (type(window) is not int or not 1 <= window <= _LIMITS["context_length"]):
            _bad("sliding_windows", f"{shortened(window)} is not between 1 and {_LIMITS['context_length']}")
    return tuple(windows) if any(windows) else None


def _checked_layers(field: str, layers: Sequence[Any], n_layers: int) -> tuple[bool, ...] | None:
    """One truth value for each layer as a tuple, or None if all are true."""
    if len(layers) != n_layers or not all(isinstance(layer, bool) for layer in layers):
        _bad(field, f"{shortened(layers)} is not a truth value for each of {n_layers} layers")
    return None if all(layers) else tuple(layers)


# The kinds of rope_scaling and their fields: single numbers, or lists with one number for each pair of channels.
_SCALING_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_context_length"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_context_length"),
    "yarn": ("factor", "low", "high", "attention_factor"),
    "longrope": ("short_factors", "long_factors", "original_context_length", "attention_factor"),
    "factors": ("factors",),
}


def checked_scaling(field: str, scaling: Any, pairs: int) -> dict[str, Any]:
    """The scaling with its numbers as floats, in a fixed order. Raises ModelFileError, which names the field."""
    if not isinstance(scaling, dict):
        _bad(field, f"{shortened(scaling)} is not an object")
    kind = scaling.get("type")
    if not isinstance(kind, str) or kind not in _SCALING_FIELDS:
        _bad(field, f"type {shortened(kind)} is not supported ({', '.join(_SCALING_FIELDS)})")
    expected = _SCALING_FIELDS[kind]
    if set(scaling) != {"type", *expected}:
        _bad(field, f"type {kind} has exactly the fields {', '.join(expected)}")
    values: dict[str, Any] = {"type": kind}
    for name in expected:
        value, many = scaling[name], name.endswith("factors")
        numbers = value if many else [value]
        zero = name == "low" and _is_number(value) and value == 0  # the only number that may be 0
        if not isinstance(numbers, list) or not (all(map(_is_positive, numbers)) or zero):
            _bad(field, f"{name} = {shortened(value)} is not positive")
        if many and len(numbers) != pairs:
            _bad(field, f"{len(numbers)} {name} where the rotary width needs {pairs}")
        values[name] = [float(v) for v in numbers] if many else float(value)
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        _bad(field, "high_freq_factor is not above low_freq_factor")
    if kind == "yarn" and values["high"] <= values["low"]:
        _bad(field, "high is not above low")
    return values
