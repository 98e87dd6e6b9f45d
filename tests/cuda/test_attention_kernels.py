"""Attention of the device's kernels, run on the host, against float64 NumPy over what the cache holds and the core."""

from functools import lru_cache
from itertools import cycle

import numpy as np
import pytest

from kvrun._core import probe
from kvrun.cuda import launch as launches
from support.attention import (
    CODE_BITS,
    CTX,
    OPTIONS,
    SCALE,
    TURNS,
    Held,
    advance,
    attend,
    check_held,
    exact,
    ordinary,
    rms,
)
from support.cases import some
from support.cuda.kernel_cache import KernelCache
from support.ring import ListCache

pytestmark = pytest.mark.crossed

FORMATS = [
    ("f32", "f32"),
    ("f16", "f16"),
    ("q8", "q8"),
    ("q4", "q4"),
    ("q2", "q2"),
    ("q4", "q2"),
    ("q8", "f16"),
    ("f32", "q4"),
]
HEAD_DIMS = [64, 80, 96, 128, 256]

# Errors of an output, as root mean square relative to it. One token: floats are summed in float32; with float16 queries
# and weights have 22 bits, with codes 11: each is off by 2^-13 or so, and there are hundreds. Chunks: everything is
# rounded to float16, keys and values too. Next to them one token less of 260 is 1 / 260 at least.
ONE_TOLERANCE = {"f32": 2e-6, "f16": 5e-6, "q8": 1.2e-3, "q4": 1.2e-3, "q2": 1.2e-3}
CHUNK_TOLERANCE = 2e-3
# The core rounds queries and weights to 8 bits where tiles have 4 or 2: see tests/core/test_attention.py.
CORE_TOLERANCE = {"f32": 2e-3, "f16": 2e-3, "q8": 3e-3, "q4": 0.08, "q2": 0.08}

# Lengths of the text: the first tokens, the first window, tiles packed and evicted, ten turns.
LENGTHS = [
    1,
    3,
    5,
    64,
    68,
    70,
    131,
    132,
    133,
    CTX - 1,
    CTX,
    CTX + 2,
    CTX + 63,
    CTX + 64,
    CTX + 66,
    TURNS[0] + 28,
    TURNS[0] + 29,
]


def queries(text, start, end, group):
    return text.q[start:end, :, np.arange(group) % 8].reshape(end - start, -1)


def feed(cache, text, end, group=None):
    """Tokens up to `end` as one chunk; the attention [n, n_kv_heads, group, head_dim] of each if there is a group."""
    start = cache.kv.n_tokens
    k, v = (x[start:end].reshape(end - start, -1) for x in (text.k, text.v))
    q = queries(text, start, end, group) if group else None
    out = cache.feed(q, k, v, text.inv_freq, group)
    return out.reshape(end - start, text.k.shape[1], group, -1).astype(np.float64) if group else None


def skip_to(cache, text, n):
    for end in range(cache.kv.n_tokens, n, 500):
        feed(cache, text, min(end + 500, n))


def worse(tolerance, k, v):
    return max(tolerance[k], tolerance[v])


