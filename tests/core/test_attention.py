"""Attention against float64 NumPy: every format, head_dim, number of queries per KV head and level, at every length
where something changes.

Two kinds of text. An ordinary one, of which every format keeps what it can: the reference attends to the very entries
that the cache holds, read from its state by the layouts that cache.pxd, kernels.h, cache/quantized.h and dot.h describe. And one
that no format and no product has to round, so that a token too many or too few, or a wrong lane, shows in every format
alike.
"""

from functools import lru_cache
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
from numpy_llama import hadamard, rotate
from test_ring import TILE, ListCache

from kvrun import _core
from kvrun._core import probe

SINKS, WINDOW = 4, 64
CTX = SINKS + WINDOW + 2 * TILE
OPTIONS = dict(ctx=CTX, sinks=SINKS, window=WINDOW)
SCALE = 0.17  # of attention: none that follows from head_dim
GROUPS = range(1, 9)  # query heads of a KV head
HEAD_DIMS = [64, 80, 96, 128, 256]
FORMATS = [(name, name) for name in _core.KV_FORMATS] + [("q4", "q2"), ("q8", "q4")]
LEVELS = _core.isa_available()
CODE_BITS = {"q8": 8, "q4": 4, "q2": 2}

# The first token, the sinks, a tile's worth of tokens, the window full, the first tile packed; the ring full and two
# tiles evicted; the same after ten turns.
RING = range(CTX - 1, CTX + 131)
TURNS = [10 * CTX, 10 * CTX + 27, 10 * CTX + 28, 10 * CTX + 29]
BOUNDARIES = [
    1,
    3,
    4,
    5,
    63,
    64,
    65,
    67,
    68,
    69,
    127,
    128,
    129,
    131,
    132,
    133,
    *(CTX + evicted * TILE + i for evicted in range(3) for i in range(-1, 3)),
    *TURNS,
]
LENGTHS = sorted({*BOUNDARIES, *RING[::3]})

# Errors of a step's output, as root mean square over all heads, relative to that of the output; and the same over all
# steps of a case. f32 and f16 have sums in float32. The others round queries and softmax weights, with the scales
# folded in, to 1/127 of the largest of a block of 32 (q8: to 1/256 of that). With codes c of b bits a score is off by
#   SCALE max|q| (max - min) sqrt(sum((c - middle)^2)) / (2^b - 1) / (127 sqrt(12))
# or so, which is about 0.01 here, whatever b, and so is a weight, relatively; weights themselves are rounded alike. A
# block with one large number has steps that are coarse for all others: the worst step is several times the mean.
STEP_TOLERANCE = {"f32": 1e-5, "f16": 1e-5, "q8": 1e-3, "q4": 0.08, "q2": 0.08}
CASE_TOLERANCE = {"f32": 2e-6, "f16": 2e-6, "q8": 3e-4, "q4": 0.02, "q2": 0.02}
# Where nothing has to be rounded: of the largest value, in every format. One token of 260 is 40 times as much.
EXACT_TOLERANCE = 1e-4


# What goes in -------------------------------------------------------------------------------------------------------


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


class Model:
    """A cache and who asks it: `group` query heads for each KV head."""

    def __init__(self, k, v, head_dim, group, level, n_kv_heads=1, options=OPTIONS, threads=1):
        self.description = SimpleNamespace(n_layers=1, n_kv_heads=n_kv_heads, head_dim=head_dim, attention_scale=SCALE)
        self.kv = _core.KVCache(self, k, v, **options)
        self.group, self.level, self.threads = group, level, threads

    def feed(self, text, end, attend=True):
        """Tokens up to `end` as one chunk: float64 [tokens, n_kv_heads, group, head_dim], the attention of each."""
        start, n = self.kv.n_tokens, end - self.kv.n_tokens
        q = text.q[start:end, :, : self.group].reshape(n, -1) if attend else None
        k, v = (x[start:end].reshape(n, -1) for x in (text.k, text.v))
        out = probe.attention(self.kv, q, k, v, text.inv_freq, self.threads, self.level)
        return out.reshape(n, text.k.shape[1], self.group, -1).astype(np.float64) if attend else None

    def skip_to(self, text, n):
        """Tokens up to n that nobody asks about."""
        for end in range(self.kv.n_tokens, n, 500):
            self.feed(text, min(end + 500, n), attend=False)


# What the cache holds -----------------------------------------------------------------------------------------------


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


