"""Caches that are fed, cut, copied and restored at random, beside a list model that says what they should hold."""

import copy

import numpy as np
import pytest
from hypothesis import strategies as st

from kvrun import _core
from support.numpy_llama import NumpyLlama, rotate
from support.ring import TILE, ListCache


class StateCache(ListCache):
    """The list model with truncation."""

    def truncate(self, n):
        rest = [t for tile in self.tiles for t in tile] + self.window
        kept = [t for t in rest if t < n]
        if not 0 <= n <= self.n or (n > self.n_sinks and not kept):
            raise ValueError
        packed = max(0, (n - self.n_sinks - self.keep) // TILE)  # tiles that had left the window after n tokens
        in_ring = [t for t in kept if t < self.n_sinks + packed * TILE]
        self.sinks, self.n = self.sinks[:n], n
        self.tiles = [in_ring[i : i + TILE] for i in range(0, len(in_ring), TILE)]
        self.window = kept[len(in_ring) :]


class StepLlama(NumpyLlama):
    """One token at a time; keeps every key and value, and attends to those that the list model shows."""

    def __init__(self, file, options):
        super().__init__(file)
        self.cache = StateCache(**options)
        self.kept: dict[str, tuple[list, list]] = {f"layers.{i}": ([], []) for i in range(self.d.n_layers)}

    def attention(self, x, layer):
        d, seen = self.d, np.array(self.cache.visible())
        q, k, v = (self.linear(x, f"{layer}.attn.{part}").reshape(-1, d.head_dim) for part in "qkv")
        keys, values = self.kept[layer]
        keys.append(k)
        values.append(v)
        n_sinks, positions = len(self.cache.sinks), seen.copy()
        if len(seen) > n_sinks:
            positions[:n_sinks] = seen[n_sinks] - n_sinks + np.arange(n_sinks)
        group = d.n_heads // d.n_kv_heads
        turned = rotate(np.stack([keys[t] for t in seen]), positions[:, None] * self.inv_freq)
        query = rotate(q[None], np.array([[self.cache.n - 1]]) * self.inv_freq)[0]
        scores = np.einsum("hd,khd->hk", query, np.repeat(turned, group, 1)) * d.attention_scale
        p = np.exp(scores - scores.max(-1, keepdims=True))
        shown = np.repeat(np.stack([values[t] for t in seen]), group, 1)
        out = np.einsum("hk,khd->hd", p / p.sum(-1, keepdims=True), shown)
        return self.linear(out.reshape(1, -1), f"{layer}.attn.o")

    def feed(self, tokens):
        rows = []
        for token in tokens:
            self.cache.append()
            rows.append(self.logits(np.array([token]))[0])
        return np.array(rows)

    def truncate(self, n):
        self.cache.truncate(n)
        for keys, values in self.kept.values():
            del keys[n:], values[n:]

    def fork(self):
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        other.kept = {layer: (list(k), list(v)) for layer, (k, v) in self.kept.items()}
        return other


def restored(engine, kv, options):
    fresh = _core.KVCache(engine, kv.k, kv.v, **options)
    fresh.load_state(kv.n_tokens, kv.lost, kv.state())
    return fresh


class Pair:
    """A cache and what it should be."""

    def __init__(self, kv, reference):
        self.kv, self.reference = kv, reference

    def feed(self, engine, tokens):
        got, expected = engine.forward(tokens, self.kv, "all"), self.reference.feed(tokens)
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
        assert self.kv.n_tokens == self.reference.cache.n

    def truncate(self, n):
        try:
            self.reference.truncate(n)
        except ValueError:
            before = self.kv.state()
            with pytest.raises(ValueError, match="cannot keep"):
                self.kv.truncate(n)
            assert self.kv.n_tokens == self.reference.cache.n and np.array_equal(self.kv.state(), before)
            return
        self.kv.truncate(n)
        assert self.kv.n_tokens == n


def run_steps(engine, pair, steps, options, seed):
    """A sequence of STEPS, beginning with one pair; forks join it, and each is fed at the end."""
    rng, pairs = np.random.default_rng(seed), [pair]

    def some(n):
        return rng.integers(0, engine.description.vocab_size, n).astype(np.int32)

    for kind, which, amount in steps:
        pair = pairs[which % len(pairs)]
        n = pair.kv.n_tokens
        if kind == "feed":
            pair.feed(engine, some(1 + amount % 170))
        elif kind == "truncate":
            pair.truncate(n * amount // 999)
        elif kind == "cut a little":
            pair.truncate(n - amount % 130)
        elif kind == "fork":
            pairs = [*pairs[-2:], Pair(pair.kv.copy(), pair.reference.fork())]
        else:
            pair.kv = restored(engine, pair.kv, options)
    for pair in pairs:
        pair.feed(engine, some(3))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["feed", "feed", "truncate", "cut a little", "fork", "restore"]),
        st.integers(0, 2),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=12,
)


def go_on(engine, kv):
    """Logits of enough tokens to pack and evict tiles."""
    return np.concatenate([engine.forward(np.arange(60, dtype=np.int32), kv, "all") for _ in range(3)])
