"""The steps of a call: each is run by every thread of a team, which share its work."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy

from .attention cimport append_step, attend_step, combine, commit_needed, commit_step
from .call cimport (ONE, OWN_FLOATS, TWO, Call, Inputs, RunState, Worker, input_row, inputs_at, quantize_row)
from .kernels cimport KV_PANEL, kv_copy_rows, kv_kernels, kv_prefetch, kv_unpack_row
from .plan cimport Item
from .model cimport Config, Layer, Matrix, Norm, Segment, first_of_mlp, whole_panels
from .team cimport kv_team_commit, kv_team_late, kv_team_repeat, kv_team_share, kv_team_take

cdef enum:
    GRAB_BYTES = 1 << 18  # of a matrix that a thread takes at a time: some ten microseconds' work for one row
    GRAB_HEADS = 64
    GRAB_ROWS = 4
    FIRST_BYTES = 16384   # of a thread's share of the next matrix, asked for while others finish with this one


cdef void embed(Worker* w) noexcept nogil:
    """x [n][hidden] = rows of the embedding, with learned positions where the model has some."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t row = 0, i, end = 0, position
    cdef const Item* item
    cdef const Segment* s = &call.embed.segments[0]
    cdef const Segment* p = &call.positions.segments[0]
    cdef float* x
    cdef float* learned
    while kv_team_take(w.me, call.rows, 1, &row, &end):
        x, learned = call.run.x + row * c.hidden_pad, call.run.input + row * call.run.input_width
        kv_unpack_row(s.type, s.data, c.hidden_size, call.tokens[row], x)
        if c.embedding_scale != 1:
            for i in range(c.hidden_size):
                x[i] *= c.embedding_scale
        if call.positions.n_segments:
            item = &call.items.item[call.item_of[row]]
            position = item.plan.first + row - item.row
            kv_unpack_row(p.type, p.data, c.hidden_size, position, learned)
            for i in range(c.hidden_size):
                x[i] += learned[i]


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
# Several rows' are prepared once for all threads. Of a single row each thread prepares a copy of its own, which costs
# less than to wait for another's. A thread that is late for the step that needs it does not, unless the input is kept
# for further steps, which it may be in time for.

cdef inline Inputs _inputs(const Worker* w, const float* floats, int64_t ld, int64_t cols,
                           const int64_t* n) noexcept nogil:
    """Where inputs are prepared: of n[ONE] + n[TWO] rows, or this thread's own. That is in the same place whatever it is
    for: a thread that is late writes to its own."""
    cdef const RunState* run = &w.call.run
    if n[ONE] + n[TWO] > 1:
        return inputs_at(floats, ld, &run.codes, cols, n, 0)
    return inputs_at(floats + w.me.thread * ld, ld, &run.codes, cols, n, w.me.thread * run.own_blocks)


cdef inline bint _next_rows(const Worker* w, const Inputs* x, bint kept, int64_t* start, int64_t* end) noexcept nogil:
    """Finds rows [start, end) for this thread to prepare; False when every row is ready. Both start at 0."""
    if x.n[ONE] + x.n[TWO] == 1:
        start[0], end[0] = end[0], 1
        return start[0] == 0 and (kept or not kv_team_late(w.me))
    return kv_team_take(w.me, x.n[ONE] + x.n[TWO], GRAB_ROWS, start, end)


cdef Inputs prepare_normed(const Worker* w, const Matrix* m, const Norm* norm, bint kept) noexcept nogil:
    """The input of a matrix: the residual stream, normed. kept: the next step is not the only one that needs it."""
    cdef const Call* call = w.call
    cdef int64_t row = 0, end = 0
    cdef Inputs x = _inputs(w, call.run.input, call.run.input_width, m.cols, call.n)
    while _next_rows(w, &x, kept, &row, &end):
        for row in range(row, end):
            _norm(call, norm, call.run.x + row * call.config.hidden_pad, input_row(&x, row))
            if m.quantized:
                quantize_row(call.kern, &x, m.cols, row)
    return x


cdef Inputs prepare_head(const Worker* w) noexcept nogil:
    """The input of the head: the residual stream of those rows whose logits are wanted, normed."""
    cdef const Call* call = w.call
    cdef int64_t i = 0, end = 0
    cdef Inputs x = _inputs(w, call.run.input, call.run.input_width, call.head.cols, call.n_wanted)
    while _next_rows(w, &x, False, &i, &end):
        for i in range(i, end):
            _norm(call, call.norm, call.run.x + call.wanted[i] * call.config.hidden_pad, input_row(&x, i))
            if call.head.quantized:
                quantize_row(call.kern, &x, call.head.cols, i)
    return x