def worse(tolerance, k, v):
    return max(tolerance[k], tolerance[v])


def advance(shown, n):
    while shown.n < n:
        shown.append()


# Every length -------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("k, v", FORMATS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_is_that_of_what_the_cache_holds(head_dim, level, k, v):
    """Token by token, for every number of queries per KV head; between boundaries each is asked every fourth time."""
    text = ordinary(head_dim, LENGTHS[-1])
    models = [Model(k, v, head_dim, group, level) for group in GROUPS]
    shown, held, errors = ListCache(**OPTIONS), Held(models[0].kv), []
    for n in LENGTHS:
        advance(shown, n)
        if n == TURNS[0]:
            go_on_from_one(models, text, n - 1)
        asked = models if n in BOUNDARIES else models[n % 4 :: 4]
        for model in asked:
            model.skip_to(text, n - 1)
            model.output = model.feed(text, n)[0]
        entries = held.read(asked[0].kv.copy().state(), shown)
        check_held(text, entries, shown, k, v)
        expected = attend(text, n - 1, entries, shown)
        for model in asked:
            part = expected[:, : model.group]
            errors.append(rms(model.output - part) / rms(part))
            assert errors[-1] <= worse(STEP_TOLERANCE, k, v), f"{n} tokens, {model.group} queries"
    assert rms(errors) <= worse(CASE_TOLERANCE, k, v)


def go_on_from_one(models, text, n):
    """All hold the same, so the stretch up to n need not be gone for each."""
    for model in models:
        model.skip_to(text, max(model.kv.n_tokens for model in models))
        np.testing.assert_array_equal(model.kv.state(), models[0].kv.state())
    models[0].skip_to(text, n)
    for model in models[1:]:
        model.kv = models[0].kv.copy()


EXACT = (0, RING[-1]), (TURNS[0] - 20, TURNS[-1])  # tokens that are asked about
WAYS = [(1,), (400,), (1, 2, 17, 66, 5, 130), (3, 16, 64, 1, 150, 11)]  # sizes of chunks, in turn


def in_chunks(model, text, last, sizes):
    """The outputs of all tokens up to the last."""
    outputs = []
    for size in cycle(sizes):
        outputs.append(model.feed(text, min(model.kv.n_tokens + size, last)))
        if model.kv.n_tokens == last:
            return np.concatenate(outputs)


@lru_cache(maxsize=4)
def exact_outputs(head_dim, transformed, n_kv_heads):
    """(text, the attention [n, n_kv_heads, 8, head_dim] of the tokens of EXACT)"""
    text, shown = exact(head_dim, TURNS[-1], transformed, n_kv_heads), ListCache(**OPTIONS)
    out = np.full(text.q.shape, np.nan)
    for first, last in EXACT:
        for t in range(first, last):
            advance(shown, t + 1)
            seen = shown.visible()
            entries = [(text.k[seen, head], text.v[seen, head].astype(np.float64)) for head in range(n_kv_heads)]
            out[t] = attend(text, t, entries, shown)
    return text, out


