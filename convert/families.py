"""The table of model families: from the names of a checkpoint to ours.

To add a family, add a `Family`: its class and type names, a function that reads its config.json
(`family_config`), one that reads its GGUF metadata (`family_gguf`), and its tensor names where they differ from
Llama's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from kvrun.convert import family_config, family_gguf
from kvrun.convert.family_gguf import GgufFacts
from kvrun.convert.fields import Fields
from kvrun.errors import ConvertError, one_line
from kvrun.files.description import ModelDescription

# Ours -> (Hugging Face, GGUF), without ".weight" and ".bias"; {i} is the layer. Where several of ours have the same
# name there, their rows follow one another in one tensor.
LLAMA_NAMES = {
    "embed": ("embed_tokens", "token_embd"),
    "norm": ("norm", "output_norm"),
    "head": ("lm_head", "output"),
    "layers.{i}.attn.norm": ("layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
    "layers.{i}.attn.q": ("layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
    "layers.{i}.attn.k": ("layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
    "layers.{i}.attn.v": ("layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
    "layers.{i}.attn.q_norm": ("layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"),
    "layers.{i}.attn.k_norm": ("layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"),
    "layers.{i}.attn.o": ("layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
    "layers.{i}.mlp.norm": ("layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    "layers.{i}.mlp.gate": ("layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
    "layers.{i}.mlp.up": ("layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
    "layers.{i}.mlp.down": ("layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
}
_POST_NORMS = {
    "layers.{i}.attn.post_norm": ("layers.{i}.post_attention_layernorm", "blk.{i}.post_attention_norm"),
    "layers.{i}.mlp.norm": ("layers.{i}.pre_feedforward_layernorm", "blk.{i}.ffn_norm"),
    "layers.{i}.mlp.post_norm": ("layers.{i}.post_feedforward_layernorm", "blk.{i}.post_ffw_norm"),
}
_EXPERTS = {
    "layers.{i}.mlp.router": ("layers.{i}.mlp.gate", "blk.{i}.ffn_gate_inp"),
    **{
        f"layers.{{i}}.mlp.experts.{{e}}.{x}": (
            f"layers.{{i}}.mlp.experts.{{e}}.{x}_proj",
            f"blk.{{i}}.ffn_{x}_exps",
        )
        for x in ("gate", "up", "down")
    },
}
_MIXTRAL = {
    "layers.{i}.mlp.router": ("layers.{i}.block_sparse_moe.gate", "blk.{i}.ffn_gate_inp"),
    **{
        f"layers.{{i}}.mlp.experts.{{e}}.{x}": (
            f"layers.{{i}}.block_sparse_moe.experts.{{e}}.{w}",
            f"blk.{{i}}.ffn_{x}_exps",
        )
        for x, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}
_PHI3 = {f"layers.{{i}}.attn.{x}": ("layers.{i}.self_attn.qkv_proj", "blk.{i}.attn_qkv") for x in "qkv"} | {
    f"layers.{{i}}.mlp.{x}": ("layers.{i}.mlp.gate_up_proj", "blk.{i}.ffn_up") for x in ("gate", "up")
}
_GPT2 = {
    "embed": ("wte", "token_embd"),
    "positions": ("wpe", "position_embd"),
    "norm": ("ln_f", "output_norm"),
    "head": ("lm_head", "output"),
    "layers.{i}.attn.norm": ("h.{i}.ln_1", "blk.{i}.attn_norm"),
    **{f"layers.{{i}}.attn.{x}": ("h.{i}.attn.c_attn", "blk.{i}.attn_qkv") for x in "qkv"},
    "layers.{i}.attn.o": ("h.{i}.attn.c_proj", "blk.{i}.attn_output"),
    "layers.{i}.mlp.norm": ("h.{i}.ln_2", "blk.{i}.ffn_norm"),
    "layers.{i}.mlp.up": ("h.{i}.mlp.c_fc", "blk.{i}.ffn_up"),
    "layers.{i}.mlp.down": ("h.{i}.mlp.c_proj", "blk.{i}.ffn_down"),
}
HF, GGUF = 0, 1


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family are read.

    `from_config` and `from_gguf` return the fields of `ModelDescription`; the latter takes the metadata under the
    architecture's prefix, and what can only be learned from the tensors.
    """

    architecture: str
    hf_class: str
    hf_type: str
    gguf_type: str
    from_config: Callable[[Fields], dict[str, Any]]
    from_gguf: Callable[[Fields, GgufFacts], dict[str, Any]]
    names: Mapping[str, tuple[str, str]] = field(default_factory=lambda: LLAMA_NAMES)
    gguf_permuted: tuple[str, ...] = ()
    """Tensors whose rows GGUF stores with the two halves of each head interleaved."""
    hf_prefix: str = "model."
    hf_transposed: bool = False
    """Matrices of the layers are stored [inputs, outputs]."""
    hf_norm_offset: float = 0.0
    """What the model adds to the stored weights of its norms."""

    @property
    def hf_base_class(self) -> str:
        """The class without an output head. Its checkpoints are models if the head is the embedding."""
        base = "TextModel" if self.hf_class == "Gemma3ForCausalLM" else "Model"
        return self.hf_class.replace("ForCausalLM", base).replace("LMHeadModel", base)

    def source_names(self, description: ModelDescription, kind: int) -> Iterator[tuple[str, str]]:
        """(our name, the checkpoint's name) of every tensor, in file order; `kind` is HF or GGUF."""
        for name in description.tensor_shapes():
            stem, _, suffix = name.rpartition(".")
            parts, numbers = stem.split("."), {}
            for before, key in (("layers", "{i}"), ("experts", "{e}")):
                if before in parts:
                    at = parts.index(before) + 1
                    numbers[key], parts[at] = parts[at], key
            theirs = self.names[".".join(parts)][kind]
            for key, number in numbers.items():
                theirs = theirs.replace(key, number)
            yield name, f"{theirs}.{suffix}"


