"""What GGUF metadata says, architecture by architecture: the fields of `ModelDescription`.

What is the same for all models of an architecture is often not in the file; it is written down here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvrun.convert.family_config import head_dim_of
from kvrun.convert.fields import MAX_LAYERS, Fields
from kvrun.convert.rope import rope_from_gguf


@dataclass(frozen=True)
class GgufFacts:
    """What can only be learned from the tensors of a GGUF file."""

    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: list[float] | None
    long_short: tuple[list[float], list[float]] | None = None
    """The long and the short factors of LongRoPE."""

    def has(self, name: str) -> bool:
        return name in self.shapes


def _base(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    """Sizes and RoPE, as every architecture but GPT-2 has them."""
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_dim = meta.integer("attention.key_length", None)
    if head_dim is None:
        head_dim = head_dim_of(meta, "attention.head_count", hidden, heads)
    meta.refuse("attention.value_length", (head_dim,), "different from the length of keys: not supported yet")
    return {
        "vocab_size": meta.integer("vocab_size", facts.shapes.get("token_embd.weight", (0,))[0]),
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length", meta.integer("expert_feed_forward_length", None)),
        "n_layers": meta.integer("block_count", maximum=MAX_LAYERS),
        "n_heads": heads,
        "n_kv_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "context_length": meta.integer("context_length", 2048),
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "activation": "silu",
        **rope_from_gguf(meta, head_dim, facts.rope_factors, facts.long_short),
        "attention_scale": meta.number("attention.scale", head_dim**-0.5),
        "tie_embeddings": not facts.has("output.weight"),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
        "attention_out_bias": facts.has("blk.0.attn_output.bias"),
        "mlp_bias": facts.has("blk.0.ffn_down.bias"),
    }


def plain(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    """The architectures llama (Mistral and others are the same) and qwen2."""
    for name in ("logit_scale", "embedding_scale", "residual_scale"):
        meta.refuse(name, (0.0, 1.0), "not supported for this architecture")
    values = _base(meta, facts)
    return {
        **values,
        "sliding_windows": _windows(meta, values["n_layers"], values["n_layers"] + 1, None),
        **_experts(meta, facts, values),
    }


def _experts(meta: Fields, facts: GgufFacts, values: dict[str, Any]) -> dict[str, Any]:
    """Experts as in Mixtral and Qwen 3: shares that sum to 1, and no expert shared by all tokens."""
    count = meta.integer("expert_count", 0, minimum=0)
    if not count:
        return {}
    meta.refuse("expert_shared_count", (0,), "not supported")
    layers = [facts.has(f"blk.{i}.ffn_gate_inp.weight") for i in range(values["n_layers"])]
    if not any(layers):
        meta.fail("expert_count", f"{count}, but no layer has a ffn_gate_inp.weight")
    return {
        "n_experts": count,
        "experts_used": meta.integer("expert_used_count"),
        "expert_size": meta.integer("expert_feed_forward_length", values["intermediate_size"]),
        "expert_layers": layers,
    }


def qwen3(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    return plain(meta, facts) | {"qk_norm": "head"}


def smollm3(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    values = plain(meta, facts)
    return values | {"rope_layers": [(i + 1) % 4 != 0 for i in range(values["n_layers"])]}


def olmo2(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    return plain(meta, facts) | {"qk_norm": "all", "pre_norms": False, "post_norms": True}


def granite(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    return _base(meta, facts) | {
        "embedding_scale": meta.number("embedding_scale", 1.0),
        "residual_scale": meta.number("residual_scale", 1.0),
        "logit_scale": 1 / meta.number("logit_scale", 1.0),
    }


def phi3(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    return plain(meta, facts)


def _gemma(meta: Fields, facts: GgufFacts, largest: int) -> dict[str, Any]:
    """`largest`: layers of the 27B model, which scales its queries by another width than that of a head."""
    values = _base(meta, facts)
    if values["n_layers"] == largest and "attention.scale" not in meta:
        values["attention_scale"] = (values["hidden_size"] / values["n_heads"]) ** -0.5
    return values | {
        "activation": "gelu_tanh",
        "embedding_scale": math.sqrt(values["hidden_size"]),
        "post_norms": True,
        "attention_softcap": meta.number("attn_logit_softcapping", None),
        "logit_softcap": meta.number("final_logit_softcapping", None),
    }


def gemma2(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    values = _gemma(meta, facts, 46)
    caps = {"attention_softcap": 50.0, "logit_softcap": 30.0}  # for files older than these fields
    return {
        **values,
        **{name: values[name] or cap for name, cap in caps.items()},
        "sliding_windows": _windows(meta, values["n_layers"], 2, 4096),
    }


def gemma3(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    values = _gemma(meta, facts, 62)
    if "rope.freq_base" not in meta:
        values["rope_theta"] = 1e6
    windows = _windows(meta, values["n_layers"], 6, None)
    local = {"theta": meta.number("rope.freq_base_swa", 1e4), "scaling": None}
    return values | {
        "qk_norm": "head",
        "sliding_windows": windows,
        "rope_local": local if any(windows) else None,
    }


def _windows(meta: Fields, n_layers: int, step: int, width: int | None) -> list[int | None]:
    """A window in every layer except each `step`-th, unless the file says otherwise."""
    width = meta.integer("attention.sliding_window", width, minimum=0) or None
    pattern = meta.get("attention.sliding_window_pattern", step)
    if type(pattern) is int and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(n_layers)]
    if not isinstance(pattern, list) or len(pattern) < n_layers or not all(kind in (0, 1) for kind in pattern):
        meta.fail("attention.sliding_window_pattern", f"not a truth value for each of {n_layers} layers")
    return [width if slides else None for slides in pattern[:n_layers]]


def gpt2(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_dim = head_dim_of(meta, "attention.head_count", hidden, heads)
    positions = facts.shapes.get("position_embd.weight", (1024,))[0]
    return {
        "vocab_size": meta.integer("vocab_size", facts.shapes.get("token_embd.weight", (0,))[0]),
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length", 4 * hidden),
        "n_layers": meta.integer("block_count", maximum=MAX_LAYERS),
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": head_dim,
        "context_length": meta.integer("context_length", positions),
        "norm_eps": meta.number("attention.layer_norm_epsilon"),
        "norm": "layer",
        "activation": "gelu_tanh",
        "rope_theta": None,
        "rope_scaling": None,
        "attention_scale": head_dim**-0.5,
        "tie_embeddings": not facts.has("output.weight"),
        "attention_bias": True,
        "mlp_bias": True,
        "mlp_gated": False,
        "learned_positions": True,
    }
