"""Mixture of experts: a feed-forward step in which each token goes through the few experts that a router chooses for it
(Shazeer et al. 2017).

Pairs of a row and an expert, the *slots*, are sorted by expert, so that each expert's matrices are read once for all its
rows, and those of experts that nobody chose not at all.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy, memset

from .call cimport ONE, TWO, Call, Inputs, RunState, Worker, input_row, inputs_at, quantize_row
from .kernels cimport KV_BLOCK, KV_PANEL, kv_copy_rows
from .model cimport Config, Expert, Layer, Matrix
from .steps cimport add_branch, grab_of, matmul, matmul_panels, own, prepare_normed
from .team cimport kv_team_commit, kv_team_repeat, kv_team_take

cdef extern from "<math.h>" nogil:
    float expf(float)


cdef void _sort_slots(const Call* call) noexcept nogil:
    """Slots by expert, in the order of rows; the experts that have any."""
    cdef const Config* c = call.config
    cdef const RunState* run = &call.run
    cdef int64_t i, e, slots = call.rows * c.experts_used
    cdef int32_t at
    memset(run.first, 0, (c.n_experts + 1) * sizeof(int32_t))
    for i in range(slots):
        run.first[run.chosen[i] + 1] += 1
    run.n_active[0] = 0
    for e in range(c.n_experts):
        if run.first[e + 1]:
            run.active[run.n_active[0]] = <int32_t>e
            run.n_active[0] += 1
        run.first[e + 1] += run.first[e]
    for e in range(c.n_experts):
        run.next[e] = run.middle[e] = run.first[e]
    for i in range(slots):
        e = run.chosen[i]
        at = run.next[e]
        run.next[e] += 1
        if i < call.n[ONE] * c.experts_used:
            run.middle[e] += 1
        run.slot_choice[at], run.slot_of[i] = <int32_t>i, at


cdef void _choose_experts(const Config* c, float* scores, int32_t* chosen, float* share) noexcept nogil:
    """The experts_used best of a token's scores, and their shares: of the softmax of all scores. Scores are used up."""
    cdef int64_t e, j, best
    cdef float top = -INFINITY, total = 0, kept = 0
    for e in range(c.n_experts):
        top = max(top, scores[e])
    for e in range(c.n_experts):
        scores[e] = expf(scores[e] - top)
        total += scores[e]
    for j in range(c.experts_used):
        best = 0
        for e in range(1, c.n_experts):
            if scores[e] > scores[best]:
                best = e
        chosen[j], share[j] = <int32_t>best, scores[best]
        kept += scores[best]
        scores[best] = -1
    for j in range(c.experts_used):
        share[j] /= kept if c.normalize_experts else total


cdef void _choose(Worker* w, const Layer* layer) noexcept nogil:
    """From router scores to every row's experts, and to slots."""
    cdef const Config* c = w.call.config
    cdef const RunState* run = &w.call.run
    cdef int64_t row = 0, end = 0
    while kv_team_take(w.me, w.call.rows, 4, &row, &end):
        for row in range(row, end):
            _choose_experts(c, run.router + row * layer.router.width, run.chosen + row * c.experts_used,
                            run.share + row * c.experts_used)
    while kv_team_take(w.me, 1, 1, &row, &end):
        _sort_slots(w.call)


