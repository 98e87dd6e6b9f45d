"""What config.json says, family by family: the fields of `ModelDescription`, defaults as in transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kvrun.convert.fields import MAX_LAYERS, REQUIRED, Fields
from kvrun.convert.rope import FULL, SLIDING, rope_from_config, ropes_by_kind

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def head_dim_of(fields: Fields, name: str, hidden: int, heads: int) -> int:
    if hidden % heads:
        fields.fail(name, f"{heads} does not divide the hidden size {hidden}")
    return hidden // heads


def refuse_other_attention(config: Fields) -> None:
    """Raise ConvertError for what transformers obeys in configs of any class."""
    for name in ("is_causal", "use_bidirectional_attention"):
        config.refuse(name, (name == "is_causal",), "attention to later tokens: not a decoder")
    config.refuse("per_layer_config", ({},), "layers that differ in more than their kind are not supported")


def _sizes(config: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
    def integer(name: str, maximum: int = (1 << 31) - 1) -> int:
        value: int = config.integer(name, defaults.get(name, REQUIRED), maximum=maximum)
        return value

    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    head_dim = config.integer("head_dim", defaults.get("head_dim"))
    if head_dim is None:
        head_dim = head_dim_of(config, "num_attention_heads", hidden, heads)
    kv_heads = defaults.get("num_key_value_heads", heads)
    return {
        "vocab_size": integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": integer("intermediate_size"),
        "n_layers": integer("num_hidden_layers", MAX_LAYERS),
        "n_heads": heads,
        "n_kv_heads": config.integer("num_key_value_heads", heads if config.given("num_key_value_heads") else kv_heads),
        "head_dim": head_dim,
        "context_length": config.integer("max_position_embeddings", defaults.get("max_position_embeddings", 2048)),
        "norm_eps": config.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        "attention_scale": head_dim**-0.5,
        "tie_embeddings": config.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
        "mlp_bias": False,
    }


def llama_like(config: Fields, **defaults: Any) -> dict[str, Any]:
    """A model of Llama's shape; `defaults` are those of the family's config that differ from Llama's."""
    sizes = _llama_sizes(config, defaults)
    theta = defaults.get("rope_theta", 10000.0)
    return sizes | rope_from_config(config, sizes["head_dim"], theta, sizes["context_length"])


