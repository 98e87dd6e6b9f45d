# The steps of a call, a part of engine.pyx: each is run by every thread of a team, which share its work and meet at its end.

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


cdef inline void _prefetch(const Call* call, const Matrix* m, kv_team* team, int thread) noexcept nogil:
    """Asks for what this thread reads first of a matrix, when one token will be decoded; kernels ask for what follows."""
    cdef int64_t panel = kv_team_share(team, thread, m.panels), i
    if call.plan.n > 1:
        return
    for i in range(m.n_segments):
        if panel < m.segments[i].panels:
            kv_prefetch(m.segments[i].data + panel * m.segments[i].panel_bytes,
                        min(FIRST_BYTES, (m.segments[i].panels - panel) * m.segments[i].panel_bytes))
            break
        panel -= m.segments[i].panels


cdef void _matmul(const Call* call, kv_team* team, int thread, const Matrix* m, const kv_input* x, int64_t n, float* out,
                  int64_t ld, bint add, const Matrix* next) noexcept nogil:
    """out [n][ld] = (or += with add) m x, shared among the threads. next: the matrix that is read after this, or NULL."""
    cdef int64_t start, end = 0, grab = kv_team_grab(team, m.panels)
    while True:
        start = kv_team_take(team, m.panels, grab, &end)
        if start < 0:
            break
        _matmul_panels(call.kern, m, x, n, start, end, out, ld, add)
    if next != NULL:
        _prefetch(call, next, team, thread)
    kv_team_barrier(team)


cdef inline const Matrix* _first_of_mlp(const Layer* layer) noexcept nogil:
    if layer.router.n_segments:
        return &layer.router
    return &layer.gate if layer.gate.n_segments else &layer.up


cdef void _activated(const Call* call, kv_team* team, int thread, const Layer* layer, const kv_input* x,
                     int64_t n) noexcept nogil:
    """gate [n][width] = activation(gate x) * (up x), or activation(up x) where there is no gate."""
    cdef int64_t start, end = 0, t, at, width = layer.up.width, grab = kv_team_grab(team, layer.up.panels)
    cdef const Matrix* first = _first_of_mlp(layer)
    cdef const float* up
    while True:
        start = kv_team_take(team, layer.up.panels, grab, &end)
        if start < 0:
            break
        _matmul_panels(call.kern, first, x, n, start, end, call.run.gate, width, False)
        if layer.gate.n_segments:
            _matmul_panels(call.kern, &layer.up, x, n, start, end, call.run.up, width, False)
        for t in range(n):
            at = t * width + KV_PANEL * start
            up = call.run.up + at if layer.gate.n_segments else NULL
            call.kern.activate[call.config.activation](call.run.gate + at, up, KV_PANEL * (end - start),
                                                       call.run.gate + at)
    _prefetch(call, &layer.down, team, thread)
    kv_team_barrier(team)


cdef inline void _norm(const Call* call, const Norm* norm, const float* x, float* out) noexcept nogil:
    """A norm of [hidden]; in and out may be the same."""
    cdef const Config* c = call.config
    if norm.weight == NULL:
        memcpy(out, x, c.hidden_size * sizeof(float))
    elif c.layer_norm:
        call.kern.layer_norm(x, norm.weight, norm.bias, c.hidden_size, c.norm_eps, out)
    else:
        call.kern.rms_norm(x, norm.weight, c.hidden_size, c.norm_eps, out)


cdef void _add(const Call* call, kv_team* team, int thread, const Matrix* m, const kv_input* x, int64_t n,
               const Norm* norm, const Matrix* next) noexcept nogil:
    """x [n][hidden] += m x, at once or by way of a norm and a scale."""
    cdef const Config* c = call.config
    _matmul(call, team, thread, m, x, n, call.run.branch if c.branch else call.run.x, c.hidden_pad, not c.branch, next)
    _add_branch(call, team, n, norm)


