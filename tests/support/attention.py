"""Attention in float64 NumPy over the very entries that a cache holds, and the texts to try it with."""

from functools import lru_cache

import numpy as np

from support.numpy_llama import hadamard, rotate
from support.ring import TILE

SINKS, WINDOW = 4, 64


CTX = SINKS + WINDOW + 2 * TILE


OPTIONS = dict(ctx=CTX, sinks=SINKS, window=WINDOW)


SCALE = 0.17  # of attention: none that follows from head_dim


CODE_BITS = {"q8": 8, "q4": 4, "q2": 2}


TURNS = [10 * CTX, 10 * CTX + 27, 10 * CTX + 28, 10 * CTX + 29]


class Text:
    """q [n, n_kv_heads, 8, head_dim], k and v [n, n_kv_heads, head_dim], float32, before RoPE; turned: k after it."""

    def __init__(self, q, k, v, inv_freq):
        self.q, self.k, self.v = (np.array(x, np.float32) for x in (q, k, v))
        self.inv_freq = inv_freq
        self.turned = rotate(self.k.astype(np.float64), np.arange(len(k))[:, None] * inv_freq)


@lru_cache(maxsize=2)
def ordinary(head_dim, n, n_kv_heads=1):
    """As in real models a few channels of K are wide or far from zero, and a few values of V are large. Scores have a
    standard deviation of 1.5: of a hundred tokens some ten share most of the weight."""
    rng, half = np.random.default_rng(head_dim), head_dim // 2
    k, v = rng.standard_normal((2, n, n_kv_heads, head_dim))
    q = rng.standard_normal((n, n_kv_heads, 8, head_dim))
    width, offset = np.ones(head_dim), np.zeros(head_dim)
    width[[3, head_dim - 5]] = 3
    offset[[int(0.9 * half), half + int(0.95 * half), half + half // 2]] = 10, -8, 4
    v[..., 7] *= 6
    v[rng.random(n) < 0.1] *= 5
    q *= 1.5 / SCALE / np.sqrt((width**2).sum())
    return Text(q, k * width + offset, v, 10000.0 ** (-np.arange(half) / half))


@lru_cache(maxsize=4)
def exact(head_dim, n, transformed, n_kv_heads=1):
    """A text that nothing has to round. Keys, and values after the transform that some formats keep them in, are on
    four levels that every format has codes for. Nothing turns. Queries, times the scales of K, are whole numbers, the
    largest of every block 127. For query head h a token has the weight 1 or none: its channels cancel out in pairs, but
    pair h, which decides.
    """
    rng, pairs = np.random.default_rng(head_dim), head_dim // 2
    levels = 85 * np.arange(4) - 127.5  # 255 = 3 x 85 = 15 x 17
    k = np.zeros((n, n_kv_heads, pairs, 2))
    k[..., 0] = rng.choice(levels, (n, n_kv_heads, pairs))
    chosen = rng.random((n, n_kv_heads, 8)) < [0.5, 0.02, 0.2, 0.05, 0.9, 0.1, 0.01, 0.3]
    k[..., :8, 0] = np.where(chosen, levels[3], rng.choice(levels[:2], chosen.shape))
    for level in (0, 1, 3):  # in every tile, as in every group of V, so that no other scale would do
        for head in range(8):
            k[SINKS + 5 * head + level :: TILE, :, head, 0] = levels[level]
    k[..., 1] = -k[..., 0]
    q = np.zeros((n, n_kv_heads, 8, pairs, 2))
    q[...] = rng.integers(-127, 128, (n, n_kv_heads, 8, pairs, 1))
    q[..., 15::16, :] = 127
    q[..., -1, :] = 127
    for head in range(8):
        q[..., head, head, :] = 127, -127
    v = rng.choice(levels, (n, n_kv_heads, head_dim))
    v[..., ::16], v[..., 1::16], v[..., 2::16] = levels[0], levels[1], levels[3]
    # Scales of their own: for channels of K, for groups of channels of V, and for tiles.
    half = rng.choice([0.5, 1], (pairs, 1))
    k, q = k * half, q / half
    v *= 0.5 ** (np.arange(head_dim) // 64 % 2)
    v *= 0.5 ** ((np.arange(n) - SINKS) // TILE % 2)[:, None, None]
    if transformed:
        v = v @ hadamard(head_dim)
    step = 20 / (2 * 2 * 127 * 85 * SCALE)  # two levels less are e^-20 in weight: none at all
    return Text(q.reshape(n, n_kv_heads, 8, head_dim) * step, k.reshape(n, n_kv_heads, head_dim), v, np.zeros(pairs))


def unpack_codes(data, depth, bits):
    """Panels of codes uint8 [panels, bytes], in the blocks of dot.h, as float64 [panels, depth, 16 lanes]."""
    out = np.empty((len(data), depth, 16))
    for first in range(0, depth, 32):
        size = min(32, depth - first)
        lines = size * bits // 32
        block = data[:, first * 16 * bits // 8 :][:, : 64 * lines].reshape(-1, lines, 16, 4)
        for field in range(8 // bits):
            codes = (block >> field * bits & (1 << bits) - 1).swapaxes(2, 3).reshape(-1, 4 * lines, 16)
            out[:, first + 4 * field * lines :][:, : 4 * lines] = codes
    return out


def unpack_keys(data, name, head_dim):
    """Keys [64, head_dim] of a tile, and how many bytes they take."""
    if name not in CODE_BITS:
        dtype = np.dtype(np.float32 if name == "f32" else np.float16)
        used = TILE * head_dim * dtype.itemsize
        return data[:used].view(dtype).reshape(head_dim, TILE).T.astype(np.float64), used
    depth, bits = -(-head_dim // 16) * 16, CODE_BITS[name]
    used = TILE * depth * bits // 8
    codes = unpack_codes(data[:used].reshape(4, -1), depth, bits).swapaxes(1, 2).reshape(TILE, depth)
    scale, minimum = data[used : used + 4 * depth].view(np.float16).reshape(2, depth).astype(np.float64)
    return (codes * scale + minimum)[:, :head_dim], used + 4 * depth


def unpack_values(data, name, head_dim):
    """Values [64, head_dim] of a tile, still transformed where the format does so, and how many bytes they take."""
    width = -(-head_dim // 16) * 16
    if name not in CODE_BITS:
        dtype = np.dtype(np.float32 if name == "f32" else np.float16)
        used = TILE * width * dtype.itemsize
        return data[:used].view(dtype).reshape(TILE, width).astype(np.float64)[:, :head_dim], used
    bits, groups = CODE_BITS[name], -(-head_dim // 64)
    used = TILE * width * bits // 8
    codes = unpack_codes(data[:used].reshape(width // 16, -1), TILE, bits).swapaxes(0, 1).reshape(TILE, width)
    params = data[used : used + 4 * TILE * groups].view(np.float16).reshape(groups, 2, TILE, 1).astype(np.float64)
    parts = [codes[:, 64 * g : 64 * g + 64] * scale + minimum for g, (scale, minimum) in enumerate(params)]
    return np.concatenate(parts, 1)[:, :head_dim], used + 4 * TILE * groups


class Held:
    """Reads what a cache holds, as float64: keys of the sinks as they came, all others after RoPE, and values."""

    def __init__(self, kv):
        d = kv.description
        self.n_heads, self.head_dim, self.k, self.v = d.n_kv_heads, d.head_dim, kv.k, kv.v
        self.window = ["f32" if name == "f32" else "f16" for name in (kv.k, kv.v)]
        self.transform = hadamard(d.head_dim) if kv.v in CODE_BITS else np.eye(d.head_dim)
        self.packed = {}

    def tile(self, data, k, v):
        keys, used = unpack_keys(data, k, self.head_dim)
        values, more = unpack_values(data[used:], v, self.head_dim)
        return keys, values @ self.transform, used + more

    def ring_tile(self, data, key):
        """Unpacked only when it is new; after that it has to be the same, to the byte."""
        if key not in self.packed:
            keys, values, used = self.tile(data, self.k, self.v)
            self.packed[key] = keys, values, data[:used].copy()
        keys, values, written = self.packed[key]
        assert np.array_equal(data[: len(written)], written), f"tile {key} was written twice"
        return keys, values, len(written)

    def read(self, state, shown):
        """For each KV head (keys, values) [visible, head_dim], from the state of a cache that shows what the list
        model does."""
        lanes, width = -(-shown.n_sinks // 16) * 16, -(-self.head_dim // 16) * 16
        heads = []
        for head in range(self.n_heads):
            used, n = 4 * self.head_dim * lanes, len(shown.sinks)
            keys = [state[:used].view(np.float32).reshape(self.head_dim, lanes).T[:n].astype(np.float64)]
            state = state[used:]
            used = 4 * width * shown.n_sinks
            values = state[:used].view(np.float32).reshape(-1, width)[:n, : self.head_dim]
            values = [values.astype(np.float64) @ self.transform]
            state = state[used:]
            for tile in shown.tiles:
                k, v, used = self.ring_tile(state, (head, tile[0]))
                keys.append(k)
                values.append(v)
                state = state[used:]
            for start in range(0, len(shown.window), TILE):
                k, v, used = self.tile(state, *self.window)
                keys.append(k[: len(shown.window) - start])
                values.append(v[: len(shown.window) - start])
                state = state[used:]
            heads.append((np.concatenate(keys), np.concatenate(values)))
        assert len(state) == 0
        return heads


def attend(text, position, entries, shown):
    """Attention [n_kv_heads, 8, head_dim] of one token over what the cache holds for each KV head, in float64."""
    n_sinks, seen = len(shown.sinks), shown.visible()
    positions = np.arange(n_sinks)
    if len(seen) > n_sinks:  # directly before the oldest of the others: where they were, until some are evicted
        positions += seen[n_sinks] - n_sinks
    out = np.empty(text.q.shape[1:])
    for head, (keys, values) in enumerate(entries):
        keys = keys.copy()
        keys[:n_sinks] = rotate(keys[:n_sinks, None], positions[:, None] * text.inv_freq)[:, 0]
        queries = rotate(text.q[position, head][None].astype(np.float64), position * text.inv_freq[None])[0]
        scores = queries @ keys.T * SCALE
        p = np.exp(scores - scores.max(1, keepdims=True))
        out[head] = p @ values / p.sum(1, keepdims=True)
    return out


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def advance(shown, n):
    while shown.n < n:
        shown.append()


# How far a token may be from what went in: keys in the root mean square, values relatively. Another one is 1.4 away.
HELD_TOLERANCE = {"f32": (1e-5, 1e-6), "f16": (5e-3, 1e-3), "q8": (0.02, 0.01), "q4": (0.3, 0.2), "q2": (1, 0.7)}


def check_held(text, entries, shown, k, v):
    """The entries are the tokens that the list model shows, in its order."""
    seen, sinks = shown.visible(), len(shown.sinks)
    for head, (keys, values) in enumerate(entries):
        assert len(keys) == len(values) == len(seen)
        np.testing.assert_array_equal(keys[:sinks], text.k[:sinks, head])
        errors = np.sqrt(np.mean((keys - text.turned[seen, head])[sinks:] ** 2, 1))
        assert (errors <= HELD_TOLERANCE[k][0]).all(), f"key of token {seen[sinks + np.argmax(errors)]}"
        errors = np.linalg.norm(values - text.v[seen, head], axis=1) / np.linalg.norm(text.v[seen, head], axis=1)
        assert (errors <= HELD_TOLERANCE[v][1]).all(), f"value of token {seen[np.argmax(errors)]}"