@pytest.mark.parametrize("k, v", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_token(head_dim, k, v):
    """At every boundary (at others of them for each pair of formats where heads are large), for numbers of queries per
    KV head in turn, and work split among blocks in different ways."""
    text, turn = ordinary(head_dim, LENGTHS[-1]), HEAD_DIMS.index(head_dim) + FORMATS.index((k, v))
    cache, shown = KernelCache(k, v, head_dim, scale=SCALE, **OPTIONS), ListCache(**OPTIONS)
    held = Held(cache.kv)
    for i, n in list(enumerate(LENGTHS))[turn % 2 if head_dim > 80 else 0 :: 2 if head_dim > 80 else 1]:
        group = [1, 8, 3, 4, 9, 2, 7, 5, 6][(i + turn) % 9]
        cache.spans = [1, 3, 2, 11][(i + turn) % 4]
        skip_to(cache, text, n - 1)
        advance(shown, n)
        out = feed(cache, text, n, group)[0]
        entries = held.read(cache.host().copy().state(), shown)
        check_held(text, entries, shown, k, v)
        expected = attend(text, n - 1, entries, shown)[:, np.arange(group) % 8]
        assert rms(out - expected) <= worse(ONE_TOLERANCE, k, v) * rms(expected), f"{n} tokens, {group} queries"


CHUNKS = [(40, 100, 33, 64, 65), (200, 1, 90), (3, 16, 64, 1, 150, 11), (17, 66, 5, 130)]


def every(n):
    """One of n of the pairs (formats, head_dim), in which each of both occurs."""
    pairs = [(formats, dim) for i, formats in enumerate(FORMATS) for j, dim in enumerate(HEAD_DIMS) if (i + j) % n == 0]
    assert {formats for formats, _ in pairs} == {*FORMATS} and {dim for _, dim in pairs} == {*HEAD_DIMS}
    return pairs


@pytest.mark.parametrize("pair", some(every(2), every(4)), ids=str)
def test_chunks_see_what_single_tokens_see(pair):
    """While tiles are packed and evicted and the sinks move. Some tokens of every chunk are asked again alone."""
    (k, v), head_dim = pair
    text, turn = ordinary(head_dim, CTX + 300), HEAD_DIMS.index(head_dim) + FORMATS.index((k, v))
    cache = KernelCache(k, v, head_dim, scale=SCALE, **OPTIONS)
    group, sizes = [1, 2, 3, 5][turn % 4], cycle(CHUNKS[turn // 2 % 4])
    skip_to(cache, text, [0, CTX - 70][turn % 2])
    while cache.kv.n_tokens < [130, CTX + 70][turn % 2]:
        start, n = cache.kv.n_tokens, next(sizes)
        alone = cache.copy()
        out = feed(cache, text, start + n, group)
        for t in sorted({0, n // 3, 2 * n // 3, n - 1} & set(range(n))):
            skip_to(alone, text, start + t)
            expected = feed(alone, text, start + t + 1, group)[0]
            error = rms(out[t] - expected) / rms(expected)
            assert error <= CHUNK_TOLERANCE, f"token {start + t} of the chunk from {start} to {start + n}"


@lru_cache(maxsize=4)
def exact_outputs(head_dim, transformed, first, last):
    """(text, the attention [last - first, 1, 8, head_dim] of those tokens), which nothing has to round."""
    text, shown, out = exact(head_dim, last, transformed), ListCache(**OPTIONS), []
    for t in range(first, last):
        advance(shown, t + 1)
        seen = shown.visible()
        out.append(attend(text, t, [(text.k[seen, 0], text.v[seen, 0].astype(np.float64))], shown))
    return text, np.array(out)


@pytest.mark.parametrize("k, v", FORMATS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_every_token_of_a_chunk_without_rounding(head_dim, k, v):
    """A token too many or too few shows alike in every format. None comes alone: that kernel rounds queries."""
    first, last, turn = CTX - 100, CTX + 135, HEAD_DIMS.index(head_dim) + FORMATS.index((k, v))
    text, expected = exact_outputs(head_dim, v in CODE_BITS, first, last)
    cache, group = KernelCache(k, v, head_dim, scale=SCALE, **OPTIONS), 1 + turn % 3
    skip_to(cache, text, first)
    sizes, outputs = cycle([(235,), (66, 3, 128, 2)][turn % 2]), []
    while cache.kv.n_tokens < last:
        outputs.append(feed(cache, text, min(cache.kv.n_tokens + next(sizes), last), group))
    errors = np.abs(np.concatenate(outputs) - expected[:, :, :group]).max((1, 2, 3))
    assert errors.max() <= 1e-4 * 127.5, f"first at token {first + np.argmax(errors > 1e-4 * 127.5)}"


SLIDING = [
    dict(ctx=200, sinks=4, window=64),
    dict(ctx=64, sinks=0, window=0),
    dict(ctx=200, sinks=70, window=1),
    dict(ctx=300, sinks=17, window=129),
]


@pytest.mark.parametrize("options", SLIDING, ids=str)
@pytest.mark.parametrize("sight", [1, 10, 64, 65, 100, 199, 0])
def test_sliding_windows_and_odd_options(sight, options):
    """Against the core, one token and chunks, with a soft cap, several KV heads and more heads than a block takes."""
    turn = SLIDING.index(options) + sight
    k, v = FORMATS[turn % len(FORMATS)]
    group, cap = [1, 2, 3, 9][turn % 4], [0, 20.0][turn // 2 % 2]
    cache = KernelCache(k, v, 32, 2, sight, softcap=cap, scale=SCALE, **options)
    core, rng = cache.reference(), np.random.default_rng(turn)
    inv_freq = 10000.0 ** (-np.arange(16) / 16)
    for n in (1, 1, 63, 1, 75, 1, 64, 90, 1):
        keys, values = rng.standard_normal((2, n, 64)).astype(np.float32)
        q = (rng.standard_normal((n, 2 * group * 32)) * 1.5 / SCALE / 32**0.5).astype(np.float32)
        out = cache.feed(q, keys, values, inv_freq, group)
        expected = probe.attention(core, q, keys, values, inv_freq, level="scalar")
        assert rms(out - expected) <= worse(CORE_TOLERANCE, k, v) * rms(expected), f"{n} to {cache.kv.n_tokens}"


def test_after_taking_back():
    """Tiles that a longer text has evicted are not seen, and the sinks stand before what is left."""
    cache = KernelCache("q8", "q8", 64, 2, scale=SCALE, fill=0, **OPTIONS)
    core, text = cache.reference(), ordinary(64, 900, 2)
    for n, keep in ((400, 390), (1, 350), (70, 345), (1, None), (150, None), (1, None)):
        start = core.n_tokens
        q, k, v = queries(text, start, start + n, 3), *(x[start : start + n].reshape(n, -1) for x in (text.k, text.v))
        expected = probe.attention(core, q, k, v, text.inv_freq, level="scalar")
        assert rms(cache.feed(q, k, v, text.inv_freq, 3) - expected) <= CORE_TOLERANCE["q8"] * rms(expected), start
        if keep is not None:
            core.truncate(keep)
            cache.truncate(keep)


def test_compiled_for_one_head_size_and_formats():
    """As a GPU has them: the same to the bit."""
    text, ctx = ordinary(128, 400), 260
    caches = [KernelCache("q4", "q2", 128, scale=SCALE, ctx=ctx, sinks=4, window=64) for _ in range(2)]
    caches[1].defines = launches.attention.defines(caches[1].geometry)
    for n in (1, 70, 71, 200, 201, 330, 331):
        np.testing.assert_array_equal(*(feed(cache, text, n, 3) for cache in caches), f"{n} tokens")


@pytest.mark.parametrize("k, v", FORMATS[1:5])
def test_nothing_is_seen_of_an_earlier_text(k, v):
    """What it left in the room of tokens yet to come has no weight, not even as part of a product."""
    text = ordinary(64, 400)
    used, fresh = (KernelCache(k, v, 64, scale=SCALE, **OPTIONS) for _ in range(2))
    used.memory.view(np.uint16)[:], fresh.memory[:] = 0x7C00, 0xFF  # infinity as float16, and no number
    for n in (1, 3, 5, 70, 75, 132, 133, 200, 300, 301):
        np.testing.assert_array_equal(feed(used, text, n, 3), feed(fresh, text, n, 3), f"{n} tokens")


@pytest.mark.parametrize("k, v", [("q8", "q8"), ("q4", "q4"), ("q2", "q2")])
@pytest.mark.parametrize("size", [1e-3, 30, 3000])
def test_large_and_small_numbers(size, k, v):
    """Values as large as float16 holds, and keys and queries far from 1: nothing overflows, nothing vanishes."""
    rng, n = np.random.default_rng(5), 300
    cache = KernelCache(k, v, 64, scale=SCALE, fill=0, **OPTIONS)
    core, inv_freq = cache.reference(), 10000.0 ** (-np.arange(32) / 32)
    sizes = np.float32([size, size, 1.2 / size])[:, None, None]
    keys, values, q = rng.standard_normal((3, n, 64)).astype(np.float32) * sizes
    for part in (slice(0, n - 1), slice(n - 1, n)):
        out = cache.feed(q[part], keys[part], values[part], inv_freq, 1)
        expected = probe.attention(core, q[part], keys[part], values[part], inv_freq, level="scalar")
        assert rms(out - expected) <= worse(CORE_TOLERANCE, k, v) * rms(expected)
