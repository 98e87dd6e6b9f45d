"""Attention against float64 NumPy: every format, head_dim, number of queries per KV head and level, at every length
where something changes.

Two kinds of text. An ordinary one, of which every format keeps what it can: the reference attends to the very entries
that the cache holds, read from its state by the layouts that cache.pxd, kernels.h, quantized.h and dot.h describe. And
one that no format and no product has to round, so that a token too many or too few, or a wrong lane, shows in every
format alike.
"""

from functools import lru_cache
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import probe
from support.attention import (
    CODE_BITS,
    CTX,
    OPTIONS,
    SCALE,
    SINKS,
    TURNS,
    WINDOW,
    Held,
    Text,
    advance,
    attend,
    check_held,
    exact,
    ordinary,
    rms,
)
from support.ring import TILE, ListCache

pytestmark = pytest.mark.crossed

GROUPS = range(1, 9)  # query heads of a KV head
HEAD_DIMS = [64, 80, 96, 128, 256]
FORMATS = [(name, name) for name in _core.KV_FORMATS] + [("q4", "q2"), ("q8", "q4")]
LEVELS = _core.isa_available()

# The first token, the sinks, a tile's worth of tokens, the window full, the first tile packed; the ring full and two
# tiles evicted; the same after ten turns.
RING = range(CTX - 1, CTX + 131)
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


def worse(tolerance, k, v):
    return max(tolerance[k], tolerance[v])


# Every length -------------------------------------------------------------------------------------------------------


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
    outputs, size_of_next = [], cycle(sizes)
    while model.kv.n_tokens < last:
        outputs.append(model.feed(text, min(model.kv.n_tokens + next(size_of_next), last)))
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
