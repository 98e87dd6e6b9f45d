"""Rotary embeddings as checkpoints describe them: from a config or GGUF metadata to the description's fields."""

from __future__ import annotations

import math
from typing import Any

from kvrun.convert.fields import REQUIRED, Fields, shown
from kvrun.errors import ConvertError

KINDS = "default, linear, dynamic, yarn, longrope, llama3"
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as configs call them: those that see everything, and those with a sliding window."""
_PARTIAL = "transformers ignores it in models of this class, whose RoPE turns all channels of a head; take it out"


def rope_from_config(
    config: Fields,
    head_dim: int,
    theta: float = 10000.0,
    context: int = 2048,
    original: int | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """The fields `rope_theta`, `rope_scaling` and `rotary_dim` from the older rope_theta and rope_scaling, or from
    rope_parameters. If a config has both, rope_scaling counts, as in transformers, unless it is empty.

    `theta`, `context` and `original` are the family's defaults for the base, max_position_embeddings and
    original_max_position_embeddings. `partial`: the family obeys partial_rotary_factor.
    """
    older, newer = config.section("rope_scaling"), config.section("rope_parameters")
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = (older if name == "rope_scaling" else newer) or Fields({}, config.where)
    for kind in (FULL, SLIDING):
        rope.refuse(kind, (), "layers of this class have one RoPE and not one for each kind")
    theta = rope.number("rope_theta", config.number("rope_theta", theta))
    width = _partial_width(config, rope, head_dim) if partial else head_dim
    if not partial:
        config.refuse("partial_rotary_factor", (1,), _PARTIAL)
        rope.refuse("partial_rotary_factor", (1,), _PARTIAL)
    context = config.integer("max_position_embeddings", context)
    original = config.integer("original_max_position_embeddings", original)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling_of(config, name, rope, theta, width, context, original),
        "rotary_dim": None if width == head_dim else width,
    }


def _partial_width(config: Fields, rope: Fields, head_dim: int) -> int:
    """Channels of a head that turn."""
    partial = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    width = int(head_dim * min(partial, 2.0))
    if not 2 <= width <= head_dim or width % 2:
        (rope if "partial_rotary_factor" in rope else config).fail(
            "partial_rotary_factor", f"{partial} of a head_dim of {head_dim} is not an even number of channels"
        )
    return width


def ropes_by_kind(config: Fields, head_dim: int, context: int, thetas: tuple[float, float]) -> dict[str, Any]:
    """The fields `rope_theta`, `rope_scaling` and `rope_local` of a family whose layers with a sliding window have a
    RoPE of their own: from rope_parameters with an object for each kind of layer, or from the older rope_scaling, which
    is for layers that see everything. `thetas`: the bases of these and of the others, if no object has one.
    """
    parameters = config.section("rope_parameters")
    if parameters is not None and config.get("rope_parameters") and not (FULL in parameters or SLIDING in parameters):
        config.fail("rope_parameters", f"not an object for each kind of layer, {FULL} and {SLIDING}")
    ropes = []
    for kind, theta in zip((FULL, SLIDING), thetas, strict=True):
        rope = (parameters.section(kind) if parameters is not None else None) or Fields({}, config.where)
        older = config.section("rope_scaling") if kind == FULL else None
        if older is not None and config.get("rope_scaling"):
            if older.get("type", "default") != "default" and "rope_type" not in older:
                older.fail("type", "newer versions of transformers ignore it in this class; call it rope_type")
            rope = Fields({**_object(parameters, kind), **config.get("rope_scaling")}, older.where)
        rope.refuse("partial_rotary_factor", (1,), _PARTIAL)
        theta = rope.number("rope_theta", theta)
        # transformers looks for `truncate` beside the objects instead of in them, and so never finds it
        scaling = scaling_of(config, kind, rope.without("truncate"), theta, head_dim, context)
        ropes.append({"theta": theta, "scaling": scaling})
    return {"rope_theta": ropes[0]["theta"], "rope_scaling": ropes[0]["scaling"], "rope_local": ropes[1]}


def _object(fields: Fields | None, name: str) -> dict[str, Any]:
    value: dict[str, Any] = fields.get(name, {}) if fields is not None else {}
    return value


def scaling_of(
    config: Fields,
    name: str,
    rope: Fields,
    theta: float,
    width: int,
    context: int,
    original: int | None = None,
) -> dict[str, Any] | None:
    """The description's rope_scaling from the object `rope`, which is `config`'s field `name`.

    `width`: the number of channels that turn. `original`: the config's original context, if it is not in the object.
    """
    scales = any(key in rope for key in ("factor", "short_factor", "long_factor", "low_freq_factor"))
    kind = rope.text("rope_type" if "rope_type" in rope else "type", REQUIRED if scales else "default")
    if kind == "default":
        return None
    if kind == "linear":
        return {"type": "linear", "factor": rope.number("factor")}
    if kind == "dynamic":
        return {"type": "dynamic", "factor": rope.number("factor"), "original_context_length": float(context)}
    if original is None:
        original = rope.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        numbers = {key: rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return {"type": "llama3", **numbers, "original_context_length": float(original)}
    if kind == "yarn":
        return _yarn(rope, theta, width, context, original)
    if kind in ("longrope", "su"):
        return _longrope(rope, context, original)
    return config.fail(name, f"rope type {shown(kind)} is not supported yet (supported: {KINDS})")


def _yarn(rope: Fields, theta: float, width: int, context: int, original: int) -> dict[str, Any]:
    factor = rope.number("factor", context / original)
    m = rope.number("attention_factor", None)
    if m is None:
        scales = [_unless_0(rope, key, None) for key in ("mscale", "mscale_all_dim")]
        m = _yarn_amplitude(factor)
        if None not in scales:
            m = _yarn_amplitude(factor, scales[0]) / _yarn_amplitude(factor, scales[1])
    fast, slow = _unless_0(rope, "beta_fast", 32.0), _unless_0(rope, "beta_slow", 1.0)
    return yarn(rope.where, theta, width, factor, original, fast, slow, m, rope.flag("truncate", True))


def _unless_0(rope: Fields, name: str, default: float | None) -> Any:
    """A positive number; in transformers, 0 stands for the default too."""
    return default if rope.get(name) == 0 else rope.number(name, default)


def _yarn_amplitude(factor: float, m: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def yarn(
    where: str,
    theta: float,
    width: int,
    factor: float,
    original: int,
    fast: float,
    slow: float,
    m: float,
    whole: bool = True,
) -> dict[str, Any]:
    """YaRN (Peng et al. 2023): pairs that make more than `fast` turns in the original context are kept, those with
    fewer than `slow` are slowed by the factor. `whole`: the ramp between begins and ends at whole pairs. Raises
    ConvertError, which names `where`, if the numbers leave no ramp."""

    def pair(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    try:
        low, high = pair(fast), pair(slow)
        if whole:
            low, high = math.floor(low), math.ceil(high)
    except (ArithmeticError, ValueError):
        raise ConvertError(
            f"{where}: YaRN is not possible with a base of {theta:g} and betas of {fast:g} and {slow:g}"
        ) from None
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    return {"type": "yarn", "factor": factor, "low": float(low), "high": float(high), "attention_factor": m}


def _longrope(rope: Fields, context: int, original: int) -> dict[str, Any]:
    factor = rope.number("factor", context / original)
    return {
        "type": "longrope",
        "short_factors": rope.get("short_factor", REQUIRED),
        "long_factors": rope.get("long_factor", REQUIRED),
        "original_context_length": float(original),
        "attention_factor": rope.number("attention_factor", _longrope_amplitude(rope.where, factor, original)),
    }


def _longrope_amplitude(where: str, factor: float, original: int) -> float:
    if factor <= 1:
        return 1.0
    if original < 2:
        raise ConvertError(f"{where}: LongRoPE is not possible with an original context of {original} token")
    return math.sqrt(1 + math.log(factor) / math.log(original))


def rope_from_gguf(
    meta: Fields,
    head_dim: int,
    factors: list[float] | None,
    long_short: tuple[list[float], list[float]] | None = None,
) -> dict[str, Any]:
    """The same fields from GGUF metadata, where what is absent means what llama.cpp takes it for.

    `factors`: the values of rope_freqs.weight; `long_short`: those of rope_factors_long.weight and
    rope_factors_short.weight.
    """
    theta, width = meta.number("rope.freq_base", 10000.0), meta.integer("rope.dimension_count", head_dim)
    if width > head_dim or width % 2:
        meta.fail("rope.dimension_count", f"{width} is not an even number up to the head's {head_dim}")
    context = meta.integer("context_length", 2048)
    original = meta.integer("rope.scaling.original_context_length", context)
    kind, factor = meta.choice("rope.scaling.type", _GGUF_KINDS, "linear"), _gguf_factor(meta)
    amplitude = meta.number("rope.scaling.attn_factor", 1.0)
    _refuse_two_scalings(meta, kind, factors is not None, long_short is not None)
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        fast, slow = meta.number("rope.scaling.yarn_beta_fast", 32.0), meta.number("rope.scaling.yarn_beta_slow", 1.0)
        amplitude *= _yarn_amplitude(factor)
        scaling = yarn(meta.where, theta, width, factor, original, fast, slow, amplitude)
    elif long_short is not None or amplitude != 1:  # without factors for long texts, an amplitude takes the same form
        long, short = long_short or (factors or [1.0] * (width // 2),) * 2
        scaling = {
            "type": "longrope",
            "short_factors": _times(short, factor),
            "long_factors": _times(long, factor),
            "original_context_length": float(original if long_short is not None else context),
            "attention_factor": amplitude,
        }
    elif factors is not None:
        scaling = {"type": "factors", "factors": _times(factors, factor)}
    elif factor != 1.0:
        scaling = {"type": "linear", "factor": factor}
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_dim": None if width == head_dim else width}


_GGUF_KINDS = {kind: kind for kind in ("none", "linear", "yarn", "longrope")}


def _gguf_factor(meta: Fields) -> float:
    """What frequencies are divided by, which files without a type have too; 0 is written for 1."""
    if meta.get("rope.scaling.type") == "none":
        return 1.0
    name = "rope.scaling.factor" if "rope.scaling.factor" in meta else "rope.scale_linear"
    return 1.0 if meta.get(name) == 0 else float(meta.number(name, 1.0))


def _refuse_two_scalings(meta: Fields, kind: str, factors: bool, long_short: bool) -> None:
    if kind == "longrope" and not long_short:
        meta.fail("rope.scaling.type", "'longrope', but rope_factors_long.weight and _short.weight are missing")
    tensors = "rope_factors_long.weight" if long_short else "rope_freqs.weight"
    if (kind == "yarn" and (factors or long_short)) or (factors and long_short):
        other = "'yarn'" if kind == "yarn" else "rope_freqs.weight"
        meta.fail("rope.scaling.type", f"{other} and the tensor {tensors} are two scalings; a model can have one")


def _times(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]
