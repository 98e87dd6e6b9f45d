"""A Hugging Face checkpoint of some well-known Llama shape with random f16 weights, in shards, for the converter.

    python benchmarks/random_checkpoint.py llama-2-7b build/checkpoint
    kvrun convert build/checkpoint --no-tokenizer -o build/7b.bin

There is no tokenizer beside it: such a model can be measured but not talked to.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from random_model import SHAPES

from kvrun.convert.families import FAMILIES, HF
from kvrun.files.description import ModelDescription

LLAMA = [name for name, shape in SHAPES.items() if shape.norm == "rms" and not shape.attention_bias]
SHARD, BLOCK = 4 << 30, 1 << 24  # bytes of a file; values that are made, the rest repeat them


def tensor_shapes(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them."""
    shapes = description.tensor_shapes()
    llama = next(family for family in FAMILIES if family.architecture == "llama")
    names = llama.source_names(description, HF)
    return {theirs if ours.startswith("head.") else llama.hf_prefix + theirs: shapes[ours] for ours, theirs in names}


def config_of(d: ModelDescription) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": d.vocab_size,
        "hidden_size": d.hidden_size,
        "intermediate_size": d.intermediate_size,
        "num_hidden_layers": d.n_layers,
        "num_attention_heads": d.n_heads,
        "num_key_value_heads": d.n_kv_heads,
        "head_dim": d.head_dim,
        "max_position_embeddings": d.context_length,
        "rms_norm_eps": d.norm_eps,
        "rope_theta": d.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": d.tie_embeddings,
    }


def write(folder: Path, description: ModelDescription) -> int:
    """Write the checkpoint; its bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(description), indent=1))
    shapes = tensor_shapes(description)
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and sum(shards[-1].values()) + nbytes > SHARD:
            shards.append({})
        shards[-1][name] = nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, sizes in zip(names, shards):
        write_shard(folder / name, sizes, shapes)
    index = {tensor: name for name, sizes in zip(names, shards) for tensor in sizes}
    total = sum(sum(sizes.values()) for sizes in shards)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return total


def write_shard(path: Path, sizes: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    entries, at = {}, 0
    for name, nbytes in sizes.items():
        entries[name] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [at, at + nbytes]}
        at += nbytes
    header = json.dumps(entries).encode()
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(np.float16)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, nbytes in sizes.items():
            data = block if len(shapes[name]) > 1 else np.ones(nbytes // 2, np.float16)
            for start in range(0, nbytes, data.nbytes):
                file.write(data.view(np.uint8)[: nbytes - start].data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=LLAMA)
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args()
    try:
        print(f"{write(args.folder, SHAPES[args.shape]) / 1e9:.2f} GB")
    except OSError as error:
        print(f"random_checkpoint.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
