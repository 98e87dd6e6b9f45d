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
    for name, neutral in (
        ("attention.key_length_swa", head_dim),
        ("attention.value_length_swa", head_dim),
        ("rope.dimension_count_swa", meta.get("rope.dimension_count", head_dim)),
    ):
        meta.refuse(name, (neutral,), "layers with a window that differ in this are not supported")
    meta.refuse("attention.causal", (True,), "attention to later tokens: not a decoder")
    meta.refuse("nextn_predict_layers", (0,), "layers that predict further tokens are not supported")
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
        "attention_scale": _number_or_none(meta, "attention.scale") or head_dim**-0.5,
        "tie_embeddings": not facts.has("output.weight"),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
        "attention_out_bias": facts.has("blk.0.attn_output.bias"),
        "mlp_bias": facts.has("blk.0.ffn_down.bias"),
    }


def _number_or_none(meta: Fields, name: str) -> float | None:
    """A positive number; None if there is none or it is 0, which llama.cpp takes for the same."""
    value: float | None = None if meta.get(name) == 0 else meta.number(name, None)
    return value


def plain(meta: Fields, facts: GgufFacts, window_step: int | None = None) -> dict[str, Any]:
    """The architectures llama (Mistral and others are the same) and qwen2. If there is a window, each
    `window_step`-th layer has none."""
    for name in ("logit_scale", "embedding_scale", "residual_scale"):
        meta.refuse(name, (0.0, 1.0), "not supported for this architecture")
    values = _base(meta, facts)
    return {
        **values,
        "sliding_windows": _windows(meta, values["n_layers"], window_step or values["n_layers"] + 1, None),
        **_experts(meta, facts, values),
    }


def _experts(meta: Fields, facts: GgufFacts, values: dict[str, Any]) -> dict[str, Any]:
    """Experts as in Mixtral and Qwen 3: shares that sum to 1, and no expert shared by all tokens."""
    count = meta.integer("expert_count", 0, minimum=0)
    if not count:
        return {}
    meta.refuse("expert_shared_count", (0,), "not supported")
    meta.refuse("expert_group_count", (0, 1), "experts chosen by groups are not supported")
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
    """OLMo 2, and OLMo 3: of its layers three of four have a window, and their RoPE is not scaled."""
    values = plain(meta, facts, window_step=4)
    return values | {"qk_norm": "all", "pre_norms": False, "post_norms": True, **_local(meta, values, None)}


def granite(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    values = _base(meta, facts)
    if not meta.flag("rope.scaling.finetuned", True):  # granite's own use of that key: the model has no RoPE at all
        values |= {"rope_theta": None, "rope_scaling": None, "rotary_dim": None}
    return values | {
        "embedding_scale": _number_or_none(meta, "embedding_scale") or 1.0,
        "residual_scale": _number_or_none(meta, "residual_scale") or 1.0,
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
    }


def _local(
    meta: Fields, values: Mapping[str, Any], scaling: dict[str, Any] | None, theta: float | None = None
) -> dict[str, Any]:
    """The field rope_local: what layers with a window have instead of `values`' rope_theta and rope_scaling. `theta`:
    their base if the file does not say; by default that of the others."""
    local = {"theta": meta.number("rope.freq_base_swa", theta or values["rope_theta"]), "scaling": scaling}
    others = {"theta": values["rope_theta"], "scaling": values["rope_scaling"]}
    return {"rope_local": local if any(values["sliding_windows"]) and local != others else None}


def gemma2(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    values = _gemma(meta, facts, 46)
    values |= {
        "attention_softcap": meta.number("attn_logit_softcapping", 50.0),  # files may be older than these
        "logit_softcap": meta.number("final_logit_softcapping", 30.0),
        "sliding_windows": _windows(meta, values["n_layers"], 2, 4096),
    }
    return values | _local(meta, values, values["rope_scaling"])


def gemma3(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    values = _gemma(meta, facts, 62)
    values |= {
        "qk_norm": "head",
        "logit_softcap": _number_or_none(meta, "final_logit_softcapping"),
        "sliding_windows": _windows(meta, values["n_layers"], 6, None),
    }
    return values | _local(meta, values, None, meta.number("rope.local.freq_base", 1e4))  # ollama's name of it


def _windows(meta: Fields, n_layers: int, step: int, width: int | None) -> list[int | None]:
    """A window in every layer except each `step`-th (0: in every layer), unless the file says otherwise."""
    width = meta.integer("attention.sliding_window", width, minimum=0) or None
    pattern = meta.get("attention.sliding_window_pattern", step)
    if type(pattern) is int and pattern >= 0:
        pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(n_layers)]
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
