"""The table of model families: from the names and the config of a checkpoint to ours.

To add a family, add a `Family`: its class and type names, a function that reads its config.json, one that
reads its GGUF metadata, and its tensor names where they differ from Llama's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvrun.convert.fields import REQUIRED, Fields
from kvrun.description import ModelDescription
from kvrun.errors import ConvertError

# Ours -> (Hugging Face, GGUF), without ".weight" and ".bias"; {i} is the layer.
LLAMA_NAMES = {
    "embed": ("embed_tokens", "token_embd"),
    "norm": ("norm", "output_norm"),
    "head": ("lm_head", "output"),
    "layers.{i}.attn.norm": ("layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
    "layers.{i}.attn.q": ("layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
    "layers.{i}.attn.k": ("layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
    "layers.{i}.attn.v": ("layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
    "layers.{i}.attn.o": ("layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
    "layers.{i}.mlp.norm": ("layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    "layers.{i}.mlp.gate": ("layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
    "layers.{i}.mlp.up": ("layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
    "layers.{i}.mlp.down": ("layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
}
HF, GGUF = 0, 1
ACTIVATIONS = {"silu": "silu", "swish": "silu"}


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family are read. The two functions give the fields of `ModelDescription`.

    `from_gguf` takes the metadata under the architecture's prefix, and what the tensors say.
    """

    architecture: str
    hf_class: str
    hf_type: str
    gguf_type: str
    from_config: Callable[[Fields], dict[str, Any]]
    from_gguf: Callable[[Fields, GgufFacts], dict[str, Any]]
    names: Mapping[str, tuple[str, str]] = field(default_factory=lambda: LLAMA_NAMES)
    gguf_permuted: tuple[str, ...] = ("attn.q", "attn.k")
    """Tensors whose rows GGUF stores with the two halves of each head interleaved."""

    def source_names(self, description: ModelDescription, kind: int) -> Iterator[tuple[str, str]]:
        """(our name, the checkpoint's name) of every tensor, in file order; `kind` is HF or GGUF."""
        for name in description.tensor_shapes():
            stem, _, suffix = name.rpartition(".")
            parts = stem.split(".")
            layer = parts[1] if parts[0] == "layers" else ""
            pattern = ".".join(["layers", "{i}", *parts[2:]]) if layer else stem
            yield name, self.names[pattern][kind].replace("{i}", layer) + "." + suffix


@dataclass(frozen=True)
class GgufFacts:
    """What a GGUF file says only through its tensors."""

    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: list[float] | None


