"""Single kernels, and attention without a model, called from Python at a chosen level: for tests and
micro-benchmarks.

Every function takes ``level``, a name from ``isa_available()``, or None for the level in use.
"""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t
from libc.string cimport memset

import numpy as np

from .attention cimport append_step, attend_step, combine, commit_needed, commit_step
from .plan cimport Item, Items, Plan, Ropes, items_buffers, most_members, plan_buffers, plan_chunk, plan_groups, plan_queries
from .kernels cimport (KV_BLOCK, KV_FORMATS, KV_GELU, KV_GELU_TANH, KV_PANEL, KV_SILU, KV_TILE, kernels, kernels_of,
                       kv_format, kv_head_pad, kv_input, kv_kernels, kv_weight_of)
from .cache cimport Cache, CacheLayer, KVCache
from .team cimport kv_member, kv_team, kv_team_free, kv_team_new, kv_team_run, kv_team_take
from .weights import packed_size, type_id


cdef const kv_kernels* _level(level) except NULL:
    return kernels() if level is None else kernels_of(level)


def _floats(a, *shape):
    a = np.ascontiguousarray(a, np.float32)
    if shape and a.shape != shape:
        raise ValueError(f"expected float32 {list(shape)}, not {list(a.shape)}")
    return a


def rms_norm(x, weight, eps, level=None):
    """x [n] / sqrt(mean(x^2) + eps) * weight [n]."""
    cdef const float[::1] a = _floats(x), w = _floats(weight, len(x))
    cdef float[::1] out = np.empty(len(x), np.float32)
    _level(level).rms_norm(&a[0], &w[0], a.shape[0], eps, &out[0])
    return np.asarray(out)


def layer_norm(x, weight, bias, eps, level=None):
    """(x [n] - mean) / sqrt(variance + eps) * weight [n] + bias [n]."""
    cdef const float[::1] a = _floats(x), w = _floats(weight, len(x)), b = _floats(bias, len(x))
    cdef float[::1] out = np.empty(len(x), np.float32)
    _level(level).layer_norm(&a[0], &w[0], &b[0], a.shape[0], eps, &out[0])
    return np.asarray(out)


def activate(name, x, up=None, level=None):
    """silu, gelu or gelu_tanh of x [n]; times up [n] if it is given."""
    cdef const float[::1] a = _floats(x), u = _floats(x if up is None else up, len(x))
    cdef float[::1] out = np.empty(len(x), np.float32)
    cdef int kind = {"silu": KV_SILU, "gelu": KV_GELU, "gelu_tanh": KV_GELU_TANH}[name]
    cdef const kv_kernels* kern = _level(level)
    cdef const float* other = NULL
    if up is not None:
        other = &u[0]
    kern.activate[kind](&a[0], other, a.shape[0], &out[0])
    return np.asarray(out)


def soft_cap(x, cap, level=None):
    """cap * tanh(x [n] / cap)."""
    cdef float[::1] out = _floats(x).copy()
    _level(level).soft_cap(&out[0], out.shape[0], cap)
    return np.asarray(out)


