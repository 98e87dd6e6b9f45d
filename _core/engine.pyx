"""The engine: runs a chunk of tokens through the layers. ``forward`` reads from top to bottom like the paper.

Threads take work by number between barriers, so that every result is the same whatever their count.
"""

import os

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

import numpy as np

from .attention cimport (append_step, attend_step, combine, commit_needed, commit_step, kv_team, kv_team_barrier,
                         kv_team_has_openmp, kv_team_run, kv_team_size, kv_team_take, plan_buffers, plan_chunk,
                         plan_queries)
from .kernels cimport KV_BLOCK, KV_PANEL, KV_Q8_0, kernels, kv_packed_bytes, kv_unpack_row
from .kv cimport KVCache
from .kernels import require_level
from .kv import sliding_windows
from .weights import packed_size, type_id

MAX_CHUNK = 512
"""Most tokens in one call of ``Engine.forward``."""

HAS_OPENMP = bool(kv_team_has_openmp())
"""False when the core was built without OpenMP and runs on one thread."""


def max_threads():
    """The CPUs this process may use; 1 without OpenMP."""
    if not HAS_OPENMP:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Steps --------------------------------------------------------------------------------------------------------------

cdef inline int64_t _grab(int64_t items, kv_team* team) noexcept nogil:
    """Work items taken at a time: large enough to stream memory, small enough that a slow thread stalls nobody."""
    cdef int64_t share = items // (4 * kv_team_size(team))
    return share if share > 1 else 1


cdef inline int64_t _whole_panels(int64_t n) noexcept nogil:
    return (n + KV_PANEL - 1) // KV_PANEL * KV_PANEL


cdef void _matmul_panels(const kv_kernels* kern, const Matrix* m, const kv_input* x, int64_t n, int64_t start,
                         int64_t end, float* out, int64_t ld, bint add) noexcept nogil:
    """Panels [start, end) of a matrix times n inputs, bias included."""
    cdef int64_t first = 0, a, b, t, r
    cdef const Segment* s
    for i in range(m.n_segments):
        s = &m.segments[i]
        a, b = max(start - first, <int64_t>0), min(end - first, s.panels)
        if a < b:
            kern.matmul[s.type](s.data + a * s.panel_bytes, b - a, m.cols, x, n, out + s.offset + KV_PANEL * a, ld, add)
            if s.bias != NULL:
                for t in range(n):
                    for r in range(KV_PANEL * a, min(KV_PANEL * b, s.rows)):
                        out[t * ld + s.offset + r] += s.bias[r]
        first += s.panels


cdef void _matmul(const Call* call, kv_team* team, const Matrix* m, const kv_input* x, int64_t n, float* out,
                  int64_t ld, bint add) noexcept nogil:
    """out [n][ld] = (or += with add) m x, shared among the threads."""
    cdef int64_t start, end = 0, grab = _grab(m.panels, team)
    while True:
        start = kv_team_take(team, m.panels, grab, &end)
        if start < 0:
            break
        _matmul_panels(call.kern, m, x, n, start, end, out, ld, add)
    kv_team_barrier(team)


cdef void _gate_up(const Call* call, kv_team* team, const Layer* layer, const kv_input* x, int64_t n) noexcept nogil:
    """gate [n][width] = silu(gate x) * (up x)"""
    cdef int64_t start, end = 0, t, at, width = layer.gate.width, grab = _grab(layer.gate.panels, team)
    while True:
        start = kv_team_take(team, layer.gate.panels, grab, &end)
        if start < 0:
            break
        _matmul_panels(call.kern, &layer.gate, x, n, start, end, call.run.gate, width, False)
        _matmul_panels(call.kern, &layer.up, x, n, start, end, call.run.up, width, False)
        for t in range(n):
            at = t * width + KV_PANEL * start
            call.kern.silu_mul(call.run.gate + at, call.run.up + at, KV_PANEL * (end - start), call.run.gate + at)
    kv_team_barrier(team)


ctypedef void (*Source)(const Call* call, const float* weight, int64_t layer, int64_t token, float* out) noexcept nogil


