"""Mixture of experts: a feed-forward step in which each token goes through the few experts that a router chooses for it
(Shazeer et al. 2017).

Pairs of a token and an expert, the *slots*, are sorted by expert, so that each expert's matrices are read once for all
its tokens, and those of experts that nobody chose not at all.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy, memset

from .call cimport Call, RunState, Worker, input_rows, quantize_row
from .kernels cimport KV_PANEL, kv_input
from .model cimport Config, Expert, Layer
from .steps cimport add_branch, matmul, matmul_panels, prepare_normed
from .team cimport kv_team_barrier, kv_team_grab, kv_team_take

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


cdef void _choose(const Worker* w, const Layer* layer) noexcept nogil:
    """From router scores to every token's experts, and to slots."""
    cdef const Config* c = w.call.config
    cdef const RunState* run = &w.call.run
    cdef int64_t t, end = 0, n = w.call.plan.n
    while True:
        t = kv_team_take(w.team, w.thread, n, 4, &end)
        if t < 0:
            break
        for t in range(t, end):
            _choose_experts(c, run.router + t * layer.router.width, run.chosen + t * c.experts_used,
                            run.share + t * c.experts_used)
    kv_team_barrier(w.team)
    if kv_team_take(w.team, w.thread, 1, 1, &end) == 0:
        _sort_slots(c, run, n)
    kv_team_barrier(w.team)


cdef kv_input _gate_up_inputs(const Call* call, int64_t first) noexcept nogil:
    """What the slots from `first` on put into `gate` and `up` of their expert."""
    return input_rows(call.run.slot_input, call.run.input_width, &call.run.slot_codes, call.config.hidden_size,
                      call.planes, first)


cdef kv_input _down_inputs(const Call* call, const Expert* expert, int64_t first) noexcept nogil:
    """What they put into `down`."""
    return input_rows(call.run.slot_gate, expert.up.width, &call.run.slot_codes, call.config.expert_size, call.planes,
                      first)


cdef void _prepare_gate_up(const Worker* w, const Layer* layer, const kv_input* tokens) noexcept nogil:
    """Every slot gets the input of its token."""
    cdef const Call* call = w.call
    cdef const Config* c = call.config
    cdef kv_input x = _gate_up_inputs(call, 0)
    cdef int64_t slot, end = 0, slots = call.plan.n * c.experts_used
    while True:
        slot = kv_team_take(w.team, w.thread, slots, 1, &end)
        if slot < 0:
            break
        memcpy(<float*>x.f + slot * x.ld, tokens.f + call.run.slot_choice[slot] // c.experts_used * tokens.ld,
               c.hidden_size * sizeof(float))
        if layer.experts_quantized:
            quantize_row(call, &x, c.hidden_size, slot)
    kv_team_barrier(w.team)


cdef void _prepare_down(const Worker* w, const Layer* layer) noexcept nogil:
    """The gated activations are where `down` reads them; their codes are not."""
    cdef const Config* c = w.call.config
    cdef kv_input x = _down_inputs(w.call, &layer.experts[0], 0)
    cdef int64_t slot, end = 0
    while layer.experts_quantized:
        slot = kv_team_take(w.team, w.thread, w.call.plan.n * c.experts_used, 1, &end)
        if slot < 0:
            kv_team_barrier(w.team)
            break
        quantize_row(w.call, &x, c.expert_size, slot)


cdef void _gate_up(const Call* call, const Expert* expert, int64_t e, int64_t start, int64_t end) noexcept nogil:
    """Panels [start, end) of activation(gate x) * (up x) for an expert's slots, times the slots' shares: the product
    with `down` is linear."""
    cdef const RunState* run = &call.run
    cdef int64_t first = run.first[e], count = run.first[e + 1] - first, width = expert.up.width, s, i, at
    cdef int64_t size = KV_PANEL * (end - start)
    cdef float share
    cdef kv_input x = _gate_up_inputs(call, first)
    matmul_panels(call.kern, &expert.gate, &x, count, start, end, run.slot_gate + first * width, width, False)
    matmul_panels(call.kern, &expert.up, &x, count, start, end, run.slot_up + first * width, width, False)
    for s in range(first, first + count):
        at = s * width + KV_PANEL * start
        call.kern.activate[call.config.activation](run.slot_gate + at, run.slot_up + at, size, run.slot_gate + at)
        share = run.share[run.slot_choice[s]]
        for i in range(at, at + size):
            run.slot_gate[i] *= share


cdef void _down(const Call* call, const Expert* expert, int64_t e, int64_t start, int64_t end) noexcept nogil:
    """Panels [start, end) of down h for an expert's slots."""
    cdef const RunState* run = &call.run
    cdef int64_t first = run.first[e], ld = call.config.hidden_pad
    cdef kv_input x = _down_inputs(call, expert, first)
    matmul_panels(call.kern, &expert.down, &x, run.first[e + 1] - first, start, end, run.slot_out + first * ld, ld,
                  False)


ctypedef void (*ExpertPanels)(const Call* call, const Expert* expert, int64_t e, int64_t start,
                              int64_t end) noexcept nogil


cdef void _for_experts(const Worker* w, const Layer* layer, int64_t panels, ExpertPanels run_panels) noexcept nogil:
    """Shares out the panels, so many of each, of all experts that have slots."""
    cdef const RunState* run = &w.call.run
    cdef int64_t items = run.n_active[0] * panels, start, end = 0, stop, e
    while True:
        start = kv_team_take(w.team, w.thread, items, kv_team_grab(w.team, items), &end)
        if start < 0:
            break
        while start < end:
            e = run.active[start // panels]
            stop = min(end, (start // panels + 1) * panels)
            run_panels(w.call, &layer.experts[e], e, start % panels, (stop - 1) % panels + 1)
            start = stop
    kv_team_barrier(w.team)


cdef void _sum_slots(const Worker* w) noexcept nogil:
    """Each token gets the sum of its slots, in the stream or in what is put aside for it."""
    cdef const Config* c = w.call.config
    cdef const RunState* run = &w.call.run
    cdef int64_t t, j, k, end = 0
    cdef float* to
    cdef const float* part
    while True:
        t = kv_team_take(w.team, w.thread, w.call.plan.n, 1, &end)
        if t < 0:
            break
        to = (run.branch if c.branch else run.x) + t * c.hidden_pad
        if c.branch:
            memset(to, 0, c.hidden_size * sizeof(float))
        for j in range(c.experts_used):
            part = run.slot_out + run.slot_of[t * c.experts_used + j] * c.hidden_pad
            for k in range(c.hidden_size):
                to[k] += part[k]
    kv_team_barrier(w.team)


cdef void mixture(const Worker* w, const Layer* layer) noexcept nogil:
    """x [n][hidden] += the sum of the chosen experts' outputs, each times its share."""
    cdef const Expert* one = &layer.experts[0]
    cdef kv_input x = prepare_normed(w, &layer.router, &layer.mlp_norm)
    matmul(w, &layer.router, &x, w.call.run.router, layer.router.width, False, NULL)
    _choose(w, layer)
    _prepare_gate_up(w, layer, &x)
    _for_experts(w, layer, one.up.panels, _gate_up)
    _prepare_down(w, layer)
    _for_experts(w, layer, one.down.panels, _down)
    _sum_slots(w)
    add_branch(w, &layer.mlp_post_norm)