def llama_from_config(config: Fields) -> dict[str, Any]:
    """Llama 2 and 3, SmolLM2, TinyLlama: defaults as in transformers' LlamaConfig."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", None)
    if head_dim is None:
        head_dim = _head_dim(config, "num_attention_heads", hidden, heads)
    for name in ("quantization_config", "compression_config"):
        if name in config:
            config.fail(name, "quantised checkpoints are not supported yet; use the original one")
    theta, scaling = rope_from_config(config)
    return {
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size"),
        "n_layers": config.integer("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": config.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "context_length": config.integer("max_position_embeddings", 2048),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "activation": config.choice("hidden_act", ACTIVATIONS, "silu"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_scale": head_dim**-0.5,
        "tie_embeddings": config.flag("tie_word_embeddings", False),
        "attention_bias": config.flag("attention_bias", False),
        "mlp_bias": config.flag("mlp_bias", False),
    }


def _head_dim(fields: Fields, name: str, hidden: int, heads: int) -> int:
    return (
        fields.fail(name, f"{heads} does not divide the hidden size {hidden}")
        if hidden % heads
        else hidden // heads
    )


def rope_from_config(config: Fields) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling): the older rope_theta and rope_scaling, or all of it in rope_parameters."""
    name = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    rope = config.section(name)
    theta = config.number("rope_theta", 10000.0)
    config.refuse("partial_rotary_factor", (1.0,), "rotating a part of each head is not supported yet")
    if rope is None:
        return theta, None
    theta = rope.number("rope_theta", theta)
    rope.refuse("partial_rotary_factor", (1.0,), "rotating a part of each head is not supported yet")
    kind = rope.text(
        "rope_type" if "rope_type" in rope else "type", "default" if "rope_theta" in rope else REQUIRED
    )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, {"type": "linear", "factor": rope.number("factor")}
    if kind == "llama3":
        original = rope.number("original_max_position_embeddings", None)
        scaling = {key: rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        if original is None:
            original = config.number("original_max_position_embeddings")
        return theta, {"type": "llama3", **scaling, "original_context_length": original}
    return config.fail(name, f"rope type {kind!r} is not supported yet (supported: default, linear, llama3)")


def llama_from_gguf(meta: Fields, facts: GgufFacts) -> dict[str, Any]:
    """GGUF's architecture "llama"."""
    meta.refuse("expert_count", (0,), "mixture of experts is not supported yet")
    for name in ("logit_scale", "embedding_scale", "residual_scale"):
        meta.refuse(name, (0.0, 1.0), "not supported yet for this architecture")
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_dim = meta.integer("attention.key_length", None)
    if head_dim is None:
        head_dim = _head_dim(meta, "attention.head_count", hidden, heads)
    meta.refuse("attention.value_length", (head_dim,), "different from the length of keys: not supported yet")
    meta.refuse("rope.dimension_count", (head_dim,), "rotating a part of each head is not supported yet")
    embedding = facts.shapes.get("token_embd.weight", (0,))[0]
    return {
        "vocab_size": meta.integer("vocab_size", embedding),
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "n_layers": meta.integer("block_count"),
        "n_heads": heads,
        "n_kv_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "context_length": meta.integer("context_length", 2048),
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "activation": "silu",
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "rope_scaling": rope_from_gguf(meta, facts),
        "attention_scale": meta.number("attention.scale", head_dim**-0.5),
        "tie_embeddings": "output.weight" not in facts.shapes,
        "attention_bias": "blk.0.attn_q.bias" in facts.shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in facts.shapes,
    }


def rope_from_gguf(meta: Fields, facts: GgufFacts) -> dict[str, Any] | None:
    kind = meta.text("rope.scaling.type", "linear" if "rope.scale_linear" in meta else "none")
    if kind not in ("none", "linear"):
        meta.fail("rope.scaling.type", f"{kind!r} is not supported yet (supported: none, linear)")
    factor = 1.0
    if kind == "linear":
        factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if facts.rope_factors is not None:
        return {"type": "factors", "factors": [value * factor for value in facts.rope_factors]}
    return {"type": "linear", "factor": factor} if factor != 1.0 else None


FAMILIES = (Family("llama", "LlamaForCausalLM", "llama", "llama", llama_from_config, llama_from_gguf),)


def family_of_config(config: Fields) -> Family:
    """The family that config.json names by its class (`architectures`) or else by `model_type`."""
    classes = config.get("architectures", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        config.fail("architectures", "not a list of names")
    for family in FAMILIES:
        if family.hf_class in classes or not classes and family.hf_type == config.get("model_type"):
            return family
    if not classes and "model_type" not in config:
        config.fail("architectures", "missing: not the config of a model")
    name = ", ".join(classes) if classes else config.text("model_type")
    return _not_supported(config.where, name, [family.hf_class for family in FAMILIES])


def family_of_gguf(meta: Fields) -> Family:
    """The family that general.architecture names."""
    name = meta.text("general.architecture")
    for family in FAMILIES:
        if family.gguf_type == name:
            return family
    return _not_supported(meta.where, name, [family.gguf_type for family in FAMILIES])


def _not_supported(where: str, name: str, supported: list[str]) -> Any:
    raise ConvertError(f"{where}: not supported yet: {name} (supported: {', '.join(supported)})")