cdef void _add_branch(const Call* call, kv_team* team, int64_t n, const Norm* norm) noexcept nogil:
    """x [n][hidden] += what was put aside, normed and scaled; nothing where it is added at once."""
    cdef const Config* c = call.config
    cdef int64_t t, i, end = 0
    cdef float scale = c.residual_scale
    cdef float* branch
    cdef float* stream
    while c.branch:
        t = kv_team_take(team, n, 1, &end)
        if t < 0:
            kv_team_barrier(team)
            break
        branch, stream = call.run.branch + t * c.hidden_pad, call.run.x + t * c.hidden_pad
        if norm.weight != NULL:
            _norm(call, norm, branch, branch)
        for i in range(c.hidden_size):
            stream[i] += scale * branch[i]


cdef void _norm_heads(const Call* call, kv_team* team, const Layer* layer) noexcept nogil:
    """Norms of queries and keys in run.qkv, head by head or all heads of a token at once."""
    cdef const Config* c = call.config
    cdef int64_t queries = 1 if c.norm_all_heads else c.n_heads, keys = 1 if c.norm_all_heads else c.n_kv_heads
    cdef int64_t items = call.plan.n * (queries + keys), i = 0, end = 0, j, size
    cdef float* at
    while True:
        i = kv_team_take(team, items, kv_team_grab(team, items), &end)
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
    kv_team_barrier(team)


cdef void _logits(const Call* call, kv_team* team, const kv_input* x, int64_t n) noexcept nogil:
    """logits [n][width] = head x, scaled and capped where the model wants it."""
    cdef const Config* c = call.config
    cdef int64_t start, end = 0, t, i, size, grab = kv_team_grab(team, call.head.panels)
    cdef float* out
    while True:
        start = kv_team_take(team, call.head.panels, grab, &end)
        if start < 0:
            break
        _matmul_panels(call.kern, call.head, x, n, start, end, call.logits, call.head.width, False)
        size = KV_PANEL * (end - start)
        for t in range(n):
            out = call.logits + t * call.head.width + KV_PANEL * start
            if c.logit_scale != 1:
                for i in range(size):
                    out[i] *= c.logit_scale
            if c.logit_softcap > 0:
                call.kern.soft_cap(out, size, c.logit_softcap)
    kv_team_barrier(team)


ctypedef void (*Source)(const Call* call, const Norm* norm, int64_t layer, int64_t token, float* out) noexcept nogil


cdef void _normed(const Call* call, const Norm* norm, int64_t layer, int64_t token, float* out) noexcept nogil:
    _norm(call, norm, call.run.x + token * call.config.hidden_pad, out)


cdef void _attended(const Call* call, const Norm* norm, int64_t layer, int64_t token, float* out) noexcept nogil:
    combine(call.kern, call.cache, &call.plan, layer, token, out)


cdef kv_input _input(const Call* call, kv_team* team, int thread, const Matrix* m, Source source, const Norm* norm,
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
                source(call, norm, layer, first + row, floats + floats_at + row * x.ld)
            if m.quantized:
                call.kern.quantize(floats + floats_at + row * x.ld, m.cols, planes,
                                   run.q + (own + row) * blocks * KV_BLOCK, run.q_scale + (own + row) * blocks,
                                   run.q_sum + (own + row) * blocks, run.q_offset + (own + row) * 2 * blocks)
        if n == 1:
            break
    if n > 1:
        kv_team_barrier(team)
    x.f, x.blocks, x.planes = floats + floats_at, blocks // planes, planes
    x.q, x.scale, x.sum = run.q + own * blocks * KV_BLOCK, run.q_scale + own * blocks, run.q_sum + own * blocks
    x.offset = run.q_offset + own * 2 * blocks
    return x


cdef void _embed(const Call* call, kv_team* team) noexcept nogil:
    cdef const Config* c = call.config
    cdef int64_t t, i, end = 0
    cdef const Segment* s = &call.embed.segments[0]
    cdef const Segment* p = &call.positions.segments[0]
    cdef float* x
    cdef float* learned
    while True:
        t = kv_team_take(team, call.plan.n, 1, &end)
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
    _prefetch(call, &layer.o, team, thread)
    kv_team_barrier(team)
    if commit_needed(call.cache, plan):
        commit_step(call.cache, plan, i, team)
        kv_team_barrier(team)
