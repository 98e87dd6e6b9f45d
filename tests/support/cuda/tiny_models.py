"""Tiny models with random weights, on the CPU and on a device, and the same tokens through both."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from kvrun import _core
from kvrun.cuda.engine import CudaEngine
from kvrun.files.description import ModelDescription
from kvrun.files.model_file import WeightTensor

TINY = dict(
    architecture="llama",
    name="tiny",
    vocab_size=77,
    hidden_size=96,
    intermediate_size=144,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    context_length=512,
    norm_eps=1e-5,
    activation="silu",
    rope_theta=1e4,
    rope_scaling=None,
    attention_scale=0.25,
    tie_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)
SUPER = dict(hidden_size=256, intermediate_size=256, n_heads=4, n_kv_heads=2, head_dim=64)  # whole super-blocks


def tiny(weight_type="f32", seed=0, **fields):
    """description, weights and vectors of a model. weight_type: one, or a list that matrices take in turn."""
    types = [weight_type] if isinstance(weight_type, str) else list(weight_type)
    description = ModelDescription(**{**TINY, **(SUPER if any(t in ("q4_k", "q6_k") for t in types) else {}), **fields})
    rng, weights, vectors = np.random.default_rng(seed), {}, {}
    for i, (name, shape) in enumerate(description.tensor_shapes().items()):
        if len(shape) == 1:
            around = 0.0 if name.endswith(".bias") else 1.0
            vectors[name] = (around + rng.normal(0, 0.3, shape)).astype(np.float32)
        else:
            kind = types[i % len(types)]
            values = rng.normal(0, 1.5 * shape[1] ** -0.5, shape).astype(np.float32)
            rows, cols = shape
            weights[name] = WeightTensor(kind, rows, cols, _core.pack(kind, values))
    return SimpleNamespace(description=description, weights=weights, vectors=vectors)


def engines(model, device, threads=1):
    """The same model on the CPU, as precise in chunks as in decode, and on a device."""
    d = model.description
    cpu = _core.Engine(d, model.weights, model.vectors, d.rope_tables, threads, True)
    return cpu, CudaEngine(cpu, model.weights, model.vectors, device)


def tokens(description, n, seed=0):
    return np.random.default_rng(seed).integers(0, description.vocab_size, n).astype(np.int32)


def feed(engine, kv, ids, chunks):
    """float32 [n, vocab]: logits of every token, fed in chunks of these sizes, the last of them again and again."""
    rows, at, sizes = [], 0, list(chunks)
    while at < len(ids):
        n = min(sizes.pop(0) if len(sizes) > 1 else sizes[0], len(ids) - at)
        rows.append(np.atleast_2d(engine.forward(ids[at : at + n], kv, logits="all")))
        at += n
    return np.concatenate(rows)


def difference(a, b, share=1.0):
    """The largest difference of logits [n, vocab] or [vocab], relative to the largest logit; with a share, of so many
    tokens, those that differ least."""
    assert a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all()
    by_token = np.abs(np.atleast_2d(a - b)).max(axis=1)
    return float(np.quantile(by_token, share) / np.abs(b).max())
