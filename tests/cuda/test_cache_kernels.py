"""The kernels that fill a cache, run on the host: they leave the bytes that the scalar core leaves."""

import numpy as np
import pytest

from kvrun._core import probe
from kvrun.cuda import abi
from kvrun.cuda import launch as launches
from support.cuda.kernel_cache import BY_VALUE, KernelCache, launch

pytestmark = pytest.mark.crossed

FORMATS = [
    ("f32", "f32"),
    ("f16", "f16"),
    ("q8", "q8"),
    ("q4", "q4"),
    ("q2", "q2"),
    ("q4", "q2"),
    ("f32", "q8"),
    ("q2", "f16"),
]
HEAD_DIMS = [16, 64, 72, 80, 96, 128, 256]
OPTIONS = [
    dict(ctx=132, sinks=4, window=64),
    dict(ctx=64, sinks=0, window=0),
    dict(ctx=200, sinks=70, window=1),
    dict(ctx=300, sinks=17, window=129),
]
# Up to three turns of the ring, in chunks that pack no tile, one, and more than the ring has.
CHUNKS = [(1, 2, 70, 1, 200, 300, 1, 1, 30), (600,), (3, 64, 65, 63, 128, 1, 1, 190)]

# The same arithmetic in the same order: bytes may differ only where a compiler has contracted some of it.
MOST_DIFFERENT = 1e-3


def random_tokens(rng, n, width):
    k, v = rng.standard_normal((2, n, width)).astype(np.float32)
    k[:, 3::7] = 4 * k[:, 3::7] + 10
    return k, v * rng.choice([0.5, 1, 5], (n, 1)).astype(np.float32)


def frequencies(head_dim):
    return 10000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))


def feed_both(device, core, k, v):
    inv_freq = frequencies(device.geometry["head_dim"])
    device.feed(None, k, v, inv_freq, 1)
    probe.attention(core, None, k, v, inv_freq, level="scalar")
    ours, theirs = device.host().copy().state(), core.copy().state()
    assert ours.shape == theirs.shape
    assert np.mean(ours != theirs) <= MOST_DIFFERENT, f"after {core.n_tokens} tokens"


@pytest.mark.parametrize("k, v", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_same_bytes(head_dim, k, v):
    number = HEAD_DIMS.index(head_dim) + FORMATS.index((k, v))
    sight = [0, 100, 0, 1][number % 4]
    device = KernelCache(k, v, head_dim, 2, sight, fill=0, **OPTIONS[number // 3 % len(OPTIONS)])
    core, rng = device.reference(), np.random.default_rng(number)
    for n in CHUNKS[number // 2 % len(CHUNKS)]:
        feed_both(device, core, *random_tokens(rng, n, 2 * head_dim))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k, v", FORMATS)
def test_token_by_token(k, v, options):
    """Round the ring; the chunk sizes of the other tests do not matter either."""
    device = KernelCache(k, v, 16, 1, fill=0, **options)
    core, rng = device.reference(), np.random.default_rng(1)
    for _ in range(2):
        tokens = options["ctx"] // 2
        for _ in range(tokens):
            k_, v_ = random_tokens(rng, 1, 16)
            device.feed(None, k_, v_, frequencies(16), 1)
            probe.attention(core, None, k_, v_, frequencies(16), level="scalar")
        feed_both(device, core, *random_tokens(rng, 150, 16))


@pytest.mark.parametrize("k, v", [("q8", "q8"), ("q4", "q4"), ("q2", "q2")])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rows_that_are_hard_to_pack(head_dim, k, v):
    """Constant, zero, tiny, huge and lone numbers, which make scales of 0, of no precision, and at float16's limit."""
    options = dict(ctx=132, sinks=4, window=64)
    device = KernelCache(k, v, head_dim, fill=0, **options)
    core, rng = device.reference(), np.random.default_rng(2)
    keys, values = rng.standard_normal((2, 260, head_dim)).astype(np.float32)
    for x in (keys.T, values):  # channels of K, tokens of V
        x[5] = 0
        x[6] = 7.25
        x[7] *= 1e-6
        x[8] *= 3e4
        x[9] = 0
        x[9, 20] = 60000
        x[10] = np.where(x[10] > 0, 1, -1)
        x[11] *= 1e-3
        x[11, 31] = -500
    feed_both(device, core, keys, values)


def test_after_taking_back():
    """What was taken back is written again; the ring has lost tiles for ever."""
    device = KernelCache("q4", "q2", 64, 2, fill=0, **OPTIONS[0])
    core, rng = device.reference(), np.random.default_rng(3)
    for n, keep in ((300, 290), (100, 330), (1, 325), (200, 450), (90, 0), (200, 150)):
        feed_both(device, core, *random_tokens(rng, n, 128))
        core.truncate(keep)
        device.truncate(keep)
        assert device.packed_ever == core.packed_ever
    feed_both(device, core, *random_tokens(rng, 1, 128))
    feed_both(device, core, *random_tokens(rng, 129, 128))


@pytest.mark.parametrize("first, n", [(0, 1), (5, 3), (10**9 + 7, 1), (10**9 + 7, 130)])
def test_angles(first, n):
    """Of tokens at any position, and of sinks where they were and where they are moved to; two rotary embeddings."""
    options = dict(ctx=200, sinks=3, window=64)
    cache, rng = KernelCache("q4", "q4", 64, **options), np.random.default_rng(4)
    half, rows = 32, launches.cache.sink_rows(n)
    inv_freq, amplitude = np.stack([frequencies(64), frequencies(64) / 8]), rng.random((2, half)) + 0.5
    step = np.zeros(1, abi.STEP)
    step["first"], step["n"] = first, n
    ropes = abi.struct(abi.ROPES, n=2, inv_freq=inv_freq.ctypes.data, amplitude=amplitude.ctypes.data)
    assert ropes.dtype in BY_VALUE
    shapes = [(2, n, half)] * 2 + [(2, rows, 3, half)] * 2
    tables = [np.full(shape, np.nan, np.float32) for shape in shapes]
    launch(
        "step_angles",
        (2,),
        64,
        0,
        step.view(np.uint8),
        ropes,
        cache.layout,
        np.int64(cache.geometry["n_slots"]),
        np.int32(rows),
        *tables,
    )

    gathered = first + 1 - 3 - 64
    evicted = max(gathered // 64 - cache.geometry["n_slots"], 0)
    shifts = np.array([0, *64 * (evicted + np.arange(rows - 1))])
    positions = np.arange(first, first + n)[:, None], shifts[:, None, None] + np.arange(3)[:, None]
    for cosines, sines, at in ((*tables[:2], positions[0]), (*tables[2:], positions[1])):
        for rope in range(2):
            turn = at * inv_freq[rope]
            np.testing.assert_allclose(cosines[rope], amplitude[rope] * np.cos(turn), rtol=0, atol=2e-7)
            np.testing.assert_allclose(sines[rope], amplitude[rope] * np.sin(turn), rtol=0, atol=2e-7)
