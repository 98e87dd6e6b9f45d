"""What ``kvrun bench`` needs from the core: the memory's read bandwidth, caches filled without a prefill, and
the attention of a decode step, or one matrix product, on its own.

Where a function takes an engine, any object does that has ``threads`` and a ``description`` (n_layers, n_heads,
n_kv_heads, head_dim, attention_scale, and attention_softcap if it has one): other models' shapes are measured without
their weights.
"""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

import time

import numpy as np

from .attention cimport attend_step, combine
from .plan cimport Item, Items, Plan, Ropes, items_buffers, most_members, plan_buffers, plan_chunk, plan_groups, plan_queries
from .kernels cimport (KV_BLOCK, KV_PANEL, KV_TILE, kernels, kv_format, kv_input, kv_matmul_fn)
from .kernels import require_level
from .memory import advise_huge, anonymous
from .cache import sliding_windows
from .team cimport (kv_member, kv_team, kv_team_fn, kv_team_free, kv_team_new, kv_team_run,
                    kv_team_settle, kv_team_take)
from .cache cimport (Cache, CacheLayer, KVCache, first_tile, ring_tile, sink_keys, sink_values, tile_bytes, tile_of,
                     tiles_evicted, tiles_packed, window_bytes, window_tile)
from .weights import pack, packed_size, type_id

cdef extern from "stream.h":
    uint64_t kv_stream_four(const void* data, int64_t n) noexcept nogil
    uint64_t kv_stream_one(const void* data, int64_t n) noexcept nogil

cdef enum:
    BLOCK = 1 << 20       # bytes of the bandwidth test that a thread takes at a time
    GRAB = 64             # panels
    VARIANTS = 4          # different tiles that a filled cache is made of


cdef class _Team:
    """A team whose calls end with its threads, so that they may read what is the caller's."""
    cdef kv_team* team
    cdef int threads

    def __cinit__(self, threads):
        self.threads, self.team = threads, kv_team_new()
        if self.team == NULL:
            raise MemoryError("no memory for a team of threads")

    def __dealloc__(self):
        kv_team_free(self.team)

    cdef void run(self, kv_team_fn fn, void* arg) noexcept nogil:
        kv_team_run(self.team, self.threads, fn, arg)
        kv_team_settle(self.team)


# Bandwidth --------------------------------------------------------------------------------------------------

ctypedef struct Stream:
    uint8_t* data
    int64_t blocks
    bint write, four      # write to it, or read lines from four places in turn
    uint64_t sum


cdef void _stream(void* arg, kv_member* me) noexcept nogil:
    """One thread's part of a pass over the buffer."""
    cdef Stream* s = <Stream*>arg
    cdef int64_t block = 0, end = 0
    cdef uint64_t total = 0
    while kv_team_take(me, s.blocks, 1, &block, &end):
        if s.write:
            memset(s.data + block * BLOCK, 1, BLOCK)
        elif s.four:
            total += kv_stream_four(s.data + block * BLOCK, BLOCK)
        else:
            total += kv_stream_one(s.data + block * BLOCK, BLOCK)
    if total == 1:        # never: every byte is 1; but the sums have to be computed
        s.sum = total


def stream_buffer(threads, n_bytes=1 << 29):
    """A buffer for ``read_bandwidth``, every page of it written by `threads` threads.

    n_bytes: its size, in whole MiB; several times the last-level cache, or the cache is measured. MemoryError when
    there is no room for it.
    """
    cdef Stream stream
    cdef _Team team
    if threads < 1 or n_bytes < BLOCK:
        raise ValueError("threads must be at least 1, and n_bytes a MiB")
    buffer = anonymous(n_bytes // BLOCK * BLOCK)
    advise_huge(buffer)
    team = _Team(threads)
    cdef uint8_t[::1] data = buffer
    stream.data, stream.blocks, stream.write, stream.sum = &data[0], n_bytes // BLOCK, True, 0
    with nogil:
        team.run(_stream, &stream)     # pages that nobody has written are all one page
    return buffer


def read_bandwidth(threads, buffer=None, seconds=0.3):
    """GB (1e9 bytes) a second that `threads` threads together read from memory: the best of several passes, in the two
    ways of stream.h by turns.

    buffer: of ``stream_buffer``, for more than one measurement. seconds: how long passes go on; at least two are made.
    """
    cdef Stream stream
    cdef _Team team = _Team(threads)
    if buffer is None:
        buffer = stream_buffer(threads)
    if threads < 1 or len(buffer) < BLOCK:
        raise ValueError("threads must be at least 1, and the buffer a MiB")
    cdef uint8_t[::1] data = buffer
    stream.data, stream.blocks, stream.write, stream.sum = &data[0], len(buffer) // BLOCK, False, 0
    stream.four = False
    times, start = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        with nogil:
            team.run(_stream, &stream)
        times.append(time.perf_counter() - begin)
        stream.four = not stream.four
    return stream.blocks * BLOCK / min(times) / 1e9


def _aligned(n_bytes):
    """uint8 [n_bytes], uninitialised, on a 64-byte boundary."""
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + n_bytes]


