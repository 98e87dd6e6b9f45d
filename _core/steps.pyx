"""The steps of a call: each is run by every thread of a team, which share its work and meet at its end."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy

from .attention cimport append_step, attend_step, combine, commit_needed, commit_step
from .call cimport Call, RunState, Worker, input_rows, quantize_row
from .kernels cimport KV_PANEL, kv_input, kv_kernels, kv_prefetch, kv_unpack_row
from .model cimport Config, Layer, Matrix, Norm, Segment, first_of_mlp, whole_panels
from .team cimport kv_team_barrier, kv_team_grab, kv_team_share, kv_team_take

cdef enum:
    FIRST_BYTES = 16384   # of a thread's share of the next matrix, asked for while others finish with this one


cdef void embed(const Worker* w) noexcept nogil:
    """x [n][hidden] = rows of the embedding, with learned positions where the model has some."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t t, i, end = 0
    cdef const Segment* s = &call.embed.segments[0]
    cdef const Segment* p = &call.positions.segments[0]
    cdef float* x
    cdef float* learned
    while True:
        t = kv_team_take(w.team, w.thread, call.plan.n, 1, &end)
        if t < 0:
            break
        x, learned = call.run.x + t * c.hidden_pad, call.run.input + t * call.run.input_width
        kv_unpack_row(s.type, s.data, c.hidden_size, call.tokens[t], x)
        if c.embedding_scale != 1:
            for i in range(c.hidden_size):
                x[i] *= c.embedding_scale
        if call.positions.n_segments:
            kv_unpack_row(p.type, p.data, c.hidden_size, call.plan.first + t, learned)
            for i in range(c.hidden_size):
                x[i] += learned[i]
    kv_team_barrier(w.team)


cdef inline void _norm(const Call* call, const Norm* norm, const float* x, float* out) noexcept nogil:
    """A norm of [hidden]; in and out may be the same."""
    cdef const Config* c = call.config
    if norm.weight == NULL:
        memcpy(out, x, c.hidden_size * sizeof(float))
    elif c.layer_norm:
        call.kern.layer_norm(x, norm.weight, norm.bias, c.hidden_size, c.norm_eps, out)
    else:
        call.kern.rms_norm(x, norm.weight, c.hidden_size, c.norm_eps, out)


# Inputs of matrices -------------------------------------------------------------------------------------------------
#
# A chunk's are prepared once for all threads. Of a single token each thread prepares a copy of its own, which costs
# less than to wait for another's; so `_own` is where a thread's rows begin.

cdef inline int64_t _own(const Worker* w, int64_t n) noexcept nogil:
    return w.thread if n == 1 else 0


cdef inline bint _next_rows(const Worker* w, int64_t n, int64_t* start, int64_t* end) noexcept nogil:
    """Finds rows [start, end) for this thread to prepare; False when every row is ready. Both start at 0."""
    if n == 1:
        start[0], end[0] = end[0], 1
        return start[0] == 0
    start[0] = kv_team_take(w.team, w.thread, n, 4, end)
    if start[0] < 0:
        kv_team_barrier(w.team)
    return start[0] >= 0


cdef kv_input _normed(const Worker* w, const Matrix* m, const Norm* norm, int64_t first, int64_t n,
                      int64_t planes) noexcept nogil:
    """Of tokens [first, first + n) of the residual stream."""
    cdef const RunState* run = &w.call.run
    cdef int64_t row = 0, end = 0, ld = run.input_width, hidden_pad = w.call.config.hidden_pad
    cdef kv_input x = input_rows(run.input, ld, &run.codes, m.cols, planes, _own(w, n))
    while _next_rows(w, n, &row, &end):
        for row in range(row, end):
            _norm(w.call, norm, run.x + (first + row) * hidden_pad, <float*>x.f + row * ld)
            if m.quantized:
                quantize_row(w.call, &x, m.cols, row)
    return x


cdef kv_input prepare_normed(const Worker* w, const Matrix* m, const Norm* norm) noexcept nogil:
    """The input of a matrix: the residual stream, normed."""
    return _normed(w, m, norm, 0, w.call.plan.n, w.call.planes)


