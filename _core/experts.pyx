"""Mixture of experts: a feed-forward step in which each token goes through the few experts that a router chooses for it
(Shazeer et al. 2017).

Pairs of a token and an expert, the *slots*, are sorted by expert, so that each expert's matrices are read once for all
its tokens, and those of experts that nobody chose not at all.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy, memset

from .call cimport Call, RunState, Worker, input_rows, quantize_row
from .kernels cimport KV_PANEL, kv_copy_rows, kv_input
from .model cimport Config, Expert, Layer, Matrix
from .steps cimport add_branch, grab_of, matmul, matmul_panels, own, prepare_normed
from .team cimport kv_team_commit, kv_team_repeat, kv_team_take

cdef extern from "<math.h>" nogil:
    float expf(float)


cdef void _sort_slots(const Config* c, const RunState* run, int64_t n) noexcept nogil:
    """Slots by expert; the experts that have any."""
    cdef int64_t i, e, slots = n * c.experts_used
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
        run.next[e] = run.first[e]
    for i in range(slots):
        at = run.next[run.chosen[i]]
        run.next[run.chosen[i]] += 1
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
    """From router scores to every token's experts, and to slots."""
    cdef const Config* c = w.call.config
    cdef const RunState* run = &w.call.run
    cdef int64_t t = 0, end = 0, n = w.call.plan.n
    while kv_team_take(w.me, n, 4, &t, &end):
        for t in range(t, end):
            _choose_experts(c, run.router + t * layer.router.width, run.chosen + t * c.experts_used,
                            run.share + t * c.experts_used)
    while kv_team_take(w.me, 1, 1, &t, &end):
        _sort_slots(c, run, n)


cdef kv_input _gate_up_inputs(const Call* call, int64_t first) noexcept nogil:
    """What the slots from `first` on put into `gate` and `up` of their expert."""
    return input_rows(call.run.slot_input, call.run.input_width, &call.run.slot_codes, call.config.hidden_size,
                      call.planes, first)


cdef kv_input _down_inputs(const Call* call, const Expert* expert, int64_t first) noexcept nogil:
    """What they put into `down`."""
    return input_rows(call.run.slot_gate, expert.up.width, &call.run.slot_codes, call.config.expert_size, call.planes,
                      first)


cdef void _prepare_gate_up(Worker* w, const Layer* layer, const kv_input* tokens) noexcept nogil:
    """Every slot gets the input of its token."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef kv_input x = _gate_up_inputs(call, 0)
    cdef int64_t slot = 0, end = 0
    while kv_team_take(w.me, call.plan.n * c.experts_used, 1, &slot, &end):
        memcpy(<float*>x.f + slot * x.ld, tokens.f + call.run.slot_choice[slot] // c.experts_used * tokens.ld,
               c.hidden_size * sizeof(float))
        if layer.experts_quantized:
            quantize_row(call, &x, c.hidden_size, slot)


cdef void _prepare_down(Worker* w, const Layer* layer) noexcept nogil:
    """The gated activations are where `down` reads them; their codes are not."""
    cdef const Config* c = w.call.config
    cdef kv_input x = _down_inputs(w.call, &layer.experts[0], 0)
    cdef int64_t slot = 0, end = 0
    while layer.experts_quantized and kv_team_take(w.me, w.call.plan.n * c.experts_used, 1, &slot, &end):
        quantize_row(w.call, &x, c.expert_size, slot)


# Some panels of an expert's matrices, for all its slots.
ctypedef struct Part:
    const Expert* expert
    int64_t start, end          # panels
    int64_t first, count        # slots


cdef void _gate_up(const Worker* w, const Part* part, int64_t at) noexcept nogil:
    """activation(gate x) * (up x) of the slots, times their shares: the product with `down` is linear."""
    cdef const Call* call = w.call
    cdef int64_t s, i, width = KV_PANEL * (part.end - part.start)
    cdef float* gate = own(w, 0) + at
    cdef float* up = own(w, 1) + at
    cdef float share
    cdef kv_input x = _gate_up_inputs(call, part.first)
    matmul_panels(call.kern, &part.expert.gate, &x, part.count, part.start, part.end, gate, width, False)
    matmul_panels(call.kern, &part.expert.up, &x, part.count, part.start, part.end, up, width, False)
    call.kern.activate[call.config.activation](gate, up, part.count * width, gate)
    for s in range(part.count):
        share = call.run.share[call.run.slot_choice[part.first + s]]
        for i in range(s * width, (s + 1) * width):
            gate[i] *= share


cdef void _down(const Worker* w, const Part* part, int64_t at) noexcept nogil:
    """down h of the slots."""
    cdef kv_input x = _down_inputs(w.call, part.expert, part.first)
    matmul_panels(w.call.kern, &part.expert.down, &x, part.count, part.start, part.end, own(w, 0) + at,
                  KV_PANEL * (part.end - part.start), False)


ctypedef void (*ExpertPanels)(const Worker* w, const Part* part, int64_t at) noexcept nogil


cdef Part _part(const Call* call, const Layer* layer, int64_t panels, int64_t item, int64_t end) noexcept nogil:
    """The items from `item` on, before `end`, that are of one expert; without slots where no further one has any. A
    thread that is late finds numbers that others are writing: none leads out of the buffers."""
    cdef const RunState* run = &call.run
    cdef int64_t i = item // panels, e, first
    cdef Part part
    part.start, part.end = item % panels, min(end - i * panels, panels)
    part.first = part.count = 0
    part.expert = NULL
    if i < run.n_active[0]:
        e = run.active[i]
        first = run.first[e]
        part.expert, part.first = &layer.experts[e], first
        part.count = max(min(run.first[e + 1] - first, call.plan.n), <int64_t>0)
    return part


cdef void _for_experts(Worker* w, const Layer* layer, const Matrix* like, ExpertPanels compute, float* out,
                       int64_t ld) noexcept nogil:
    """Shares out the panels, of as many as a matrix has, of all experts that have slots: out [slots][ld]. Results of a
    grab lie one after the other until they count."""
    cdef const Call* call = w.call
    cdef int64_t start = 0, end = 0, item, at, width, n = call.plan.n, panels = like.panels
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
    """Each token gets the sum of its slots, in the stream or in what is put aside for it."""
    cdef const Config* c = w.call.config
    cdef const RunState* run = &w.call.run
    cdef int64_t t = 0, j, k, end = 0
    cdef float* to
    cdef const float* part
    while kv_team_take(w.me, w.call.plan.n, 1, &t, &end):
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
    cdef kv_input x = prepare_normed(w, &layer.router, &layer.mlp_norm, True)
    matmul(w, &layer.router, &x, w.call.run.router, layer.router.width, False, NULL)
    _choose(w, layer)
    _prepare_gate_up(w, layer, &x)
    _for_experts(w, layer, &one.up, _gate_up, w.call.run.slot_gate, one.up.width)
    _prepare_down(w, layer)
    _for_experts(w, layer, &one.down, _down, w.call.run.slot_out, w.call.config.hidden_pad)
    _sum_slots(w)
    add_branch(w, &layer.mlp_post_norm)