# Matrices -----------------------------------------------------------------------------------------------------------

ctypedef struct Product:
    kv_matmul_fn run
    const uint8_t* panels
    int64_t n_panels, panel_bytes, cols, n
    kv_input x
    float* out              # [n][16 * n_panels]


cdef void _multiply(void* arg, kv_member* me) noexcept nogil:
    """One thread's part of a product, shared as the engine shares it."""
    cdef const Product* p = <const Product*>arg
    cdef int64_t start = 0, end = 0
    while kv_team_take(me, p.n_panels, GRAB, &start, &end):
        p.run(p.panels + start * p.panel_bytes, end - start, p.cols, &p.x, p.n, p.out + KV_PANEL * start,
              KV_PANEL * p.n_panels, 0)


def matmul(str weight_type, rows, cols, tokens=1, threads=1, n_bytes=0, seconds=0.2, planes=None):
    """Times the product of a random matrix [rows, cols] with `tokens` random inputs, prepared before.

    planes: of int8 inputs, 1 or 2; by default two for one token, as in decoding, and one for more, as in a prompt.
    n_bytes: the matrix is repeated until it has so many, so that it comes from memory; with 0 it comes from the CPU's
    caches if it fits them. seconds: how long it is repeated. Returns (seconds of the fastest run, bytes of weights,
    multiply-adds). Raises ValueError for sizes that are none or a type that there is not.
    """
    cdef Product p
    cdef _Team team = _Team(threads)
    cdef int64_t t
    if min(rows, cols, tokens, threads) < 1:
        raise ValueError("rows, cols, tokens and threads must be at least 1")
    if planes is None:
        planes = 2 if tokens == 1 else 1
    if planes not in (1, 2):
        raise ValueError(f"planes must be 1 or 2, not {planes}")
    require_level()
    rng, rows = np.random.default_rng(0), (rows + KV_PANEL - 1) // KV_PANEL * KV_PANEL
    some = pack(weight_type, rng.normal(0, cols ** -0.5, (min(rows, 1024), cols)))
    size = packed_size(weight_type, rows, cols)
    buffer = _aligned(size * max(1, n_bytes // size))
    buffer[:] = np.resize(some, len(buffer))
    p.x.blocks, p.x.planes, p.x.ld = (cols + KV_BLOCK - 1) // KV_BLOCK, planes, cols
    p.panel_bytes, p.cols, p.n = packed_size(weight_type, KV_PANEL, cols), cols, tokens
    p.n_panels, p.run = len(buffer) // p.panel_bytes, kernels().matmul[type_id(weight_type)]
    cdef uint8_t[::1] panels = buffer
    cdef float[:, ::1] x = rng.standard_normal((tokens, cols), np.float32)
    cdef float[::1] out = np.zeros(tokens * KV_PANEL * p.n_panels, np.float32)
    cdef int8_t[::1] q = np.zeros(tokens * planes * p.x.blocks * KV_BLOCK, np.int8)
    cdef float[::1] scale = np.zeros(tokens * planes * p.x.blocks, np.float32)
    cdef int32_t[::1] sums = np.zeros(tokens * planes * p.x.blocks, np.int32)
    cdef int32_t[::1] offsets = np.zeros(2 * tokens * planes * p.x.blocks, np.int32)
    for t in range(p.n):
        kernels().quantize(&x[t, 0], p.cols, p.x.planes, &q[t * p.x.planes * p.x.blocks * KV_BLOCK],
                           &scale[t * p.x.planes * p.x.blocks], &sums[t * p.x.planes * p.x.blocks],
                           &offsets[2 * t * p.x.planes * p.x.blocks])
    p.panels, p.out, p.x.f, p.x.q, p.x.scale, p.x.sum = &panels[0], &out[0], &x[0, 0], &q[0], &scale[0], &sums[0]
    p.x.offset = &offsets[0]
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        with nogil:
            team.run(_multiply, &p)
        times.append(time.perf_counter() - begin)
    return min(times), len(buffer), KV_PANEL * p.n_panels * p.cols * p.n


# Caches -----------------------------------------------------------------------------------------------------

def bytes_read(KVCache kv not None, n_tokens=None):
    """Bytes of the cache that attention of its newest token reads, in all layers, when n_tokens are in it (by
    default: those that are): visible tiles, the tokens of the window, and the sinks."""
    cdef const Cache* c = &kv.c
    cdef int64_t n = kv.c.n_tokens if n_tokens is None else n_tokens, packed, tiles, window, sinks
    cdef const CacheLayer* of
    cdef int64_t layer, first, total = 0
    if n < 0:
        raise ValueError(f"n_tokens cannot be negative: {n}")
    packed = tiles_packed(c, n)
    for layer in range(c.n_layers):
        first, of = first_tile(c, layer, n - 1, packed), &c.layers[layer]
        tiles = max(packed - first, <int64_t>0)
        window = max(<int64_t>0, n - c.n_sinks - KV_TILE * max(packed, first))
        sinks = 0 if of.sight and n - of.sight >= c.n_sinks else min(n, c.n_sinks)
        total += c.n_kv_heads * (tiles * tile_bytes(of) + window * window_bytes(of) // KV_TILE
                                 + 4 * sinks * (c.head_dim + c.head_pad))
    return int(total)


cdef _tiles(const Cache* c, const kv_format* k, const kv_format* v, rng):
    """uint8 [VARIANTS, tile bytes]: tiles of random keys and values."""
    cdef int64_t k_bytes = k.k_bytes(c.head_dim), v_bytes = v.v_bytes(c.head_dim), i
    cdef uint8_t[:, ::1] tiles = np.zeros((VARIANTS, k_bytes + v_bytes), np.uint8)
    cdef uint8_t[::1] tile = _aligned(k_bytes + v_bytes)
    cdef float[:, ::1] keys, values
    for i in range(VARIANTS):
        keys = rng.standard_normal((c.head_dim, KV_TILE), np.float32)
        padded = np.zeros((KV_TILE, c.head_pad), np.float32)
        padded[:, :c.head_dim] = rng.standard_normal((KV_TILE, c.head_dim), np.float32)
        values = padded
        k.pack_k(&keys[0, 0], c.head_dim, &tile[0])
        v.pack_v(&values[0, 0], c.head_dim, &tile[0] + k_bytes)
        memcpy(&tiles[i, 0], &tile[0], k_bytes + v_bytes)
    return np.asarray(tiles)


def fill(KVCache kv not None, n_tokens, seed=0):
    """Makes the cache one that n_tokens random tokens went through, at the speed of memory: keys and values are
    standard normal, and the tiles repeat. What was in it is forgotten. ValueError for an impossible n_tokens,
    RuntimeError when another thread is using the cache."""
    if not 0 <= n_tokens < 1 << 32:
        raise ValueError(f"n_tokens must be at least 0, and less than {1 << 32}: not {n_tokens}")
    cdef const CacheLayer* of
    cdef int64_t layer
    rng, made = np.random.default_rng(seed), {}      # layers of the same formats get the same tiles
    for layer in range(kv.c.n_layers):
        of = &kv.c.layers[layer]
        if (<size_t>of.k, <size_t>of.v) not in made:
            made[<size_t>of.k, <size_t>of.v] = _tiles(&kv.c, of.k, of.v, rng), _tiles(&kv.c, of.wk, of.wv, rng)
    sinks = rng.standard_normal(kv.c.n_sinks * kv.c.head_dim, np.float32)
    with kv.lock:
        kv.hold(n_tokens, 0)
        for layer in range(kv.c.n_layers):
            of = &kv.c.layers[layer]
            ring, window = made[<size_t>of.k, <size_t>of.v]
            _copy(&kv.c, layer, ring, window, sinks, n_tokens)
    while kv.grown():      # what so many calls would have done
        pass


cdef _copy(const Cache* c, int64_t layer, const uint8_t[:, ::1] ring, const uint8_t[:, ::1] window,
           const float[::1] sinks, int64_t n_tokens):
    """Every tile that is left, in every head of a layer, from the variants in turn."""
    cdef int64_t head, tile, i, j, packed = tiles_packed(c, n_tokens), last = tile_of(c, n_tokens - 1)
    with nogil:
        for head in range(c.n_kv_heads):
            for tile in range(tiles_evicted(c, c.layers[layer].n_slots, packed), packed):
                i = (tile + head) % VARIANTS
                memcpy(ring_tile(c, layer, head, tile), &ring[i, 0], ring.shape[1])
            for tile in range(packed, last + 1):
                i = (tile + head) % VARIANTS
                memcpy(window_tile(c, layer, head, tile), &window[i, 0], window.shape[1])
            for j in range(min(n_tokens, c.n_sinks)):
                for i in range(c.head_dim):
                    sink_keys(c, layer, head)[i * c.sink_lanes + j] = sinks[j * c.head_dim + i]
                    sink_values(c, layer, head)[j * c.head_pad + i] = -sinks[j * c.head_dim + i]


# Attention --------------------------------------------------------------------------------------------------

ctypedef struct Step:
    Item item
    Items items
    const float* q          # [n_heads * head_dim], of every layer
    float* out              # [threads][n_heads * head_dim]


cdef void _step(void* arg, kv_member* me) noexcept nogil:
    """One thread's part of the attention of one token, as the engine runs it between its matrices: every thread
    combines the spans for itself, since each needs the whole output."""
    cdef const Step* s = <const Step*>arg
    cdef const Plan* plan = &s.item.plan
    cdef const Cache* c = plan.cache
    cdef int64_t layer, width = plan.n_heads * c.head_dim, i = 0, end = 0
    for layer in range(c.n_layers):
        attend_step(&s.items, layer, s.q, width, me)
        combine(plan, layer, 0, s.out + me.thread * width)
        while kv_team_take(me, me.size, 1, &i, &end):
            pass


def attention(engine, KVCache kv not None, repeat=1, seed=0):
    """Runs the attention of one decode step `repeat` times, for the cache's newest token: all layers, a team of
    threads for each step as in decode, nothing else. Queries are random, and the cache stays as it is.

    Returns (seconds a step, the last layer's output float32 [n_heads, head_dim]). Raises ValueError for a cache
    that is empty or another model's, RuntimeError when another thread is using it.
    """
    d = engine.description
    if repeat < 1 or kv.c.n_tokens < 1:
        raise ValueError("there must be a token in the cache, and a step to run")
    if (d.n_layers, d.n_kv_heads, d.head_dim) != (kv.c.n_layers, kv.c.n_kv_heads, kv.c.head_dim) or (
            sliding_windows(d) != kv.sliding_windows):
        raise ValueError("this cache was made for another model")
    require_level()
    with kv.lock:
        return _attention(d, engine.threads, kv, repeat, np.random.default_rng(seed))


cdef _attention(d, int threads, KVCache kv, int64_t repeat, rng):
    cdef Step step
    cdef Ropes ropes
    cdef _Team team = _Team(threads)
    cdef Plan* p = &step.item.plan
    cdef const Cache* c = &kv.c
    cdef int64_t i, width = d.n_heads * d.head_dim
    cdef double[::1] inv_freq = rng.uniform(0, 2 * np.pi, c.head_dim // 2)
    cdef float[::1] q = rng.standard_normal(width, np.float32), out = np.zeros(threads * width, np.float32), sinks
    cdef uint8_t[::1] block, groups, scratch
    memset(&step, 0, sizeof(Step))
    step.q, step.out = &q[0], &out[0]
    memset(&ropes, 0, sizeof(Ropes))
    ropes.n, ropes.inv_freq = 1, &inv_freq[0]
    plan_chunk(p, kernels(), c, &ropes, c.n_tokens - 1, 1, d.n_heads, d.attention_scale,
               getattr(d, "attention_softcap", None) or 0, True)
    p.packed_before = p.packed_after   # the token is in already
    block = _aligned(plan_buffers(p, NULL))
    plan_buffers(p, &block[0])
    scratch = _aligned(4 * threads * p.scratch_floats)
    step.items.item, step.items.n = &step.item, 1
    step.items.scratch, step.items.scratch_floats = <float*>&scratch[0], p.scratch_floats
    plan_queries(p)
    groups = _aligned(items_buffers(&step.items, c.n_kinds, most_members(p), NULL))
    items_buffers(&step.items, c.n_kinds, most_members(p), &groups[0])
    plan_groups(&step.items)
    if c.n_sinks:                      # which an append would rotate
        sinks = rng.standard_normal(c.n_kv_heads * c.head_dim * c.sink_lanes, np.float32)
        memcpy(p.sinks, &sinks[0], sinks.nbytes)
    start = time.perf_counter()
    with nogil:
        for i in range(repeat):
            team.run(_step, &step)
    seconds = (time.perf_counter() - start) / repeat
    return seconds, np.asarray(out)[:width].reshape(d.n_heads, d.head_dim).copy()
