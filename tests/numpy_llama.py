"""Llama in float64 NumPy, plain enough to read beside the papers; a cache that rounds can be put in."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from kvrun import _core
from kvrun.modelfile import ModelFile


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE of [n, heads, head_dim] by angles [n, head_dim / 2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class NumpyLlama:
    """`store(x)`: what the cache makes of keys after RoPE or values, [n, kv_heads, head_dim]."""

    def __init__(self, file: ModelFile, store: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        self.d = file.description
        self.store = store
        self.inv_freq = self.d.rope_inv_freq()
        self.weights = {
            name: _core.unpack(w.type, w.data, w.rows, w.cols).astype(np.float64)
            for name, w in file.weights.items()
        }
        self.vectors = {name: np.asarray(v, np.float64) for name, v in file.vectors.items()}

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.vectors.get(f"{name}.bias", 0.0)

    def attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        d, n = self.d, len(x)
        angles = np.arange(n)[:, None] * self.inv_freq
        q, k, v = (self.linear(x, f"{layer}.attn.{part}").reshape(n, -1, d.head_dim) for part in "qkv")
        q, k, v = rotate(q, angles), self.store(rotate(k, angles)), self.store(v)
        group = d.n_heads // d.n_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * d.attention_scale
        scores[:, ~np.tril(np.ones((n, n), bool))] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
        return self.linear(out.reshape(n, -1), f"{layer}.attn.o")

    def mlp(self, x: np.ndarray, layer: str) -> np.ndarray:
        gate = self.linear(x, f"{layer}.mlp.gate")
        return self.linear(
            gate / (1 + np.exp(-gate)) * self.linear(x, f"{layer}.mlp.up"), f"{layer}.mlp.down"
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [n, vocab]"""
        x = self.weights["embed.weight"][tokens]
        for i in range(self.d.n_layers):
            layer = f"layers.{i}"
            x = x + self.attention(norm(x, self.vectors[f"{layer}.attn.norm.weight"], self.d.norm_eps), layer)
            x = x + self.mlp(norm(x, self.vectors[f"{layer}.mlp.norm.weight"], self.d.norm_eps), layer)
        x = norm(x, self.vectors["norm.weight"], self.d.norm_eps)
        return x @ self.weights["embed.weight" if self.d.tie_embeddings else "head.weight"].T


def f16_cache(sinks: int) -> Callable[[np.ndarray], np.ndarray]:
    """Stores the first `sinks` tokens exactly and all others in f16."""

    def store(x: np.ndarray) -> np.ndarray:
        out = x.astype(np.float16).astype(np.float64)
        out[:sinks] = x[:sinks]
        return out

    return store


@lru_cache
def hadamard(n):
    """Orthonormal Sylvester matrix, in blocks of the largest powers of two."""
    matrix, at = np.zeros((n, n)), 0
    while at < n:
        block = np.ones((1, 1))
        while 2 * len(block) <= n - at:
            block = np.block([[block, block], [block, -block]])
        matrix[at:at + len(block), at:at + len(block)] = block / np.sqrt(len(block))
        at += len(block)
    return matrix
