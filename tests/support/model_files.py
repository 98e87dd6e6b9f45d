"""A small model file of random weights, and its header taken apart and put together again."""

import json
import struct

import numpy as np

from kvrun import _core
from kvrun.files.description import ModelDescription
from kvrun.files.model_file import header_checksum
from kvrun.files.model_writer import ModelFileWriter
from support.files import rewrite

DESCRIPTION = ModelDescription(
    architecture="llama",
    name="tiny",
    vocab_size=20,
    hidden_size=32,
    intermediate_size=64,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=16,
    context_length=128,
    norm_eps=1e-5,
    activation="silu",
    rope_theta=10000.0,
    rope_scaling=None,
    attention_scale=0.25,
    tie_embeddings=False,
    attention_bias=True,
    mlp_bias=False,
)
TOKENIZER = b'{"version": "1.0"} '
INFO = {
    "kind": "tokenizer.json",
    "add_bos": True,
    "add_eos": False,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": None,
    "unk_id": None,
}


def types(description=DESCRIPTION):
    matrices = [name for name, shape in description.tensor_shapes().items() if len(shape) == 2]
    kinds = [kind for kind in _core.WEIGHT_TYPES if _core.column_multiple(kind) == 1]
    return {name: kinds[i % len(kinds)] for i, name in enumerate(matrices)}


def values(description=DESCRIPTION):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in description.tensor_shapes().items()}


def open_writer(path, **changes):
    options = {
        "tokenizer_info": INFO,
        "tokenizer": TOKENIZER,
        "stop_ids": [2, 2, 5],
        "chat_template": "{{ 'ä' }}\n",
        "sampling": {"temperature": 0.6},
        "source": {"form": "test"},
        **changes,
    }
    return ModelFileWriter(path, DESCRIPTION, types(), **options)


def write_all(writer):
    for name, a in values().items():
        writer.write(name, [_core.pack(types()[name], a) if a.ndim == 2 else a])


def split(path):
    """(header as parsed, data)."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path, header, data, sign=True):
    """Write a file again; with `sign`, with the checksum of a header that was changed on purpose."""
    meta = header.get("__metadata__")
    if sign and isinstance(meta, dict) and all(isinstance(value, str) for value in meta.values()):
        meta["header_checksum"] = header_checksum(meta)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    rewrite(path, struct.pack("<Q", len(text)) + text + data)