cdef Inputs prepare_attended(const Worker* w, const Matrix* m, int64_t layer) noexcept nogil:
    """The input of a matrix: what the heads have gathered from the cache."""
    cdef const Call* call = w.call
    cdef int64_t row = 0, end = 0
    cdef const Item* item
    cdef Inputs x = _inputs(w, call.run.input, call.run.input_width, m.cols, call.n)
    while _next_rows(w, &x, False, &row, &end):
        for row in range(row, end):
            item = &call.items.item[call.item_of[row]]
            combine(&item.plan, layer, row - item.row, input_row(&x, row))
            if m.quantized:
                quantize_row(call.kern, &x, m.cols, row)
    return x


cdef Inputs prepare_gated(const Worker* w, const Matrix* m) noexcept nogil:
    """The input of a matrix: the activations in run.gate, which all threads share as they are."""
    cdef const Call* call = w.call
    cdef int64_t row = 0, end = 0, ld = whole_panels(m.cols)
    cdef Inputs x = _inputs(w, call.run.gate, ld, m.cols, call.n)
    x.part[ONE].f, x.part[TWO].f = call.run.gate, call.run.gate + call.n[ONE] * ld
    while m.quantized and _next_rows(w, &x, False, &row, &end):
        for row in range(row, end):
            quantize_row(call.kern, &x, m.cols, row)
    return x


cdef void hidden_states(Worker* w) noexcept nogil:
    """hidden [n][hidden_size] = the residual stream, normed as for the head."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t row = 0, end = 0
    while kv_team_take(w.me, call.rows, 1, &row, &end):
        _norm(call, call.norm, call.run.x + row * c.hidden_pad, call.hidden + row * c.hidden_size)


# Matrices -----------------------------------------------------------------------------------------------------------

cdef void matmul_panels(const kv_kernels* kern, const Matrix* m, const Inputs* x, int64_t start, int64_t end, float* out,
                        int64_t ld, bint add) noexcept nogil:
    """Panels [start, end) of a matrix times all inputs, bias included. out: [rows][ld], from panel `start` on."""
    cdef int64_t first = 0, a, b, t, r
    cdef int part
    cdef const Segment* s
    cdef float* to
    for i in range(m.n_segments):
        s = &m.segments[i]
        a, b = max(start - first, <int64_t>0), min(end - first, s.panels)
        if a < b:
            to = out + KV_PANEL * (first + a - start)
            for part in range(2):
                if x.n[part]:
                    kern.matmul[s.type](s.data + a * s.panel_bytes, b - a, m.cols, &x.part[part], x.n[part],
                                        to + part * x.n[ONE] * ld, ld, add)
            if s.bias != NULL:
                for t in range(x.n[ONE] + x.n[TWO]):
                    for r in range(KV_PANEL * a, min(KV_PANEL * b, s.rows)):
                        to[t * ld + r - KV_PANEL * a] += s.bias[r]
        first += s.panels


cdef void _prefetch(void* arg) noexcept nogil:
    """Asks for what this thread reads first of the next matrix."""
    cdef const Worker* w = <const Worker*>arg
    cdef const Matrix* m = w.next
    cdef int64_t panel = kv_team_share(w.me, w.me.thread, m.panels), i
    for i in range(m.n_segments):
        if panel < m.segments[i].panels:
            kv_prefetch(m.segments[i].data + panel * m.segments[i].panel_bytes,
                        min(FIRST_BYTES, (m.segments[i].panels - panel) * m.segments[i].panel_bytes))
            break
        panel -= m.segments[i].panels


cdef void _in_spare_time(Worker* w, const Matrix* next) noexcept nogil:
    """What is read next is asked for when nothing is left to do of this step, for a single row; kernels ask for what
    follows."""
    w.next = next
    if next != NULL and w.call.rows == 1:
        w.me.spare, w.me.spare_arg = _prefetch, w


cdef int64_t grab_of(const Matrix* m, int64_t n) noexcept nogil:
    """Panels of a matrix to take at a time at most, with n inputs: what a thread keeps to itself of their products is to
    fit its cache, and what is lost with a thread that the system stops is to be little."""
    cdef int64_t cost = m.segments[0].panel_bytes * (1 + n // 16)
    return max(min(GRAB_BYTES // cost, OWN_FLOATS // (KV_PANEL * n)), <int64_t>1)


cdef float* own(const Worker* w, int64_t i) noexcept nogil:
    """The i-th of this thread's two pieces of OWN_FLOATS."""
    return w.call.run.own + (2 * w.me.thread + i) * OWN_FLOATS