cdef kv_input prepare_head(const Worker* w) noexcept nogil:
    """The input of the head: the residual stream of those tokens whose logits are wanted, normed."""
    cdef const Call* call = w.call
    return _normed(w, call.head, call.norm, call.first_logit, call.plan.n - call.first_logit, call.head_planes)


cdef kv_input prepare_attended(const Worker* w, const Matrix* m, int64_t layer) noexcept nogil:
    """The input of a matrix: what the heads have gathered from the cache."""
    cdef const RunState* run = &w.call.run
    cdef int64_t row = 0, end = 0, n = w.call.plan.n, ld = run.input_width
    cdef kv_input x = input_rows(run.input, ld, &run.codes, m.cols, w.call.planes, _own(w, n))
    while _next_rows(w, n, &row, &end):
        for row in range(row, end):
            combine(&w.call.plan, layer, row, <float*>x.f + row * ld)
            if m.quantized:
                quantize_row(w.call, &x, m.cols, row)
    return x


cdef kv_input prepare_gated(const Worker* w, const Matrix* m) noexcept nogil:
    """The input of a matrix: the activations in run.gate, which all threads share as they are."""
    cdef const RunState* run = &w.call.run
    cdef int64_t row = 0, end = 0, n = w.call.plan.n
    cdef kv_input x = input_rows(run.gate, whole_panels(m.cols), &run.codes, m.cols, w.call.planes, _own(w, n))
    x.f = run.gate
    while m.quantized and _next_rows(w, n, &row, &end):
        for row in range(row, end):
            quantize_row(w.call, &x, m.cols, row)
    return x


# Matrices -----------------------------------------------------------------------------------------------------------