def rope(x, cos, sin, scale=1.0, level=None):
    """Rotates one head x [head_dim] by angles of cos, sin [head_dim / 2], times scale."""
    cdef const float[::1] a = _floats(x), c = _floats(cos, len(x) // 2), s = _floats(sin, len(x) // 2)
    cdef float[::1] out = np.empty(len(x), np.float32)
    _level(level).rope(&a[0], &c[0], &s[0], a.shape[0], scale, &out[0])
    return np.asarray(out)


def hadamard(x, level=None):
    """Orthonormal Hadamard transform of x [n]."""
    cdef float[::1] out = np.array(x, np.float32)
    _level(level).hadamard(&out[0], out.shape[0])
    return np.asarray(out)


def quantize(x, planes=1, level=None):
    """x [n] in blocks of 32: (int8 codes [planes, blocks * 32], float32 scales [planes, blocks], int32 sums of codes
    [planes, blocks])."""
    cdef const float[::1] a = _floats(x)
    cdef int64_t blocks = (len(x) + KV_BLOCK - 1) // KV_BLOCK
    cdef int8_t[:, :, ::1] q = np.empty((blocks, planes, KV_BLOCK), np.int8)
    cdef float[:, ::1] scale = np.empty((planes, blocks), np.float32)
    cdef int32_t[:, ::1] sums = np.empty((planes, blocks), np.int32)
    _level(level).quantize(&a[0], a.shape[0], planes, &q[0, 0, 0], &scale[0, 0], &sums[0, 0], NULL)
    return np.asarray(q).swapaxes(0, 1).reshape(planes, -1), np.asarray(scale), np.asarray(sums)


def matmul(str type, packed, rows, x, out=None, planes=1, repeat=1, level=None):
    """x [n, cols] times a packed matrix [rows, cols], transposed: float32 [n, rows]; added to `out` when given.

    Block types take x quantised to int8 in blocks of 32, in one plane or two, as the engine does. With `repeat`
    the product is computed so many times (for timing).
    """
    cdef const kv_kernels* kern = _level(level)
    cdef const float[:, ::1] a = _floats(x)
    cdef const uint8_t[::1] w = packed
    cdef int64_t n = a.shape[0], cols = a.shape[1], t, blocks = (cols + KV_BLOCK - 1) // KV_BLOCK
    cdef int64_t panels = (rows + KV_PANEL - 1) // KV_PANEL, times = repeat, i
    cdef int id = type_id(type), add = out is not None
    if n < 1 or planes not in (1, 2) or w.shape[0] != packed_size(type, rows, cols):
        raise ValueError("packed does not have the size of this matrix, x is empty, or planes is not 1 or 2")
    result = np.zeros((n, panels * KV_PANEL), np.float32)
    if add:
        result[:, :rows] = out
    cdef float[:, ::1] to = result
    cdef int8_t[:, ::1] q = np.zeros((n, planes * blocks * KV_BLOCK), np.int8)
    cdef float[:, ::1] scale = np.zeros((n, planes * blocks), np.float32)
    cdef int32_t[:, ::1] sums = np.zeros((n, planes * blocks), np.int32)
    cdef int32_t[:, ::1] offsets = np.zeros((n, planes * blocks * 2), np.int32)
    cdef bint offset = kv_weight_of(id).wants_offset
    if kv_weight_of(id).takes_int8:
        for t in range(n):
            kern.quantize(&a[t, 0], cols, planes, &q[t, 0], &scale[t, 0], &sums[t, 0],
                          &offsets[t, 0] if offset else NULL)
    cdef kv_input input
    input.f, input.ld, input.blocks, input.planes = &a[0, 0], cols, blocks, planes
    input.q, input.scale, input.sum = &q[0, 0], &scale[0, 0], &sums[0, 0]
    input.offset = &offsets[0, 0] if offset else NULL
    with nogil:
        for i in range(times):
            kern.matmul[id](&w[0], panels, cols, &input, n, &to[0, 0], panels * KV_PANEL, add)
    return result[:, :rows]


def softmax_step(scores, visible, m, l, acc, level=None):
    """One step of the online softmax, on copies: returns (weights, m, l, acc).

    scores [rows, 64], visible int [rows], m and l [rows], acc [rows, head_pad].
    """
    cdef float[:, ::1] s = np.array(scores, np.float32), a = np.array(acc, np.float32)
    cdef int32_t[::1] seen = np.array(visible, np.int32)
    cdef float[::1] top = np.array(m, np.float32), total = np.array(l, np.float32)
    if s.shape[1] != KV_TILE or a.shape[1] % 16:
        raise ValueError("scores must be [rows, 64] and acc [rows, a multiple of 16]")
    _level(level).softmax_step(&s[0, 0], &seen[0], s.shape[0], a.shape[1], &top[0], &total[0], &a[0, 0])
    return np.asarray(s), np.asarray(top), np.asarray(total), np.asarray(a)


cdef class Tile:
    """One tile of keys and values in a cache format.

    format: a name from KV_FORMATS. k: float32 [head_dim, 64]. v: float32 [64, head_dim].
    """
    cdef const kv_format* format
    cdef int64_t head_dim, head_pad
    cdef uint8_t[::1] k, v

    def __init__(self, str format, k, v, level=None):
        cdef const kv_kernels* kern = _level(level)
        names = [kern.format[i].name.decode() for i in range(KV_FORMATS)]
        cdef float[:, ::1] keys = np.array(k, np.float32), values
        self.format = &kern.format[names.index(format)]
        self.head_dim = keys.shape[0]
        self.head_pad = kv_head_pad(self.head_dim)
        padded = np.zeros((KV_TILE, self.head_pad), np.float32)
        padded[:, :self.head_dim] = v
        values = padded
        self.k = np.zeros(self.format.k_bytes(self.head_dim), np.uint8)
        self.v = np.zeros(self.format.v_bytes(self.head_dim), np.uint8)
        self.format.pack_k(&keys[0, 0], self.head_dim, &self.k[0])
        self.format.pack_v(&values[0, 0], self.head_dim, &self.v[0])

    def put(self, lane, k, v):
        """Writes one token: k, v [head_dim]."""
        cdef const float[::1] key = _floats(k, self.head_dim), value = _floats(v, self.head_dim)
        if not 0 <= lane < KV_TILE:
            raise ValueError("a tile has lanes 0 to 63")
        self.format.put_k(&self.k[0], self.head_dim, lane, &key[0])
        self.format.put_v(&self.v[0], self.head_dim, lane, &value[0])

    def unpack(self):
        """(keys [head_dim, 64], values [64, head_dim]) as float32."""
        cdef float[:, ::1] keys = np.empty((self.head_dim, KV_TILE), np.float32)
        cdef float[:, ::1] values = np.empty((KV_TILE, self.head_pad), np.float32)
        self.format.unpack_k(&self.k[0], self.head_dim, &keys[0, 0])
        self.format.unpack_v(&self.v[0], self.head_dim, &values[0, 0])
        return np.asarray(keys), np.asarray(values)[:, :self.head_dim]

    def k_dot(self, q):
        """Scores [rows, 64] of queries [rows, head_dim]."""
        cdef const float[:, ::1] queries = _floats(q, len(q), self.head_dim)
        cdef float[:, ::1] scores = np.empty((len(q), KV_TILE), np.float32)
        self.format.k_dot(&self.k[0], KV_TILE, self.head_dim, &queries[0, 0], self.head_dim, len(q), KV_TILE,
                          &scores[0, 0])
        return np.asarray(scores)

    def v_accumulate(self, p, acc):
        """acc [rows, head_dim] + p [rows, 64] times the values."""
        cdef const float[:, ::1] weights = _floats(p, len(p), KV_TILE)
        padded = np.zeros((len(p), self.head_pad), np.float32)
        padded[:, :self.head_dim] = acc
        cdef float[:, ::1] to = padded
        self.format.v_accumulate(&self.v[0], self.head_dim, &weights[0, 0], len(p), KV_TILE, &to[0, 0])
        return padded[:, :self.head_dim]


# Attention ----------------------------------------------------------------------------------------------------------

ctypedef struct Chunk:
    Item item
    Items items
    const float* q          # [n][n_heads * head_dim], or NULL: only to be appended
    const float* k          # [n][n_kv_heads * head_dim]
    const float* v
    float* out              # [n][n_heads * head_dim]


cdef void _chunk(void* arg, kv_member* me) noexcept nogil:
    """One thread's part of a layer's attention, with the steps of the engine."""
    cdef const Chunk* s = <const Chunk*>arg
    cdef const Plan* p = &s.item.plan
    cdef int64_t width = p.n_heads * p.cache.head_dim, kv_width = p.cache.n_kv_heads * p.cache.head_dim, t = 0, end = 0
    append_step(&s.items, 0, s.k, s.v, kv_width, me)
    if s.q != NULL:
        attend_step(&s.items, 0, s.q, width, me)
    if commit_needed(&s.items):
        commit_step(&s.items, 0, me)
    while s.q != NULL and kv_team_take(me, p.n, 1, &t, &end):
        combine(p, 0, t, s.out + t * width)


cdef CacheLayer _at_level(const CacheLayer* layer, const kv_kernels* kern) noexcept nogil:
    """The same layer, its formats those of another level: the bytes of a tile are the same at each."""
    cdef CacheLayer other = layer[0]
    cdef const kv_format* used = &kernels().format[0]
    other.k = &kern.format[layer.k - used]
    other.v = &kern.format[layer.v - used]
    other.wk = &kern.format[layer.wk - used]
    other.wv = &kern.format[layer.wv - used]
    return other


def attention(KVCache kv not None, q, k, v, inv_freq, threads=1, level=None):
    """Appends a chunk to a cache of one layer and attends to it, as the engine does between its matrices.

    q: float32 [n, n_heads * head_dim], or None to append only; n_heads is any multiple of n_kv_heads. k, v: [n,
    n_kv_heads * head_dim]. All before RoPE; inv_freq: float64 [head_dim / 2]. Returns float32 [n, n_heads * head_dim],
    or None without queries. Raises ValueError for arrays of another shape or a cache of several layers, RuntimeError
    when another thread is using the cache.
    """
    d = kv.description
    if d.n_layers != 1 or len(k) < 1 or threads < 1:
        raise ValueError("the cache must have one layer, the chunk a token, and the team a thread")
    width = d.n_kv_heads * d.head_dim
    k, v = _floats(k, len(k), width), _floats(v, len(k), width)
    if q is not None:
        q = _floats(q)
        if q.ndim != 2 or len(q) != len(k) or not q.shape[1] or q.shape[1] % width:
            raise ValueError("q must have a row for each token, with as many queries for each KV head")
    angles = np.array(inv_freq, np.float64)
    if angles.shape != (d.head_dim // 2,):
        raise ValueError(f"expected {d.head_dim // 2} inverse frequencies")
    with kv.lock:
        return _attention(kv, q, k, v, angles, threads, _level(level))


cdef _attention(KVCache kv, q, const float[:, ::1] k, const float[:, ::1] v, const double[::1] inv_freq, int threads,
                const kv_kernels* kern):
    cdef Chunk chunk
    cdef Ropes ropes
    cdef Cache cache
    cdef CacheLayer layer = _at_level(&kv.c.layers[0], kern)
    cdef int64_t n = k.shape[0], n_heads = (k if q is None else q).shape[1] // kv.c.head_dim
    cdef uint8_t[::1] block, groups
    cdef const float[:, ::1] queries
    cdef float[:, ::1] out
    cdef float[::1] own
    cdef kv_team* team
    kv.reserve(k.shape[0])
    cache = kv.c
    cache.layers = &layer
    memset(&chunk, 0, sizeof(Chunk))
    chunk.k, chunk.v = &k[0, 0], &v[0, 0]
    memset(&ropes, 0, sizeof(Ropes))
    ropes.n, ropes.inv_freq = 1, &inv_freq[0]
    plan_chunk(&chunk.item.plan, kern, &cache, &ropes, cache.n_tokens, n, n_heads, kv.description.attention_scale,
               getattr(kv.description, "attention_softcap", None) or 0, True)
    raw = np.empty(plan_buffers(&chunk.item.plan, NULL) + 64, np.uint8)
    block = raw[-raw.ctypes.data % 64:]
    plan_buffers(&chunk.item.plan, &block[0])
    plan_queries(&chunk.item.plan)
    scratch = np.empty(threads * chunk.item.plan.scratch_floats, np.float32)
    own = scratch
    chunk.items.item, chunk.items.n = &chunk.item, 1
    n_members = most_members(&chunk.item.plan)
    spare = np.empty(items_buffers(&chunk.items, 1, n_members, NULL) + 64, np.uint8)
    groups = spare[-spare.ctypes.data % 64:]
    items_buffers(&chunk.items, 1, n_members, &groups[0])
    plan_groups(&chunk.items)
    chunk.items.scratch, chunk.items.scratch_floats = &own[0], chunk.item.plan.scratch_floats
    result = None
    if q is not None:
        queries, result = q, np.empty_like(q)
        out = result
        chunk.q, chunk.out = &queries[0, 0], &out[0, 0]
    team = kv_team_new()
    if team == NULL:
        raise MemoryError("no memory for a team of threads")
    with nogil:
        kv_team_run(team, threads, _chunk, &chunk)
        kv_team_free(team)
    kv.append(n)
    return result