cdef void matmul(Worker* w, const Matrix* m, const Inputs* x, float* out, int64_t ld, bint add,
                 const Matrix* next) noexcept nogil:
    """out [n][ld] = (or += with add) m x. next: the matrix that is read after this, or NULL."""
    cdef int64_t start = 0, end = 0, n = w.call.rows, width
    cdef float* part = own(w, 0)
    cdef float* to
    _in_spare_time(w, next)
    while kv_team_repeat(w.me, m.panels, grab_of(m, n), &start, &end):
        to, width = out + KV_PANEL * start, KV_PANEL * (end - start)
        if add:
            kv_copy_rows(to, ld, n, width, part, width)
        matmul_panels(w.call.kern, m, x, start, end, part, width, add)
        if kv_team_commit(w.me):
            kv_copy_rows(part, width, n, width, to, ld)


cdef void activate_mlp(Worker* w, const Layer* layer, const Inputs* x) noexcept nogil:
    """gate [n][width] = activation(gate x) * (up x), or activation(up x) where there is no gate."""
    cdef const Call* call = w.call
    cdef int64_t start = 0, end = 0, n = call.rows, grab = grab_of(&layer.up, n), width
    cdef const Matrix* first = first_of_mlp(layer)
    cdef float* gate = own(w, 0)
    cdef float* up = own(w, 1) if layer.gate.n_segments else NULL
    _in_spare_time(w, &layer.down)
    while kv_team_repeat(w.me, layer.up.panels, grab, &start, &end):
        width = KV_PANEL * (end - start)
        matmul_panels(call.kern, first, x, start, end, gate, width, False)
        if layer.gate.n_segments:
            matmul_panels(call.kern, &layer.up, x, start, end, up, width, False)
        call.kern.activate[call.config.activation](gate, up, n * width, gate)
        if kv_team_commit(w.me):
            kv_copy_rows(gate, width, n, width, call.run.gate + KV_PANEL * start, layer.up.width)


cdef void add(Worker* w, const Matrix* m, const Inputs* x, const Norm* norm, const Matrix* next) noexcept nogil:
    """x [n][hidden] += m x, at once or by way of a norm and a scale."""
    cdef const Config* c = w.call.config
    matmul(w, m, x, w.call.run.branch if c.branch else w.call.run.x, c.hidden_pad, not c.branch, next)
    add_branch(w, norm)


cdef void add_branch(Worker* w, const Norm* norm) noexcept nogil:
    """x [n][hidden] += what was put aside, normed and scaled; nothing where it is added at once."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t row = 0, i, end = 0
    cdef float scale = c.residual_scale
    cdef float* branch
    cdef float* stream
    while c.branch and kv_team_take(w.me, call.rows, 1, &row, &end):
        branch, stream = call.run.branch + row * c.hidden_pad, call.run.x + row * c.hidden_pad
        if norm.weight != NULL:
            _norm(call, norm, branch, branch)
        for i in range(c.hidden_size):
            stream[i] += scale * branch[i]


cdef void logits(Worker* w, const Inputs* x) noexcept nogil:
    """logits [wanted rows][width] = head x, scaled and capped where the model wants it."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t start = 0, end = 0, i, width, n = call.n_wanted[ONE] + call.n_wanted[TWO]
    cdef float* part = own(w, 0)
    while kv_team_repeat(w.me, call.head.panels, grab_of(call.head, n), &start, &end):
        width = KV_PANEL * (end - start)
        matmul_panels(call.kern, call.head, x, start, end, part, width, False)
        if c.logit_scale != 1:
            for i in range(n * width):
                part[i] *= c.logit_scale
        if c.logit_softcap > 0:
            call.kern.soft_cap(part, n * width, c.logit_softcap)
        if kv_team_commit(w.me):
            kv_copy_rows(part, width, n, width, call.logits + KV_PANEL * start, call.head.width)


# Attention ----------------------------------------------------------------------------------------------------------

cdef void norm_heads(Worker* w, const Layer* layer) noexcept nogil:
    """Norms of queries and keys in run.qkv, head by head or all heads of a token at once."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef int64_t queries = 1 if c.norm_all_heads else c.n_heads, keys = 1 if c.norm_all_heads else c.n_kv_heads
    cdef int64_t items = call.rows * (queries + keys), i = 0, end = 0, j, size
    cdef float* at
    while kv_team_take(w.me, items, GRAB_HEADS, &i, &end):
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


cdef void attend(Worker* w, const Layer* layer, int64_t i) noexcept nogil:
    """From q, k, v in run.qkv to partial outputs in the plans; the caches have the chunks afterwards."""
    cdef const Call* call = w.call
    cdef const Matrix* m = &layer.qkv
    cdef const float* qkv = call.run.qkv
    append_step(&call.items, i, qkv + m.segments[1].offset, qkv + m.segments[2].offset, m.width, w.me)
    _in_spare_time(w, &layer.o)
    attend_step(&call.items, i, qkv, m.width, w.me)
    if commit_needed(&call.items):
        commit_step(&call.items, i, w.me)
