"""A model file of some well-known shape with random weights: speed depends on the shape and the type, not the values.

    python benchmarks/random_model.py gemma-3-270m --type q4_0 -o build/gemma.bin
    kvrun bench build/gemma.bin --test decode --depth 0

The file has no tokenizer, so it can be measured but not talked to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kvrun import _core
from kvrun.errors import KvrunError
from kvrun.files.description import ModelDescription
from kvrun.files.model_writer import ModelFileWriter

SMOLLM2 = ModelDescription(
    architecture="llama",
    name="smollm2-135m",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    context_length=8192,
    norm_eps=1e-5,
    activation="silu",
    rope_theta=1e5,
    rope_scaling=None,
    attention_scale=64**-0.5,
    tie_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
)
# Sizes from the models' published configs, but for the context of Llama 2. Of Gemma the matrices alone: its norms and
# windows take no time to speak of.
SHAPES = {
    "smollm2-135m": SMOLLM2,
    "gemma-3-270m": replace(
        SMOLLM2,
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        n_layers=18,
        n_heads=4,
        n_kv_heads=1,
        head_dim=256,
        context_length=32768,
        attention_scale=256**-0.5,
    ),
    "qwen-2.5-0.5b": replace(
        SMOLLM2,
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        n_layers=24,
        n_heads=14,
        n_kv_heads=2,
        context_length=32768,
        attention_bias=True,
        attention_out_bias=False,
    ),
    "llama-3.2-1b": replace(
        SMOLLM2,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        context_length=131072,
    ),
    "llama-2-7b": replace(
        SMOLLM2,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        context_length=32768,
        attention_scale=128**-0.5,
        tie_embeddings=False,
    ),
    "gpt2-124m": replace(
        SMOLLM2,
        architecture="gpt2",
        vocab_size=50257,
        hidden_size=768,
        intermediate_size=3072,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        context_length=1024,
        activation="gelu_tanh",
        norm="layer",
        mlp_gated=False,
        rope_theta=None,
        learned_positions=True,
        attention_bias=True,
        mlp_bias=True,
    ),
}
INFO = {"kind": "none", "add_bos": False, "add_eos": False} | dict.fromkeys(("bos_id", "eos_id", "pad_id", "unk_id"))
PANEL, DISTINCT = 16, 64  # rows of a panel; panels that are made, the rest repeat them


def write(path: str, shape: str, weight_type: str) -> None:
    """Write a model file. KvrunError if it cannot be written."""
    description = replace(SHAPES[shape], name=f"{shape}, random {weight_type}")
    shapes = description.tensor_shapes()
    types = {name: weight_type for name, size in shapes.items() if len(size) == 2}
    with ModelFileWriter(path, description, types, tokenizer_info=INFO, tokenizer=None) as writer:
        for name, size in shapes.items():
            vector = np.full(size, not name.endswith(".bias"), np.float32) if len(size) == 1 else None
            writer.write(name, panels(weight_type, *size) if vector is None else [vector])
        writer.finish()


def panels(weight_type: str, rows: int, cols: int) -> Iterator[memoryview]:
    """Packed data of a matrix whose outputs are about as large as its inputs."""
    rng = np.random.default_rng(rows * cols)
    some = min((rows + PANEL - 1) // PANEL, DISTINCT)
    block = _core.pack(weight_type, rng.normal(0, cols**-0.5, (some * PANEL, cols)).astype(np.float32))
    left = _core.packed_size(weight_type, rows, cols)
    while left > 0:
        yield block.data[:left]
        left -= len(block)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--type", choices=_core.WEIGHT_TYPES, default="q4_0")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    args = parser.parse_args()
    try:
        write(args.output, args.shape, args.type)
    except KvrunError as error:
        print(f"random_model.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
