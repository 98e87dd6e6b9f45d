"""The families' checkpoints written as GGUF files, as llama.cpp's converter writes them."""

import json
import math
import re

import gguf
import numpy as np
from gguf.tensor_mapping import get_tensor_name_map

from kvrun.convert.safetensors_file import read_safetensors_header
from support.families import FAMILIES

INTERLEAVED = ("llama", "granite", "smollm3")


ARCHITECTURES = {"gemma3-images": "gemma3", "mistral": "llama", "gpt2-gelu": None, "dynamic-rope": None}


ARCHITECTURES |= {
    "mixtral": "llama",
    "olmo3": "olmo2",
    "qwen3moe-shares": None,
    "phi3-window": "phi3",
    "partial-rope": None,
}  # None: GGUF cannot say it


NAMES = [p.name for p in sorted(FAMILIES.iterdir()) if ARCHITECTURES.get(p.name, p.name)]


def interleave(rows, n_heads):
    return rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def metadata(arch, c):
    """What llama.cpp's converter writes of a config, under the architecture's prefix."""
    rope = c.get("rope_parameters") or {}
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    heads = c.get("num_attention_heads", c.get("n_head"))
    hidden = c.get("hidden_size", c.get("n_embd"))
    head_dim = c.get("head_dim") or hidden // heads
    values = {
        "block_count": c.get("num_hidden_layers", c.get("n_layer")),
        "context_length": c.get("max_position_embeddings", c.get("n_positions")),
        "embedding_length": hidden,
        "feed_forward_length": c.get("intermediate_size", 4 * hidden),
        "attention.head_count": heads,
        "attention.head_count_kv": c.get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": c.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": c.get("layer_norm_epsilon"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "attention.sliding_window": c.get("sliding_window"),
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        "attention.scale": c.get("attention_multiplier")
        or (c["query_pre_attn_scalar"] ** -0.5 if "query_pre_attn_scalar" in c else None),
        "embedding_scale": c.get("embedding_multiplier"),
        "expert_count": c.get("num_local_experts"),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "residual_scale": c.get("residual_multiplier"),
        "logit_scale": c.get("logits_scaling"),
    }
    if arch in ("gemma3", "qwen2", "olmo2") and "layer_types" in c:
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in c["layer_types"]]
    kind = rope.get("rope_type", "default")
    if kind != "default":
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": rope.get("factor")}
        values["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
        values["rope.scaling.yarn_beta_fast"] = rope.get("beta_fast")
    if kind == "longrope":
        original = c["original_max_position_embeddings"]
        scale = c["max_position_embeddings"] / original
        values["rope.scaling.original_context_length"] = original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return {f"{arch}.{key}": value for key, value in values.items() if value is not None}, rope


def tensors(folder, arch, c, apart=False):
    """(name in GGUF, float32 values) of the text model's tensors. `apart`: one tensor for each expert, as in files of
    Mixtral from before one held all of a layer."""
    experts: dict[str, list] = {}
    dense = get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    names = get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), 8)
    for name, tensor in read_safetensors_header(str(folder / "model.safetensors")).items():
        if "vision" in name or "projector" in name:
            continue
        name = name.replace("language_model.model.", "model.")
        value = tensor.floats(0, tensor.rows).reshape(tensor.shape)
        if arch in INTERLEAVED and ".q_proj" in name:
            value = interleave(value, c["num_attention_heads"])
        if arch in INTERLEAVED and ".k_proj" in name:
            value = interleave(value, c["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        stem, _, suffix = name.rpartition(".")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)", stem):
            merged = "layers.{}.feed_forward.experts.{}" if arch == "llama" else "model.layers.{}.mlp.experts.{}"
            experts.setdefault(f"{names.get_name(merged.format(*match.groups()))}.weight", []).append(value)
        else:
            yield f"{names.get_name(stem) or dense.get_name(stem)}.{suffix}", value
    for name, values in experts.items():
        if apart:
            yield from ((name.replace("_exps", f".{e}"), value) for e, value in enumerate(values))
        else:
            yield name, np.stack(values)


def write(path, folder, extra=(), changes=None, apart=False):
    """`changes`: metadata to set or, with None, to leave out."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    arch = ARCHITECTURES.get(folder.name, folder.name)
    values, rope = metadata(arch, config)
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in (values | (changes or {})).items():
        if value is not None:
            add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
            add.get(type(value), writer.add_float32)(key, value)
    pairs = [*tensors(folder, arch, config, apart), *extra]
    if "long_factor" in rope:
        pairs += [(f"rope_factors_{x}.weight", np.array(rope[f"{x}_factor"], np.float32)) for x in ("long", "short")]
    for name, value in pairs:
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
