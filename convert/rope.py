"""Rotary embeddings as checkpoints describe them: from a config or GGUF metadata to the description's fields."""

from __future__ import annotations

import math
from typing import Any

from kvrun.convert.fields import REQUIRED, Fields, shown
from kvrun.errors import ConvertError

KINDS = "default, linear, dynamic, yarn, longrope, llama3"


def rope_from_config(
    config: Fields, head_dim: int, theta: float = 10000.0, context: int = 2048, original: int | None = None
) -> dict[str, Any]:
    """The fields `rope_theta`, `rope_scaling` and `rotary_dim` from the older rope_theta and rope_scaling, or from
    rope_parameters.

    `theta`, `context` and `original` are the family's defaults for the base, max_position_embeddings and
    original_max_position_embeddings.
    """
    name = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    rope = config.section(name)
    partial = config.number("partial_rotary_factor", 1.0)
    theta = config.number("rope_theta", theta)
    if rope is not None:
        partial = rope.number("partial_rotary_factor", partial)
        theta = rope.number("rope_theta", theta)
    width = int(head_dim * min(partial, 2.0))
    if not 2 <= width <= head_dim or width % 2:
        (rope if rope is not None and "partial_rotary_factor" in rope else config).fail(
            "partial_rotary_factor",
            f"{partial} of a head_dim of {head_dim} is not an even number of channels",
        )
    context = config.integer("max_position_embeddings", context)
    original = config.integer("original_max_position_embeddings", original)
    return {
        "rope_theta": theta,
        "rope_scaling": None if rope is None else scaling_of(config, name, rope, theta, width, context, original),
        "rotary_dim": None if width == head_dim else width,
    }


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
    known = "rope_type" in rope or "type" in rope or "rope_theta" not in rope
    kind = rope.text("rope_type" if "rope_type" in rope else "type", REQUIRED if known else "default")
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
        scales = [rope.number(key, None) for key in ("mscale", "mscale_all_dim")]
        m = _yarn_amplitude(factor)
        if None not in scales:
            m = _yarn_amplitude(factor, scales[0]) / _yarn_amplitude(factor, scales[1])
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    return yarn(rope.where, theta, width, factor, original, fast, slow, m, rope.flag("truncate", True))


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
    theta: float = 10000.0,
) -> dict[str, Any]:
    """The same fields from GGUF metadata. `factors`: the values of rope_freqs.weight; `long_short`: those of
    rope_factors_long.weight and rope_factors_short.weight."""
    theta, width = meta.number("rope.freq_base", theta), meta.integer("rope.dimension_count", head_dim)
    if width > head_dim or width % 2:
        meta.fail("rope.dimension_count", f"{width} is not an even number up to the head's {head_dim}")
    fields = {"rope_theta": theta, "rotary_dim": None if width == head_dim else width}
    kind = meta.text("rope.scaling.type", "linear" if "rope.scale_linear" in meta else "none")
    context = meta.integer("context_length", 2048)
    original = meta.integer("rope.scaling.original_context_length", context)
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if kind == "yarn" and factors is None:
        m = meta.number("rope.scaling.attn_factor", 1.0) * _yarn_amplitude(factor)
        fast, slow = meta.number("rope.scaling.yarn_beta_fast", 32.0), meta.number("rope.scaling.yarn_beta_slow", 1.0)
        return fields | {"rope_scaling": yarn(meta.where, theta, width, factor, original, fast, slow, m)}
    if kind not in ("none", "linear") and not (kind == "longrope" and long_short):
        meta.fail("rope.scaling.type", f"{shown(kind)} is not supported yet (supported: none, linear, yarn, longrope)")
    if long_short is not None:
        return fields | {
            "rope_scaling": {
                "type": "longrope",
                "short_factors": long_short[1],
                "long_factors": long_short[0],
                "original_context_length": float(original),
                "attention_factor": meta.number(
                    "rope.scaling.attn_factor", _longrope_amplitude(meta.where, context / original, original)
                ),
            }
        }
    factor = factor if kind == "linear" else 1.0
    if factors is not None:
        return fields | {"rope_scaling": {"type": "factors", "factors": [value * factor for value in factors]}}
    return fields | {"rope_scaling": {"type": "linear", "factor": factor} if factor != 1.0 else None}
