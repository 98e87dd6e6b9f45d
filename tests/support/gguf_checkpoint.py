"""The weights of a real GGUF file as a Hugging Face checkpoint in float32, as transformers would save it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_NAMES = _NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def write_checkpoint(path: Path, folder: Path) -> Path:
    """Write the folder, for a Llama or Gemma 3 of one file. There is no tokenizer in it."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    meta = {
        key.removeprefix(architecture + "."): field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("tokenizer.ggml.t")
    }
    gemma = architecture == "gemma3"
    names = _GEMMA3_NAMES if gemma else _NAMES
    # GGUF interleaves the two halves of each of Llama's heads.
    heads = {} if gemma else {"attn_q": meta["attention.head_count"], "attn_k": meta["attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:  # token_embd.weight, blk.3.attn_q.weight
        *layer, part, _ = tensor.name.replace("blk.", "layers.").split(".")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part in heads:
            values = values.reshape(heads[part], -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if gemma and part.endswith("norm"):
            values = values - np.float32(1)  # which the model adds again
        tensors[".".join(["model", *layer, names[part], "weight"])] = np.ascontiguousarray(values)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocab_size = len(tensors["model.embed_tokens.weight"])
    config = _sizes(meta, vocab_size) | (_gemma3(meta) if gemma else _llama(meta))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _sizes(meta: dict, vocab_size: int) -> dict:
    return {
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": meta["attention.head_count"],
        "num_key_value_heads": meta["attention.head_count_kv"],
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": True,
    }


def _llama(meta: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": meta["rope.freq_base"],
    }


def _gemma3(meta: dict) -> dict:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": meta["attention.key_length"],
        "query_pre_attn_scalar": meta["attention.key_length"],
        "sliding_window": meta["attention.sliding_window"],
        "sliding_window_pattern": 6,  # every sixth layer sees everything, as in all models of the family
        "rope_theta": meta["rope.freq_base"],
        "rope_local_base_freq": 10000.0,
    }