cdef void matmul_panels(const kv_kernels* kern, const Matrix* m, const kv_input* x, int64_t n, int64_t start,
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


cdef inline void _prefetch(const Worker* w, const Matrix* m) noexcept nogil:
    """Asks for what this thread reads first of a matrix, for a single token; kernels ask for what follows."""
    cdef int64_t panel = kv_team_share(w.team, w.thread, m.panels), i
    if w.call.plan.n > 1:
        return
    for i in range(m.n_segments):
        if panel < m.segments[i].panels:
            kv_prefetch(m.segments[i].data + panel * m.segments[i].panel_bytes,
                        min(FIRST_BYTES, (m.segments[i].panels - panel) * m.segments[i].panel_bytes))
            break
        panel -= m.segments[i].panels


cdef void matmul(const Worker* w, const Matrix* m, const kv_input* x, float* out, int64_t ld, bint add,
                 const Matrix* next) noexcept nogil:
    """out [n][ld] = (or += with add) m x. next: the matrix that is read after this, or NULL."""
    cdef int64_t start, end = 0, grab = kv_team_grab(w.team, m.panels)
    while True:
        start = kv_team_take(w.team, w.thread, m.panels, grab, &end)
        if start < 0:
            break
        matmul_panels(w.call.kern, m, x, w.call.plan.n, start, end, out, ld, add)
    if next != NULL:
        _prefetch(w, next)
    kv_team_barrier(w.team)


cdef void activate_mlp(const Worker* w, const Layer* layer, const kv_input* x) noexcept nogil:
    """gate [n][width] = activation(gate x) * (up x), or activation(up x) where there is no gate."""
    cdef const Call* call = w.call
    cdef int64_t start, end = 0, t, at, n = call.plan.n, width = layer.up.width
    cdef int64_t grab = kv_team_grab(w.team, layer.up.panels)
    cdef const Matrix* first = first_of_mlp(layer)
    cdef const float* up
    while True:
        start = kv_team_take(w.team, w.thread, layer.up.panels, grab, &end)
        if start < 0:
            break
        matmul_panels(call.kern, first, x, n, start, end, call.run.gate, width, False)
        if layer.gate.n_segments:
            matmul_panels(call.kern, &layer.up, x, n, start, end, call.run.up, width, False)
        for t in range(n):
            at = t * width + KV_PANEL * start
            up = call.run.up + at if layer.gate.n_segments else NULL
            call.kern.activate[call.config.activation](call.run.gate + at, up, KV_PANEL * (end - start),
                                                       call.run.gate + at)
    _prefetch(w, &layer.down)
    kv_team_barrier(w.team)


cdef void add(const Worker* w, const Matrix* m, const kv_input* x, const Norm* norm, const Matrix* next) noexcept nogil:
    """x [n][hidden] += m x, at once or by way of a norm and a scale."""
    cdef const Config* c = w.call.config
    matmul(w, m, x, w.call.run.branch if c.branch else w.call.run.x, c.hidden_pad, not c.branch, next)
    add_branch(w, norm)


cdef void add_branch(const Worker* w, const Norm* norm) noexcept nogil:
    """x [n][hidden] += what was put aside, normed and scaled; nothing where it is added at once."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t t, i, end = 0
    cdef float scale = c.residual_scale
    cdef float* branch
    cdef float* stream
    while c.branch:
        t = kv_team_take(w.team, w.thread, call.plan.n, 1, &end)
        if t < 0:
            kv_team_barrier(w.team)
            break
        branch, stream = call.run.branch + t * c.hidden_pad, call.run.x + t * c.hidden_pad
        if norm.weight != NULL:
            _norm(call, norm, branch, branch)
        for i in range(c.hidden_size):
            stream[i] += scale * branch[i]


cdef void logits(const Worker* w, const kv_input* x) noexcept nogil:
    """logits [tokens that want some][width] = head x, scaled and capped where the model wants it."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t start, end = 0, t, i, size, n = call.plan.n - call.first_logit
    cdef int64_t grab = kv_team_grab(w.team, call.head.panels)
    cdef float* out
    while True:
        start = kv_team_take(w.team, w.thread, call.head.panels, grab, &end)
        if start < 0:
            break
        matmul_panels(call.kern, call.head, x, n, start, end, call.logits, call.head.width, False)
        size = KV_PANEL * (end - start)
        for t in range(n):
            out = call.logits + t * call.head.width + KV_PANEL * start
            if c.logit_scale != 1:
                for i in range(size):
                    out[i] *= c.logit_scale
            if c.logit_softcap > 0:
                call.kern.soft_cap(out, size, c.logit_softcap)
    kv_team_barrier(w.team)


# Attention ----------------------------------------------------------------------------------------------------------

cdef void norm_heads(const Worker* w, const Layer* layer) noexcept nogil:
    """Norms of queries and keys in run.qkv, head by head or all heads of a token at once."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t queries = 1 if c.norm_all_heads else c.n_heads, keys = 1 if c.norm_all_heads else c.n_kv_heads
    cdef int64_t items = call.plan.n * (queries + keys), i = 0, end = 0, j, size
    cdef float* at
    while True:
        i = kv_team_take(w.team, w.thread, items, kv_team_grab(w.team, items), &end)
        if i < 0:
            break
        for i in range(i, end):
            j = i % (queries + keys)
            at = call.run.qkv + i // (queries + keys) * layer.qkv.width
            if j < queries:
                size = c.n_heads // queries * c.head_dim
                at += j * size
            else:
                size = c.n_kv_heads // keys * c.head_dim
                at += layer.qkv.segments[1].offset + (j - queries) * size
            call.kern.rms_norm(at, layer.q_norm if j < queries else layer.k_norm, size, c.norm_eps, at)
    kv_team_barrier(w.team)


cdef void attend(const Worker* w, const Layer* layer, int64_t i) noexcept nogil:
    """From q, k, v in run.qkv to partial outputs in the plan; the cache has the chunk afterwards."""
    cdef const Call* call = w.call
    cdef const Matrix* m = &layer.qkv
    cdef const float* qkv = call.run.qkv
    append_step(&call.plan, i, qkv + m.segments[1].offset, qkv + m.segments[2].offset, m.width, w.team, w.thread)
    kv_team_barrier(w.team)
    attend_step(&call.plan, i, qkv, m.width, w.team, w.thread)
    _prefetch(w, &layer.o)
    kv_team_barrier(w.team)
    if commit_needed(&call.plan):
        commit_step(&call.plan, i, w.team, w.thread)
        kv_team_barrier(w.team)