@pytest.mark.parametrize("k, v", FORMATS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_without_rounding(head_dim, level, k, v):
    """Every token, of chunks of many sizes, for every number of queries per KV head: to float32."""
    turn, kv_heads = FORMATS.index((k, v)) + HEAD_DIMS.index(head_dim), 2 if head_dim == 80 else 1
    text, expected = exact_outputs(head_dim, v in CODE_BITS, kv_heads)
    for first, last in EXACT:
        start = Model(k, v, head_dim, 0, level, kv_heads)
        start.skip_to(text, first)
        for group in GROUPS:
            model, sizes = Model(k, v, head_dim, group, level, kv_heads), WAYS[(turn + group) % len(WAYS)]
            model.kv = start.kv.copy()
            errors = in_chunks(model, text, last, sizes) - expected[first:last, :, :group]
            wrong = np.flatnonzero(np.abs(errors).max((1, 2, 3)) > EXACT_TOLERANCE * 127.5)
            assert not len(wrong), f"{group} queries, chunks of {sizes}: first at token {first + wrong[0]}"


@pytest.mark.parametrize("k, v", FORMATS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_chunks_see_what_single_tokens_see(head_dim, level, k, v):
    """While tiles are evicted and the sinks move: to the bit."""
    text, start = ordinary(head_dim, LENGTHS[-1]), Model(k, v, head_dim, 0, level)
    start.skip_to(text, CTX + 54)  # 10 and 74 tokens later a tile goes
    outputs = []
    for sizes in WAYS:
        model = Model(k, v, head_dim, 1 + (FORMATS.index((k, v)) + HEAD_DIMS.index(head_dim)) % 8, level)
        model.kv = start.kv.copy()
        outputs.append(in_chunks(model, text, CTX + 144, sizes))
    for sizes, out in zip(WAYS, outputs, strict=True):
        np.testing.assert_array_equal(out, outputs[0], f"chunks of {sizes}")


# Threads and spans of tiles -----------------------------------------------------------------------------------------


def after_tiles(n):
    """The first token of another tile."""
    return SINKS + n * TILE + 1


# Slots of the ring, and lengths in which the work of one token is split into few spans, into more, into long ones; and
# where tiles are evicted on the way.
SPANS = [
    (15, [1, 2, *map(after_tiles, (6, 7, 8, 11, 12, 15, 16, 17)), after_tiles(16) - 1, after_tiles(17) - 1]),
    (36, [*map(after_tiles, (31, 32, 33, 38, 47)), after_tiles(38) - 1]),
    (140, [*map(after_tiles, (126, 127, 128, 135))]),
]


@pytest.mark.parametrize("k, v", FORMATS)
@pytest.mark.parametrize("level", LEVELS)
def test_threads_share_one_kv_head(level, k, v):
    """One KV head and many tiles: spans are attended to apart, and put together the same by any number of threads."""
    text = exact(64, after_tiles(136), v in CODE_BITS)
    for n_slots, lengths in SPANS:
        options = dict(ctx=SINKS + WINDOW + n_slots * TILE, sinks=SINKS, window=WINDOW)
        models = [Model(k, v, 64, 3, level, options=options, threads=threads) for threads in (1, 2, 3)]
        shown = ListCache(**options)
        for n in sorted(lengths):
            models[0].skip_to(text, n - 1 - n % 19)
            for model in models[1:]:
                model.kv = models[0].kv.copy()
            outputs = [model.feed(text, n) for model in models]
            for model, out in zip(models, outputs, strict=True):
                np.testing.assert_array_equal(out, outputs[0], f"{n} tokens, {model.threads} threads")
                np.testing.assert_array_equal(model.kv.state(), models[0].kv.state(), f"{n} tokens")
            advance(shown, n)
            entries = [(text.k[shown.visible(), 0], text.v[shown.visible(), 0].astype(np.float64))]
            expected = attend(text, n - 1, entries, shown)
            assert np.abs(outputs[0][-1] - expected[:, :3]).max() <= EXACT_TOLERANCE * 127.5, f"{n} tokens"


@pytest.mark.parametrize("k, v", FORMATS)
def test_nothing_is_seen_of_an_earlier_text(k, v):
    """What it left in the room of tokens yet to come has no weight, not even as part of a product."""
    text = ordinary(64, LENGTHS[-1])
    used, fresh = (Model(k, v, 64, 3, None, threads=2) for _ in range(2))
    broken = Text(text.q, text.k, text.v, text.inv_freq)
    broken.k[:], broken.v[:] = np.inf, -np.inf
    used.skip_to(broken, 2 * CTX)
    used.kv.reset()
    for n in (1, 3, 5, 70, 75, 132, 133, 200, 300, 301):
        np.testing.assert_array_equal(used.feed(text, n), fresh.feed(text, n), f"{n} tokens")


def test_calls_that_make_no_sense():
    text = ordinary(64, LENGTHS[-1])
    kv = Model("q4", "q4", 64, 2, None).kv
    q, k, v = np.zeros((3, 128)), text.k[:3, 0], text.v[:3, 0]
    for wrong in (
        (q[:2], k, v),
        (q[:, :100], k, v),
        (q[:, :20], k, v),
        (q[0], k, v),
        (q, k[:, :32], v),
        (q, k, v[:2]),
        (q, k[:0], v[:0]),
    ):
        with pytest.raises(ValueError):
            probe.attention(kv, *wrong, text.inv_freq)
    for options in (dict(threads=0), dict(level="sse9")):
        with pytest.raises(ValueError):
            probe.attention(kv, q, k, v, text.inv_freq, **options)
    with pytest.raises(ValueError, match="32 inverse frequencies"):
        probe.attention(kv, q, k, v, text.inv_freq[:5])
    assert kv.n_tokens == 0
    assert probe.attention(kv, q, k, v, text.inv_freq).shape == (3, 128) and kv.n_tokens == 3
