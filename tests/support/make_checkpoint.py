"""Small checkpoints for the converter's tests, made on the spot and easy to spoil."""

import json
import struct
from pathlib import Path

import numpy as np

from support.files import rewrite

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def hf_shapes(config=CONFIG):
    """Names and shapes of a Llama checkpoint, as transformers saves it."""
    c = config
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    queries = c["num_attention_heads"] * head_dim
    keys = (c.get("num_key_value_heads") or c["num_attention_heads"]) * head_dim
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(c["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    return shapes


def random_tensors(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def to_bf16(a):
    """float32 cut to bfloat16, as uint16."""
    return (a.view(np.uint32) >> 16).astype(np.uint16)


def save_safetensors(path, tensors, dtype="F32"):
    """Write a safetensors file; `dtype` F32, F16 or BF16 (the values are cut or rounded to it)."""
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    chunks, position = [], 0
    for name, a in tensors.items():
        data = {"F32": lambda a: a, "F16": lambda a: a.astype(np.float16), "BF16": to_bf16}[dtype](a).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(a.shape),
            "data_offsets": [position, position + len(data)],
        }
        chunks.append(data)
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def tokenizer_json(vocab_size=40, **changes):
    """A byte-level BPE of a few letters with two special tokens."""
    letters = ["<s>", "</s>", *(chr(33 + i) for i in range(vocab_size - 2))]
    special = [
        {
            "id": i,
            "content": letters[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in (0, 1)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(letters)}, "merges": []},
        **changes,
    }


def write_json(path, value):
    rewrite(Path(path), json.dumps(value))


def hf_folder(folder, config=CONFIG, tensors=None, dtype="F32", tokenizer=True):
    """A complete Hugging Face folder; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_safetensors(folder / "model.safetensors", tensors or random_tensors(hf_shapes(config)), dtype)
    if tokenizer:
        write_json(folder / "tokenizer.json", tokenizer_json(config["vocab_size"]))
        write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return folder


# --- GGUF


def gguf_shapes(hidden=64, inner=96, heads=4, kv_heads=2, layers=2, vocab=40):
    """GGUF names and shapes [rows, cols] of a tied Llama."""
    keys = hidden // heads * kv_heads
    shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.{name}.weight": shape
            for name, shape in {
                "attn_q": (hidden, hidden),
                "attn_k": (keys, hidden),
                "attn_v": (keys, hidden),
                "attn_output": (hidden, hidden),
                "ffn_gate": (inner, hidden),
                "ffn_up": (inner, hidden),
                "ffn_down": (hidden, inner),
                "attn_norm": (hidden,),
                "ffn_norm": (hidden,),
            }.items()
        }
    return shapes


HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}
"""Types that the gguf package reads but cannot make, and where the float16 numbers of their blocks are."""


def random_blocks(kind, shape):
    """uint8 [rows, bytes]: random blocks of a type in `HALVES`, with scales that are small numbers."""
    import gguf

    rng = np.random.default_rng(shape[0])
    values, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // values, width)).astype(np.uint8)
    for at in HALVES[kind]:
        scales = rng.uniform(0.01, 0.02, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def save_gguf(path, types=None, metadata=None, tensors=None, tokens=None, pre="smollm", extra=None, **sizes):
    """Write a Llama GGUF file. `types`: GGML type by tensor name or part of it; `metadata` replaces or, with
    None, removes keys; `extra`: raw rows and their type, by name, instead of a tensor or besides. Returns {name:
    float32 values as gguf dequantises them}."""
    import gguf

    types, metadata = types or {}, dict(metadata or {})
    shapes = gguf_shapes(**sizes)
    tensors = tensors or random_tensors(shapes)
    writer = gguf.GGUFWriter(str(path), metadata.pop("general.architecture", "llama"))
    heads, kv_heads = sizes.get("heads", 4), sizes.get("kv_heads", 2)
    values = {
        "llama.block_count": sizes.get("layers", 2),
        "llama.context_length": 256,
        "llama.embedding_length": sizes.get("hidden", 64),
        "llama.feed_forward_length": sizes.get("inner", 96),
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **gguf_vocabulary(tokens or gguf_tokens(sizes.get("vocab", 40))),
        **metadata,
    }
    for key, value in values.items():
        _add(writer, key, value)
    stored = {}
    for name, (rows, kind) in (extra or {}).items():
        writer.add_tensor(name, rows, raw_dtype=kind)
    for name, a in tensors.items():
        if name in (extra or {}):
            continue
        kind = gguf.GGMLQuantizationType[next((t for part, t in types.items() if part in name), "F32").upper()]
        if kind.name in HALVES and a.ndim == 1:
            kind = gguf.GGMLQuantizationType.F32
        data = random_blocks(kind.name, a.shape) if kind.name in HALVES else gguf.quants.quantize(a, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        stored[name] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def gguf_tokens(n=40):
    return ["<s>", "</s>", *(chr(33 + i) for i in range(n - 3)), '!"']


def gguf_vocabulary(tokens):
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in ("<s>", "</s>") else 1 for t in tokens],
        "tokenizer.ggml.merges": ['! "'],
    }


def _add(writer, key, value):
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def interleaved(a, heads):
    """Rows as GGUF has them: the halves of each head interleaved."""
    return a.reshape(heads, 2, len(a) // heads // 2, -1).swapaxes(1, 2).reshape(a.shape)


def straight(a, heads):
    """The inverse of `interleaved`."""
    return a.reshape(heads, len(a) // heads // 2, 2, -1).swapaxes(1, 2).reshape(a.shape)