cdef Inputs _slot_inputs(const Call* call, const float* floats, int64_t ld, int64_t cols, int64_t first,
                         const int64_t* n) noexcept nogil:
    """What n slots of an expert, from `first` on, put into one of its matrices."""
    return inputs_at(floats + first * ld, ld, &call.run.slot_codes, cols, n, first * 2 * ((cols + KV_BLOCK - 1) // KV_BLOCK))


cdef void _quantize_slot(const Call* call, const float* floats, int64_t ld, int64_t cols, int64_t slot) noexcept nogil:
    cdef const RunState* run = &call.run
    cdef int64_t e = run.chosen[run.slot_choice[slot]], first = run.first[e]
    cdef int64_t n[2]
    cdef Inputs x
    n[ONE], n[TWO] = run.middle[e] - first, run.first[e + 1] - run.middle[e]
    x = _slot_inputs(call, floats, ld, cols, first, n)
    quantize_row(call.kern, &x, cols, slot - first)


cdef void _prepare_gate_up(Worker* w, const Layer* layer, const Inputs* rows) noexcept nogil:
    """Every slot gets the input of its row."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef const RunState* run = &call.run
    cdef int64_t slot = 0, end = 0
    while kv_team_take(w.me, call.rows * c.experts_used, 1, &slot, &end):
        memcpy(run.slot_input + slot * run.input_width, input_row(rows, run.slot_choice[slot] // c.experts_used),
               c.hidden_size * sizeof(float))
        if layer.experts_quantized:
            _quantize_slot(call, run.slot_input, run.input_width, c.hidden_size, slot)


cdef void _prepare_down(Worker* w, const Layer* layer) noexcept nogil:
    """The gated activations are where `down` reads them; their codes are not."""
    cdef const Call* call = w.call
    cdef int64_t slot = 0, end = 0, ld = layer.experts[0].up.width
    while layer.experts_quantized and kv_team_take(w.me, call.rows * call.config.experts_used, 1, &slot, &end):
        _quantize_slot(call, call.run.slot_gate, ld, call.config.expert_size, slot)


# Some panels of an expert's matrices, for all its slots.
ctypedef struct Part:
    const Expert* expert
    int64_t start, end          # panels
    int64_t first, count        # slots,
    int64_t n[2]                # of which so many are of rows with one plane and with two


cdef void _gate_up(const Worker* w, const Part* part, int64_t at) noexcept nogil:
    """activation(gate x) * (up x) of the slots, times their shares: the product with `down` is linear."""
    cdef const Call* call = w.call
    cdef int64_t s, i, width = KV_PANEL * (part.end - part.start)
    cdef float* gate = own(w, 0) + at
    cdef float* up = own(w, 1) + at
    cdef float share
    cdef Inputs x = _slot_inputs(call, call.run.slot_input, call.run.input_width, call.config.hidden_size, part.first,
                                 part.n)
    matmul_panels(call.kern, &part.expert.gate, &x, part.start, part.end, gate, width, False)
    matmul_panels(call.kern, &part.expert.up, &x, part.start, part.end, up, width, False)
    call.kern.activate[call.config.activation](gate, up, part.count * width, gate)
    for s in range(part.count):
        share = call.run.share[call.run.slot_choice[part.first + s]]
        for i in range(s * width, (s + 1) * width):
            gate[i] *= share


cdef void _down(const Worker* w, const Part* part, int64_t at) noexcept nogil:
    """down h of the slots."""
    cdef const Call* call = w.call
    cdef Inputs x = _slot_inputs(call, call.run.slot_gate, part.expert.up.width, call.config.expert_size, part.first,
                                 part.n)
    matmul_panels(call.kern, &part.expert.down, &x, part.start, part.end, own(w, 0) + at,
                  KV_PANEL * (part.end - part.start), False)


ctypedef void (*ExpertPanels)(const Worker* w, const Part* part, int64_t at) noexcept nogil


cdef Part _part(const Call* call, const Layer* layer, int64_t panels, int64_t item, int64_t end) noexcept nogil:
    """The items from `item` on, before `end`, that are of one expert; without slots where no further one has any. A
    thread that is late finds numbers that others are writing: none leads out of the buffers."""
    cdef const RunState* run = &call.run
    cdef int64_t i = item // panels, e, first, last, middle
    cdef Part part
    part.start, part.end = item % panels, min(end - i * panels, panels)
    part.first = part.count = part.n[ONE] = part.n[TWO] = 0
    part.expert = NULL
    if i < run.n_active[0]:
        e = run.active[i]
        first = run.first[e]
        last = max(min(<int64_t>run.first[e + 1], first + call.rows), first)
        middle = max(min(<int64_t>run.middle[e], last), first)
        part.expert, part.first, part.count = &layer.experts[e], first, last - first
        part.n[ONE], part.n[TWO] = middle - first, last - middle
    return part


cdef void _for_experts(Worker* w, const Layer* layer, const Matrix* like, ExpertPanels compute, float* out,
                       int64_t ld) noexcept nogil:
    """Shares out the panels, of as many as a matrix has, of all experts that have slots: out [slots][ld]. Results of a
    grab lie one after the other until they count."""
    cdef const Call* call = w.call
    cdef int64_t start = 0, end = 0, item, at, width, n = call.rows, panels = like.panels
    cdef int64_t items = min(call.config.n_experts, n * call.config.experts_used) * panels   # at most
    cdef int64_t grab = grab_of(like, n)
    cdef Part part
    while kv_team_repeat(w.me, items, grab, &start, &end):
        item, at = start, 0
        while item < end:
            part = _part(call, layer, panels, item, end)
            if part.count:
                compute(w, &part, at)
            at += part.count * KV_PANEL * (part.end - part.start)
            item += part.end - part.start
        if not kv_team_commit(w.me):
            continue
        item, at = start, 0
        while item < end:
            part = _part(call, layer, panels, item, end)
            width = KV_PANEL * (part.end - part.start)
            kv_copy_rows(own(w, 0) + at, width, part.count, width, out + part.first * ld + KV_PANEL * part.start, ld)
            at += part.count * width
            item += part.end - part.start


cdef void _sum_slots(Worker* w) noexcept nogil:
    """Each row gets the sum of its slots, in the stream or in what is put aside for it."""
    cdef const Config* c = w.call.config
    cdef const RunState* run = &w.call.run
    cdef int64_t t = 0, j, k, end = 0
    cdef float* to
    cdef const float* part
    while kv_team_take(w.me, w.call.rows, 1, &t, &end):
        to = (run.branch if c.branch else run.x) + t * c.hidden_pad
        if c.branch:
            memset(to, 0, c.hidden_size * sizeof(float))
        for j in range(c.experts_used):
            part = run.slot_out + run.slot_of[t * c.experts_used + j] * c.hidden_pad
            for k in range(c.hidden_size):
                to[k] += part[k]


cdef void mixture(Worker* w, const Layer* layer) noexcept nogil:
    """x [n][hidden] += the sum of the chosen experts' outputs, each times its share."""
    cdef const Expert* one = &layer.experts[0]
    cdef Inputs x = prepare_normed(w, &layer.router, &layer.mlp_norm, True)
    matmul(w, &layer.router, &x, w.call.run.router, layer.router.width, False, NULL)
    _choose(w, layer)
    _prepare_gate_up(w, layer, &x)
    _for_experts(w, layer, &one.up, _gate_up, w.call.run.slot_gate, one.up.width)
    _prepare_down(w, layer)
    _for_experts(w, layer, &one.down, _down, w.call.run.slot_out, w.call.config.hidden_pad)
    _sum_slots(w)
    add_branch(w, &layer.mlp_post_norm)
