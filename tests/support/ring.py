"""The ring as lists of token numbers, and a model's logits through a ring."""

import numpy as np

from kvrun import _core

TILE = 64


class ListCache:
    """The cache as lists of token numbers: sinks, tiles, window."""

    def __init__(self, ctx, sinks, window):
        self.n_sinks, self.keep = sinks, window
        self.n_slots = -(-(ctx - sinks - window) // TILE)
        self.sinks, self.tiles, self.window, self.n = [], [], [], 0

    def append(self):
        if self.n < self.n_sinks:
            self.sinks.append(self.n)
        else:
            self.window.append(self.n)
        self.n += 1
        if len(self.window) == self.keep + TILE:
            self.tiles.append(self.window[:TILE])
            self.window = self.window[TILE:]
            if len(self.tiles) > self.n_slots:
                self.tiles.pop(0)

    def visible(self):
        return self.sinks + [t for tile in self.tiles for t in tile] + self.window


def run(engine, tokens, chunks, k="f32", v="f32", **options):
    cache = _core.KVCache(engine, k, v, **options)
    rows, at = [], 0
    while at < len(tokens):
        n = min(next(chunks), len(tokens) - at)
        rows.append(np.atleast_2d(engine.forward(tokens[at : at + n], cache, "all")))
        at += n
    return np.concatenate(rows)


def every(n):
    while True:
        yield n


def ragged():
    rng = np.random.default_rng(3)
    while True:
        yield int(rng.choice([1, 1, 2, 5, 16, 17, 63, 64, 65, 128, 200, 512]))


OPTIONS = [
    dict(ctx=132, sinks=4, window=64),
    dict(ctx=200, sinks=4, window=64),
    dict(ctx=64, sinks=0, window=0),
    dict(ctx=200, sinks=70, window=1),
    dict(ctx=220, sinks=1, window=129),
    dict(ctx=185, sinks=17, window=100),
]


# Root mean square error of the logits, relative to theirs, that a format may cause in this tiny random model.
FORMAT_ERROR = {("f16", "f16"): 3e-3, ("q8", "q8"): 0.02, ("q4", "q4"): 0.3, ("q4", "q8"): 0.3, ("f32", "q8"): 0.02}


def rms(x):
    return np.sqrt((np.asarray(x, np.float64) ** 2).mean())