cdef void _normed(const Call* call, const float* weight, int64_t layer, int64_t token, float* out) noexcept nogil:
    cdef const Config* c = call.config
    call.kern.rms_norm(call.run.x + token * c.hidden_pad, weight, c.hidden_size, c.norm_eps, out)


cdef void _attended(const Call* call, const float* weight, int64_t layer, int64_t token, float* out) noexcept nogil:
    combine(call.kern, call.cache, &call.plan, layer, token, out)


cdef kv_input _input(const Call* call, kv_team* team, int thread, const Matrix* m, Source source, const float* weight,
                     int64_t layer, int64_t first, int64_t n) noexcept nogil:
    """The input of a matrix for tokens [first, first + n) of the chunk: floats from `source` (without one: the gated
    activations), int8 beside them if the matrix takes them.

    One token: every thread prepares its own copy, which costs less than to wait for another's.
    """
    cdef const RunState* run = &call.run
    cdef int64_t t, row, end = 0, floats_at, planes = 2 if n == 1 else run.planes
    cdef int64_t blocks = planes * ((m.cols + KV_BLOCK - 1) // KV_BLOCK)   # of a token
    cdef kv_input x
    cdef float* floats = run.input if source != NULL else run.gate
    cdef int64_t own = thread if n == 1 else 0
    x.ld = run.input_width if source != NULL else _whole_panels(m.cols)
    floats_at = own * x.ld if source != NULL else 0
    t = 0
    while True:
        if n > 1:
            t = kv_team_take(team, n, 4, &end)
            if t < 0:
                break
        else:
            end = 1
        for row in range(t, end):
            if source != NULL:
                source(call, weight, layer, first + row, floats + floats_at + row * x.ld)
            if m.quantized:
                call.kern.quantize(floats + floats_at + row * x.ld, m.cols, planes,
                                   run.q + (own + row) * blocks * KV_BLOCK, run.q_scale + (own + row) * blocks,
                                   run.q_sum + (own + row) * blocks)
        if n == 1:
            break
    if n > 1:
        kv_team_barrier(team)
    x.f, x.blocks, x.planes = floats + floats_at, blocks // planes, planes
    x.q, x.scale, x.sum = run.q + own * blocks * KV_BLOCK, run.q_scale + own * blocks, run.q_sum + own * blocks
    return x


cdef void _embed(const Call* call, kv_team* team) noexcept nogil:
    cdef int64_t t, end = 0
    cdef const Segment* s = &call.embed.segments[0]
    while True:
        t = kv_team_take(team, call.plan.n, 1, &end)
        if t < 0:
            break
        kv_unpack_row(s.type, s.data, call.config.hidden_size, call.tokens[t],
                      call.run.x + t * call.config.hidden_pad)
    kv_team_barrier(team)


cdef void _attention(const Call* call, kv_team* team, int thread, const Layer* layer, int64_t i) noexcept nogil:
    """From q, k, v in run.qkv to partial outputs in the plan; the cache has the chunk afterwards."""
    cdef const Matrix* m = &layer.qkv
    cdef const Plan* plan = &call.plan
    cdef const float* qkv = call.run.qkv
    append_step(call.kern, call.cache, plan, i, qkv + m.segments[1].offset, qkv + m.segments[2].offset, m.width,
                team, thread)
    kv_team_barrier(team)
    attend_step(call.kern, call.cache, plan, i, qkv, m.width, team, thread)
    kv_team_barrier(team)
    if commit_needed(call.cache, plan):
        commit_step(call.cache, plan, i, team)
        kv_team_barrier(team)


cdef void forward(void* arg, kv_team* team, int thread) noexcept nogil:
    """One thread's part of a chunk: embedding, layers, logits."""
    cdef const Call* call = <const Call*>arg
    cdef const Config* c = call.config
    cdef const RunState* run = &call.run
    cdef const Layer* layer
    cdef int64_t n = call.plan.n, i
    cdef kv_input x
    _embed(call, team)                                                            # x [n][hidden]
    for i in range(c.n_layers):
        layer = &call.layers[i]
        x = _input(call, team, thread, &layer.qkv, _normed, layer.attn_norm, i, 0, n)
        _matmul(call, team, &layer.qkv, &x, n, run.qkv, layer.qkv.width, False)   # [n][q, k, v]
        _attention(call, team, thread, layer, i)
        x = _input(call, team, thread, &layer.o, _attended, NULL, i, 0, n)        # [n][n_heads * head_dim]
        _matmul(call, team, &layer.o, &x, n, run.x, c.hidden_pad, True)
        x = _input(call, team, thread, &layer.gate, _normed, layer.mlp_norm, i, 0, n)
        _gate_up(call, team, layer, &x, n)                                        # [n][intermediate]
        x = _input(call, team, thread, &layer.down, NULL, NULL, i, 0, n)
        _matmul(call, team, &layer.down, &x, n, run.x, c.hidden_pad, True)
    if call.logits != NULL:
        n -= call.first_logit
        x = _input(call, team, thread, call.head, _normed, call.norm, c.n_layers, call.first_logit, n)
        _matmul(call, team, call.head, &x, n, call.logits, call.head.width, False)


# Memory -------------------------------------------------------------------------------------------------------------

cdef class _Arena:
    """Buffers of a call, in 64-byte aligned pieces of one block that is kept for the next call. Sizes are counted in
    a first pass over the same code."""
    cdef void* memory
    cdef char* base
    cdef size_t used, size
    cdef bint counting

    def __dealloc__(self):
        free(self.memory)

    cdef void count(self) noexcept:
        self.used, self.counting = 0, True

    cdef int allocate(self) except -1:
        if self.used > self.size:
            free(self.memory)
            self.size, self.memory = 0, malloc(self.used + 64)
            if self.memory == NULL:
                raise MemoryError(f"no memory for {self.used} bytes of buffers")
            self.size = self.used
            self.base = <char*>((<size_t>self.memory + 63) // 64 * 64)
        self.used, self.counting = 0, False
        return 0

    cdef void* take(self, int64_t bytes) noexcept:
        cdef size_t at = self.used
        self.used += (bytes + 63) // 64 * 64
        return NULL if self.counting else self.base + at


cdef class Engine:
    """A model's weights, ready to run; read-only, so any number of threads and caches may use it at once.

    description: an object with the sizes of the model (n_layers, hidden_size, intermediate_size, n_heads, n_kv_heads,
    head_dim, vocab_size, norm_eps, attention_scale, tie_embeddings, attention_bias, mlp_bias), and sliding_windows if
    some layers have one: for each layer the tokens that a query sees, itself included, or None for all.
    weights: name -> object with type, rows, cols and data (uint8, packed). vectors: name -> float32 array.
    inv_freq: float64 [head_dim / 2], inverse frequencies of RoPE. threads: at least 1. precise: block-quantised
    weights take activations of 16 bits in chunks too, not in decode alone; about half as fast there.
    Raises ValueError when a tensor is missing or has the wrong shape or size, or KVRUN_ISA names no level.
    """
    cdef Config c
    cdef Layer* layers
    cdef Matrix embed, head
    cdef const float* norm
    cdef list kept
    cdef readonly object description
    cdef readonly tuple sliding_windows
    cdef readonly int threads
    cdef readonly bint precise
    cdef double[::1] inv_freq

    def __cinit__(self, description, weights, vectors, inv_freq, threads=1, precise=False):
        cdef int64_t i
        d = self.description = description
        require_level()
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        if d.activation != "silu":
            raise ValueError(f"activation {d.activation!r} is not supported")
        if d.n_heads % d.n_kv_heads or d.head_dim % 2:
            raise ValueError("n_heads must be a multiple of n_kv_heads, and head_dim even")
        self.threads, self.kept = min(threads, 1024) if HAS_OPENMP else 1, []
        self.inv_freq = np.array(inv_freq, np.float64)
        if self.inv_freq.shape[0] != d.head_dim // 2:
            raise ValueError(f"inv_freq has {self.inv_freq.shape[0]} values for a head_dim of {d.head_dim}")
        self.precise = precise
        self.sliding_windows = sliding_windows(d)
        self._sizes()
        self.layers = <Layer*>calloc(d.n_layers, sizeof(Layer))
        if self.layers == NULL:
            raise MemoryError
        self._matrix(&self.embed, weights, vectors, ["embed"], d.hidden_size, [d.vocab_size], False)
        for i in range(d.n_layers):
            self._layer(&self.layers[i], f"layers.{i}.", weights, vectors)
        self.norm = self._vector(vectors, "norm.weight", d.hidden_size)
        head = "embed" if d.tie_embeddings else "head"
        self._matrix(&self.head, weights, vectors, [head], d.hidden_size, [d.vocab_size], False)

    def __dealloc__(self):
        free(self.layers)

    cdef int _sizes(self) except -1:
        d, c = self.description, &self.c
        c.n_layers, c.hidden_size, c.intermediate_size = d.n_layers, d.hidden_size, d.intermediate_size
        c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size = d.n_heads, d.n_kv_heads, d.head_dim, d.vocab_size
        c.hidden_pad = _whole_panels(c.hidden_size)
        c.norm_eps, c.attention_scale = d.norm_eps, d.attention_scale
        return 0

    cdef int _layer(self, Layer* layer, str name, weights, vectors) except -1:
        d = self.description
        q, kv = d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim
        hidden, inner = d.hidden_size, d.intermediate_size
        layer.attn_norm = self._vector(vectors, name + "attn.norm.weight", hidden)
        layer.mlp_norm = self._vector(vectors, name + "mlp.norm.weight", hidden)
        self._matrix(&layer.qkv, weights, vectors, [name + "attn.q", name + "attn.k", name + "attn.v"], hidden,
                     [q, kv, kv], d.attention_bias)
        self._matrix(&layer.o, weights, vectors, [name + "attn.o"], q, [hidden], d.attention_bias)
        self._matrix(&layer.gate, weights, vectors, [name + "mlp.gate"], hidden, [inner], d.mlp_bias)
        self._matrix(&layer.up, weights, vectors, [name + "mlp.up"], hidden, [inner], d.mlp_bias)
        self._matrix(&layer.down, weights, vectors, [name + "mlp.down"], inner, [hidden], d.mlp_bias)
        return 0

    cdef int _matrix(self, Matrix* m, weights, vectors, names, cols, rows, bias) except -1:
        cdef Segment* s
        cdef const uint8_t[::1] data
        m.cols, m.n_segments, m.panels, m.quantized = cols, len(names), 0, False
        for i, (name, n) in enumerate(zip(names, rows)):
            w = weights.get(name + ".weight")
            if w is None:
                raise ValueError(f"{name}.weight is missing")
            if (w.rows, w.cols) != (n, cols):
                raise ValueError(f"{name}.weight is [{w.rows}, {w.cols}], not [{n}, {cols}]")
            data = w.data
            if data.shape[0] != packed_size(w.type, n, cols):
                raise ValueError(f"{name}.weight has {data.shape[0]} bytes, not {packed_size(w.type, n, cols)}")
            self.kept.append(w.data)
            s = &m.segments[i]
            s.data, s.type, s.rows, s.offset = &data[0], type_id(w.type), n, KV_PANEL * m.panels
            s.panels, s.panel_bytes = (n + KV_PANEL - 1) // KV_PANEL, kv_packed_bytes(s.type, KV_PANEL, cols)
            s.bias = self._vector(vectors, name + ".bias", n) if bias else NULL
            m.panels += s.panels
            m.quantized |= s.type >= KV_Q8_0
        m.width = KV_PANEL * m.panels
        return 0

    cdef const float* _vector(self, vectors, str name, n) except NULL:
        cdef const float[::1] v
        if name not in vectors:
            raise ValueError(f"{name} is missing")
        v = vectors[name]
        if v.shape[0] != n:
            raise ValueError(f"{name} has {v.shape[0]} values, not {n}")
        self.kept.append(vectors[name])
        return &v[0]

    def forward(self, tokens, KVCache kv not None, logits="last"):
        """Runs a chunk of 1 to ``MAX_CHUNK`` tokens that follow those already in the cache.

        tokens: int32 [n]. logits: "last", "all" or "none". Returns float32 [vocab_size], [n, vocab_size] or None.
        Every token sees the cache as it would if the chunk were fed one by one. The GIL is released.
        Raises ValueError for tokens outside the vocabulary or a chunk of the wrong size, RuntimeError when another
        thread is using the cache.
        """
        cdef const int32_t[::1] ids = np.ascontiguousarray(tokens, np.int32)
        cdef int64_t n = ids.shape[0], i
        if not 1 <= n <= MAX_CHUNK:
            raise ValueError(f"a chunk has 1 to {MAX_CHUNK} tokens, not {n}")
        if (kv.c.n_layers != self.c.n_layers or kv.c.n_kv_heads != self.c.n_kv_heads or kv.c.head_dim != self.c.head_dim
                or kv.sliding_windows != self.sliding_windows):
            raise ValueError("this cache was made for another model")
        for i in range(n):
            if not 0 <= ids[i] < self.c.vocab_size:
                raise ValueError(f"token {ids[i]} is outside the vocabulary of {self.c.vocab_size}")
        if logits not in ("last", "all", "none"):
            raise ValueError(f'logits must be "last", "all" or "none", not {logits!r}')
        if not kv.lock.acquire(blocking=False):
            raise RuntimeError("this cache is in use by another thread")
        try:
            result = self._forward(ids, kv, 0 if logits == "all" else n - 1 if logits == "last" else n)
            return result[0] if logits == "last" else result
        finally:
            kv.lock.release()

    cdef _forward(self, const int32_t[::1] ids, KVCache kv, int64_t first_logit):
        cdef Call call
        cdef int64_t n = ids.shape[0]
        cdef float[:, ::1] out
        cdef int threads = self.threads
        cdef _Arena arena
        if kv.buffers is None:
            kv.buffers = _Arena()
        arena = kv.buffers
        memset(&call, 0, sizeof(Call))
        call.kern, call.config, call.layers, call.cache = kernels(), &self.c, self.layers, &kv.c
        call.embed, call.head, call.norm, call.tokens = &self.embed, &self.head, self.norm, &ids[0]
        call.first_logit = first_logit
        plan_chunk(&call.plan, &kv.c, kv.c.n_tokens, n, self.c.n_heads, self.c.attention_scale, threads)
        arena.count()
        self._buffers(arena, &call)
        arena.allocate()
        self._buffers(arena, &call)
        plan_queries(&call.plan, &kv.c, &self.inv_freq[0])
        result = None
        if first_logit < n:
            result = np.empty((n - first_logit, self.head.width), np.float32)
            out = result
            call.logits = &out[0, 0]
        with nogil:
            kv_team_run(threads, forward, &call)
        kv.c.n_tokens += n
        return None if result is None else result[:, :self.c.vocab_size]

    cdef void _buffers(self, _Arena arena, Call* call) noexcept:
        cdef Plan* p = &call.plan
        cdef RunState* run = &call.run
        cdef const Cache* c = call.cache
        cdef int64_t n = p.n, rows = max(n, <int64_t>self.threads)
        cdef int64_t widest = max(self.c.hidden_size, self.c.n_heads * self.c.head_dim, self.c.intermediate_size)
        cdef int64_t blocks = (widest + KV_BLOCK - 1) // KV_BLOCK
        run.input_width, run.planes = _whole_panels(widest), 2 if self.precise else 1
        run.x = <float*>arena.take(4 * n * self.c.hidden_pad)
        run.input = <float*>arena.take(4 * rows * run.input_width)
        run.q = <int8_t*>arena.take(2 * rows * blocks * KV_BLOCK)
        run.q_scale = <float*>arena.take(8 * rows * blocks)
        run.q_sum = <int32_t*>arena.take(8 * rows * blocks)
        run.qkv = <float*>arena.take(4 * n * self.layers[0].qkv.width)
        run.gate = <float*>arena.take(4 * n * self.layers[0].gate.width)
        run.up = <float*>arena.take(4 * n * self.layers[0].gate.width)
        plan_buffers(p, c, <uint8_t*>arena.take(plan_buffers(p, c, NULL)))
