"""The list model and the float64 model for layers with a sliding window."""

from functools import cache

import numpy as np

from support.cache_steps import StateCache
from support.numpy_llama import NumpyLlama
from support.ring import TILE, ListCache


def most_visible(options):
    """Most tokens that a layer without a sliding window shows, counted."""
    return _most_visible(*options.values())


@cache
def _most_visible(ctx, sinks, window):
    cache, most = ListCache(ctx, sinks, window), 0
    for _ in range(3 * ctx):
        cache.append()
        most = max(most, len(cache.visible()))
    return most


def widths(options):
    """Sliding windows around every boundary."""
    ctx, window, most = options["ctx"], options["window"], most_visible(options)
    found = {1, 2, 10, 63, 64, 65, 127, 128, 129, ctx - 1, ctx, ctx + 1, ctx + 63, ctx + 64, ctx + 65, most - 1, most}
    found |= {window + extra for extra in (-1, 0, 1, 2, 63, 64, 65, 128)}
    return sorted(w for w in found if w >= 1)


def slots(window, width):
    """What the newest `width` tokens need of a ring behind a window that holds `window` at least."""
    return max(0, -(-(width - window) // TILE))


class SlidingCache(StateCache):
    """The list model of a layer: shows the newest `width` tokens, and must have them."""

    def __init__(self, width, ctx, sinks, window):
        super().__init__(ctx, sinks, window)
        self.width, self.n_slots = width, slots(window, width)

    def kept(self):
        return super().visible()

    def visible(self):
        seen = list(range(max(0, self.n - self.width), self.n))
        assert set(seen) <= set(self.kept())
        return seen

    def truncate(self, n):
        """Possible if what the next token sees is there, and the last one."""
        needed = range(max(0, min(n - self.width + 1, n - 1)), n)
        if not 0 <= n <= self.n or not set(needed) <= set(self.kept()):
            raise ValueError
        super().truncate(n)


def layer_cache(width, options):
    """A window that no token reaches beyond is none."""
    return SlidingCache(width, **options) if width and width < most_visible(options) else StateCache(**options)


class SlidingLlama(NumpyLlama):
    """Attention by the model's rule, p - width < j <= p, in layers that have a width; by the list model in others,
    where the first tokens move up to the oldest one that is left."""

    def __init__(self, file, **options):
        super().__init__(file, ctx=options["ctx"])
        self.options = options

    def shown(self, n, width):
        """(bool [n, n] of queries and tokens, int [n, sinks]: where each query sees the first tokens)"""
        sinks, at = self.options["sinks"], np.arange(n)
        if width and width < most_visible(self.options):
            age = at[:, None] - at
            return (age >= 0) & (age < width), np.tile(at[:sinks], (n, 1))
        cache, seen = ListCache(**self.options), np.zeros((n, n), bool)
        for t in at:
            cache.append()
            seen[t, cache.visible()] = True
        oldest = np.where(seen[:, sinks:].any(1), sinks + seen[:, sinks:].argmax(1), sinks)
        return seen, oldest[:, None] - sinks + at[:sinks]

    def attention(self, x, layer):
        d, n = self.d, len(x)
        seen, places = self.shown(n, (d.sliding_windows or [None] * d.n_layers)[int(layer.split(".")[1])])
        q, k, v = self.qkv(x, layer)
        k, v = (np.repeat(part, d.n_heads // d.n_kv_heads, 1) for part in (k, v))
        q = self.turn(q, layer, np.arange(n))
        scores = q.transpose(1, 0, 2) @ self.turn(k, layer, np.arange(n)).transpose(1, 2, 0)
        for sink in range(min(n, places.shape[1])):
            moved = self.turn(np.tile(k[sink], (n, 1, 1)), layer, places[:, sink])
            scores[:, :, sink] = (q * moved).sum(-1).T
        scores = np.where(seen, self.scaled(scores), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True)) @ v.transpose(1, 0, 2)
        return self.linear(out.transpose(1, 0, 2).reshape(n, -1), f"{layer}.attn.o")