def _llama_sizes(config: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The same without RoPE."""
    return {
        **_sizes(config, defaults),
        "activation": config.choice("hidden_act", ACTIVATIONS, "silu"),
        "attention_bias": config.flag("attention_bias", False),
    }


def llama(config: Fields) -> dict[str, Any]:
    """Llama 1 to 3, SmolLM2, TinyLlama."""
    return llama_like(config) | {"mlp_bias": config.flag("mlp_bias", False)}


def mistral(config: Fields) -> dict[str, Any]:
    """If sliding_window is absent, the window is 4096 tokens; if it is null, there is none."""
    values = llama_like(config, max_position_embeddings=131072, num_key_value_heads=8) | {"attention_bias": False}
    width = config.integer("sliding_window", None if config.given("sliding_window") else 4096)
    return values | {"sliding_windows": [width] * values["n_layers"]}


def qwen2(config: Fields) -> dict[str, Any]:
    values = llama_like(config, max_position_embeddings=32768)
    return values | {
        "attention_bias": True,
        "attention_out_bias": False,
        "sliding_windows": _qwen_windows(config, values["n_layers"]),
    }


def qwen3(config: Fields) -> dict[str, Any]:
    values = llama_like(config, max_position_embeddings=32768, head_dim=128)
    return values | {"qk_norm": "head", "sliding_windows": _qwen_windows(config, values["n_layers"])}


def _qwen_windows(config: Fields, n_layers: int) -> list[int | None] | None:
    """Only if use_sliding_window says so do layers have windows: those from max_window_layers on."""
    if not config.flag("use_sliding_window", False):
        kinds = config.get("layer_types", [])
        if isinstance(kinds, list) and SLIDING in kinds:
            config.fail("use_sliding_window", f"not true, but layer_types has {SLIDING}")
        return None
    first = config.integer("max_window_layers", 28, minimum=0)
    slides = "sliding_window" in config or not config.given("sliding_window")
    return windows_of(config, n_layers, [SLIDING if slides and i >= first else FULL for i in range(n_layers)], 4096)


def mixtral(config: Fields) -> dict[str, Any]:
    """Mistral with experts instead of the feed-forward step, and by default no window."""
    values = llama_like(
        config, rms_norm_eps=1e-5, max_position_embeddings=131072, num_key_value_heads=8, rope_theta=1e6
    )
    width = config.integer("sliding_window", None)
    return values | {
        "attention_bias": False,
        "sliding_windows": [width] * values["n_layers"],
        "n_experts": config.integer("num_local_experts", 8),
        "experts_used": config.integer("num_experts_per_tok", 2),
        "expert_size": values["intermediate_size"],
    }


def qwen3_moe(config: Fields) -> dict[str, Any]:
    """Qwen 3 with experts in every decoder_sparse_step-th layer that mlp_only_layers does not name."""
    values = llama_like(config, max_position_embeddings=32768, num_key_value_heads=4)
    n = values["n_layers"]
    step, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        config.fail("mlp_only_layers", "not a list of layer numbers")
    width = None
    if config.flag("use_sliding_window", False):
        width = config.integer("sliding_window", None if config.given("sliding_window") else 4096)
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    return values | {
        "qk_norm": "head",
        "sliding_windows": [width] * n,
        "n_experts": config.integer(count, 128),
        "experts_used": config.integer("num_experts_per_tok", 8),
        "expert_size": config.integer("moe_intermediate_size", 768),
        "normalize_experts": config.flag("norm_topk_prob", False),
        "expert_layers": [i not in dense and (i + 1) % step == 0 for i in range(n)],
    }


def windows_of(config: Fields, n_layers: int, kinds: list[str], width: int | None) -> list[int | None]:
    """The sliding window of each layer, from layer_types or else `kinds`; `width` is the default of sliding_window."""
    kinds = config.get("layer_types", kinds)
    if not isinstance(kinds, list) or len(kinds) != n_layers or not set(map(str, kinds)) <= {FULL, SLIDING}:
        config.fail("layer_types", f"not {FULL} or {SLIDING} for each of {n_layers} layers")
    width = config.integer("sliding_window", None if config.given("sliding_window") else width)
    if width is None and SLIDING in kinds:
        config.fail("sliding_window", f"missing or null, but layers have {SLIDING}")
    return [width if kind == SLIDING else None for kind in kinds]


def smollm3(config: Fields) -> dict[str, Any]:
    """Every fourth layer has no RoPE."""
    values = llama_like(
        config,
        rope_theta=2e6,
        max_position_embeddings=32768,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    n = values["n_layers"]
    step = config.integer("no_rope_layer_interval", 4)
    layers = config.get("no_rope_layers", [int((i + 1) % step != 0) for i in range(n)])  # 1 where there is RoPE
    if not isinstance(layers, list) or len(layers) != n or not all(layer in (0, 1) for layer in layers):
        config.fail("no_rope_layers", f"not 0 or 1 for each of {n} layers")
    slides = config.flag("use_sliding_window", False) and "sliding_window" in config
    windows = windows_of(config, n, [SLIDING if slides and not rope else FULL for rope in layers], None)
    return values | {
        "mlp_bias": config.flag("mlp_bias", False),
        "rope_layers": [bool(rope) for rope in layers],
        "sliding_windows": windows,
    }


_OLMO = {"rms_norm_eps": 1e-5}
_OLMO_NORMS = {"qk_norm": "all", "pre_norms": False, "post_norms": True}


def olmo2(config: Fields) -> dict[str, Any]:
    """Norms after attention and the feed-forward step instead of before them."""
    return llama_like(config, **_OLMO) | _OLMO_NORMS


def olmo3(config: Fields) -> dict[str, Any]:
    """OLMo 2 with a sliding window, and RoPE of its own, in three of four layers. transformers takes a rope_theta
    outside of rope_parameters for the layers that see everything, but not for the others."""
    values = _llama_sizes(config, _OLMO)
    n = values["n_layers"]
    windows = windows_of(config, n, _kinds(n, 4), 4096)
    thetas = config.number("rope_theta", 5e5), 5e5
    return values | _OLMO_NORMS | {"sliding_windows": windows} | _local_ropes(config, values, windows, thetas)


def _kinds(n_layers: int, step: int) -> list[str]:
    """A sliding window in all layers but each `step`-th."""
    return [SLIDING if (i + 1) % step else FULL for i in range(n_layers)]


def _local_ropes(
    config: Fields, values: Mapping[str, Any], windows: list[int | None], thetas: tuple[float, float]
) -> dict[str, Any]:
    ropes = ropes_by_kind(config, values["head_dim"], values["context_length"], thetas)
    return ropes if any(windows) else ropes | {"rope_local": None}


def granite(config: Fields) -> dict[str, Any]:
    """Llama with four multipliers."""
    return llama_like(config) | {
        "mlp_bias": config.flag("mlp_bias", False),
        "attention_scale": config.number("attention_multiplier", 1.0),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logit_scale": 1 / config.number("logits_scaling", 1.0),
    }


def phi3(config: Fields) -> dict[str, Any]:
    """`original_max_position_embeddings`, outside of the scaling, belongs to LongRoPE, which early configs call "su"
    or "yarn"."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.section(name)
        if rope is not None and rope.get("rope_type", rope.get("type")) == "yarn":
            config = config.without(name).or_else(name, {**config.get(name), "rope_type": "longrope"})
    values = _llama_sizes(config, {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096})
    turns = rope_from_config(config, values["head_dim"], 10000.0, values["context_length"], 4096, partial=True)
    width = config.integer("sliding_window", None)
    return values | turns | {"attention_bias": False, "sliding_windows": [width] * values["n_layers"]}


_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def _gemma(config: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
    sizes = _sizes(config, {**_GEMMA, **defaults})
    scalar = config.number("query_pre_attn_scalar", 256.0)
    return {
        **sizes,
        "activation": config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "attention_bias": config.flag("attention_bias", False),
        "attention_scale": scalar**-0.5,
        "embedding_scale": math.sqrt(sizes["hidden_size"]),
        "post_norms": True,
    }


def gemma2(config: Fields) -> dict[str, Any]:
    """Every other layer has a sliding window, starting with the first. A soft cap of null means that there is none."""
    values = _gemma(config, {"vocab_size": 256000, "max_position_embeddings": 8192})
    n = values["n_layers"]
    kinds = [FULL if i % 2 else SLIDING for i in range(n)]
    caps = {
        ours: config.number(theirs, None if config.given(theirs) else default)
        for ours, theirs, default in (
            ("attention_softcap", "attn_logit_softcapping", 50.0),
            ("logit_softcap", "final_logit_softcapping", 30.0),
        )
    }
    return {
        **values,
        **rope_from_config(config, values["head_dim"], context=values["context_length"]),
        **caps,
        "sliding_windows": windows_of(config, n, kinds, 4096),
    }


def gemma3(config: Fields) -> dict[str, Any]:
    """Five layers with a sliding window and a rotary base of their own to one that sees everything."""
    values = _gemma(config, {"vocab_size": 262208, "max_position_embeddings": 131072})
    n = values["n_layers"]
    windows = windows_of(config, n, _kinds(n, config.integer("sliding_window_pattern", 6)), 4096)
    thetas = config.number("rope_theta", 1e6), config.number("rope_local_base_freq", 1e4)
    return {
        **values,
        "qk_norm": "head",
        "logit_softcap": config.number("final_logit_softcapping", None),
        "sliding_windows": windows,
        **_local_ropes(config, values, windows, thetas),
    }


def gpt2(config: Fields) -> dict[str, Any]:
    """Learned positions, LayerNorm, no gate; the width of the heads follows from their number."""
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        config.refuse(name, (False,), "not supported")
    hidden, heads = config.integer("n_embd", 768), config.integer("n_head", 12)
    head_dim = head_dim_of(config, "n_head", hidden, heads)
    return {
        "vocab_size": config.integer("vocab_size", 50257),
        "hidden_size": hidden,
        "intermediate_size": config.integer("n_inner", 4 * hidden),
        "n_layers": config.integer("n_layer", 12, maximum=MAX_LAYERS),
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": head_dim,
        "context_length": config.integer("n_positions", 1024),
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "norm": "layer",
        "activation": config.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "rope_theta": None,
        "rope_scaling": None,
        "attention_scale": head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0,
        "tie_embeddings": config.flag("tie_word_embeddings", True),
        "attention_bias": True,
        "mlp_bias": True,
        "mlp_gated": False,
        "learned_positions": True,
    }
