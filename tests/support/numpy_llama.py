"""Decoder models in float64 NumPy, plain enough to read beside the papers: Llama and what other families differ from it
in. A cache that rounds can be put in."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from kvrun import _core
from kvrun.files.model_file import ModelFile


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, angles: np.ndarray, amplitude: np.ndarray | float = 1.0) -> np.ndarray:
    """RoPE of [n, heads, head_dim] by angles [n, head_dim / 2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = (amplitude * np.cos(angles))[:, None], (amplitude * np.sin(angles))[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


class NumpyLlama:
    """`store(x)`: what the cache makes of keys after RoPE or values, [n, kv_heads, head_dim]. `ctx`: tokens that it
    has room for, on which some kinds of RoPE depend."""

    def __init__(
        self, file: ModelFile, store: Callable[[np.ndarray], np.ndarray] = lambda x: x, ctx: int | None = None
    ) -> None:
        self.d = file.description
        self.store = store
        self.ropes = self.d.rope_tables(ctx)
        self.inv_freq = self.ropes.inv_freq[0]  # of most layers
        self.weights = {
            name: _core.unpack(w.type, w.data, w.rows, w.cols).astype(np.float64) for name, w in file.weights.items()
        }
        self.vectors = {name: np.asarray(v, np.float64) for name, v in file.vectors.items()}

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.vectors.get(f"{name}.bias", 0.0)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """x itself if the model has no such norm."""
        if f"{name}.weight" not in self.vectors:
            return x
        if self.d.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
            return norm(x, self.vectors[f"{name}.weight"], self.d.norm_eps) + self.vectors[f"{name}.bias"]
        return norm(x, self.vectors[f"{name}.weight"], self.d.norm_eps)

    def qkv(self, x: np.ndarray, layer: str) -> list[np.ndarray]:
        """Queries, keys and values [n, heads, head_dim], before RoPE."""
        d, parts = self.d, []
        for part in "qkv":
            y = self.linear(x, f"{layer}.attn.{part}")
            weight = self.vectors.get(f"{layer}.attn.{part}_norm.weight")
            if weight is not None and d.qk_norm == "all":
                y = norm(y, weight, d.norm_eps)
            y = y.reshape(len(x), -1, d.head_dim)
            parts.append(norm(y, weight, d.norm_eps) if weight is not None and d.qk_norm == "head" else y)
        return parts

    def turn(self, x: np.ndarray, layer: str, positions: np.ndarray) -> np.ndarray:
        table = self.ropes.of_layer[int(layer.split(".")[1])]
        return rotate(x, positions[:, None] * self.ropes.inv_freq[table], self.ropes.amplitude[table])

    def scaled(self, scores: np.ndarray) -> np.ndarray:
        scores, cap = scores * self.d.attention_scale, self.d.attention_softcap
        return cap * np.tanh(scores / cap) if cap else scores

    def attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        d, n = self.d, len(x)
        at = np.arange(n)
        width = d.sliding_windows[int(layer.split(".")[1])] if d.sliding_windows else None
        q, k, v = self.qkv(x, layer)
        q, k, v = self.turn(q, layer, at), self.store(self.turn(k, layer, at)), self.store(v)
        group = d.n_heads // d.n_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = self.scaled(np.einsum("qhd,khd->hqk", q, k))
        age = at[:, None] - at
        scores[:, (age < 0) | (age >= (width or n))] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
        return self.linear(out.reshape(n, -1), f"{layer}.attn.o")

    def mlp(self, x: np.ndarray, layer: str) -> np.ndarray:
        d = self.d
        if not d.has_experts(int(layer.split(".")[1])):
            return self.feed_forward(x, f"{layer}.mlp")
        assert d.n_experts and d.experts_used
        scores = self.linear(x, f"{layer}.mlp.router")
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        kept = np.where(shares >= np.sort(shares, -1)[:, [-d.experts_used]], shares, 0)
        if d.normalize_experts:
            kept /= kept.sum(-1, keepdims=True)
        outputs = [self.feed_forward(x, f"{layer}.mlp.experts.{e}") for e in range(d.n_experts)]
        total = np.zeros_like(x)
        for e, output in enumerate(outputs):
            total = total + kept[:, [e]] * output
        return total

    def feed_forward(self, x: np.ndarray, step: str) -> np.ndarray:
        up, activation = self.linear(x, f"{step}.up"), ACTIVATIONS[self.d.activation]
        if self.d.mlp_gated:
            return self.linear(activation(self.linear(x, f"{step}.gate")) * up, f"{step}.down")
        return self.linear(activation(up), f"{step}.down")

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [n, vocab]"""
        d = self.d
        x = self.weights["embed.weight"][tokens] * d.embedding_scale
        if d.learned_positions:
            x = x + self.weights["positions.weight"][: len(tokens)]
        for i in range(d.n_layers):
            layer = f"layers.{i}"
            y = self.attention(self.norm(x, f"{layer}.attn.norm"), layer)
            x = x + self.norm(y, f"{layer}.attn.post_norm") * d.residual_scale
            y = self.mlp(self.norm(x, f"{layer}.mlp.norm"), layer)
            x = x + self.norm(y, f"{layer}.mlp.post_norm") * d.residual_scale
        logits = self.linear(self.norm(x, "norm"), "embed" if d.tie_embeddings else "head") * d.logit_scale
        return d.logit_softcap * np.tanh(logits / d.logit_softcap) if d.logit_softcap else logits


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
        matrix[at : at + len(block), at : at + len(block)] = block / np.sqrt(len(block))
        at += len(block)
    return matrix