_QK = ("attn.q", "attn.k")
FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        "llama",
        family_config.llama,
        family_gguf.plain,
        names=LLAMA_NAMES | _MIXTRAL,  # in GGUF files, Mixtral has this architecture
        gguf_permuted=_QK,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "mistral",
        "llama",
        family_config.mistral,
        family_gguf.plain,
        gguf_permuted=_QK,
    ),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", "qwen2", family_config.qwen2, family_gguf.plain),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3", "qwen3", family_config.qwen3, family_gguf.qwen3),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        "gemma2",
        family_config.gemma2,
        family_gguf.gemma2,
        names=LLAMA_NAMES | _POST_NORMS,
        hf_norm_offset=1.0,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        "gemma3",
        family_config.gemma3,
        family_gguf.gemma3,
        names=LLAMA_NAMES | _POST_NORMS,
        hf_norm_offset=1.0,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        "phi3",
        family_config.phi3,
        family_gguf.phi3,
        names=LLAMA_NAMES | _PHI3,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        "smollm3",
        family_config.smollm3,
        family_gguf.smollm3,
        gguf_permuted=_QK,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "olmo2",
        "olmo2",
        family_config.olmo2,
        family_gguf.olmo2,
        names=LLAMA_NAMES | _POST_NORMS,
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        "olmo3",
        "olmo2",  # in GGUF files it has that architecture
        family_config.olmo3,
        family_gguf.olmo2,
        names=LLAMA_NAMES | _POST_NORMS,
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        "granite",
        "granite",
        family_config.granite,
        family_gguf.granite,
        gguf_permuted=_QK,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "mixtral",
        "llama",
        family_config.mixtral,
        family_gguf.plain,
        names=LLAMA_NAMES | _MIXTRAL,
        gguf_permuted=_QK,
    ),
    Family(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        "qwen3moe",
        family_config.qwen3_moe,
        family_gguf.qwen3,
        names=LLAMA_NAMES | _EXPERTS,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        "gpt2",
        family_config.gpt2,
        family_gguf.gpt2,
        names=_GPT2,
        hf_prefix="transformer.",
        hf_transposed=True,
    ),
)
# Models of text and images whose text model is one of the above; `text_config` says which, and by default what is named
# here. Whether the embedding is the output head is said by the outer config, and by default as here.
MULTIMODAL = {
    "Gemma3ForConditionalGeneration": ("gemma3_text", True),
    "Mistral3ForConditionalGeneration": ("mistral", True),
    "LlavaForConditionalGeneration": ("llama", False),
    "LlavaNextForConditionalGeneration": ("llama", False),
}


def text_config(config: Fields) -> Fields:
    """The config of the text model: `config` itself, or its text_config if it is that of a multimodal model."""
    for name in _classes(config):
        if name in MULTIMODAL:
            text = config.section("text_config")
            if text is None:
                return config.fail("text_config", f"missing; {name} has one")
            text = text.without("final_logit_softcapping")  # which transformers obeys in text models only
            tied = config.flag("tie_word_embeddings", MULTIMODAL[name][1])
            return text.without("tie_word_embeddings").or_else("tie_word_embeddings", tied)
    return config


def family_of_config(config: Fields) -> Family:
    """The family that config.json names by its class (`architectures`) or else by `model_type`."""
    classes = _classes(config)
    for name in classes:
        if name in MULTIMODAL:
            kind = text_config(config).text("model_type", MULTIMODAL[name][0])
            for family in FAMILIES:
                if family.hf_type == kind:
                    return family
            return _not_supported(config.where, f"{name} of {kind}", [family.hf_type for family in FAMILIES])
    for family in FAMILIES:
        named = family.hf_class in classes or family.hf_base_class in classes
        if named or (not classes and family.hf_type == config.get("model_type")):
            return family
    if not classes and "model_type" not in config:
        config.fail("architectures", "missing: not the config of a model")
    name = ", ".join(classes) if classes else config.text("model_type")
    return _not_supported(config.where, name, [*(family.hf_class for family in FAMILIES), *MULTIMODAL])


def _classes(config: Fields) -> list[str]:
    classes = config.get("architectures", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        config.fail("architectures", "not a list of names")
    return classes


# GGUF files that are no models, by general.type or else general.architecture.
_NO_MODELS = {
    "adapter": "an adapter, not a model; merge it into its base model first (with llama.cpp's llama-export-lora)",
    "mmproj": "the part of a model for images or sound; convert the file of its text model",
    "clip": "the part of a model for images or sound; convert the file of its text model",
    "imatrix": "an importance matrix, not a model",
    "controlvector": "a control vector, not a model",
}


def family_of_gguf(meta: Fields) -> Family:
    """The family that general.architecture names."""
    for key in ("general.type", "general.architecture"):
        value = meta.get(key)
        if isinstance(value, str) and value in _NO_MODELS:
            raise ConvertError(f"{meta.where}: {_NO_MODELS[value]}")
    name = meta.text("general.architecture")
    for family in FAMILIES:
        if family.gguf_type == name:
            return family
    return _not_supported(meta.where, name, list(dict.fromkeys(family.gguf_type for family in FAMILIES)))


def _not_supported(where: str, name: str, supported: list[str]) -> NoReturn:
    raise ConvertError(f"{where}: not supported yet: {one_line(name)[:80]} (supported: {', '.join(supported)})")
