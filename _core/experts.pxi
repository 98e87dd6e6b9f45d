# Mixture of experts, a part of engine.pyx: a feed-forward step in which each token goes through the few experts that a
# router chooses for it (Shazeer et al. 2017). Pairs of a token and an expert, the *slots*, are sorted by expert, so that
# each expert's matrices are read once for all its tokens, and those of experts that nobody chose not at all.

cdef void _choose(const Call* call, kv_team* team, const Layer* layer, int64_t n) noexcept nogil:
    """From router scores to chosen experts and their shares: of the softmax of all scores the largest."""
    cdef const Config* c = call.config
    cdef const RunState* run = &call.run
    cdef int64_t t, e, j, end = 0, used = c.experts_used, best
    cdef float* scores
    cdef float top, total, kept
    while True:
        t = kv_team_take(team, n, 4, &end)
        if t < 0:
            break
        for t in range(t, end):
            scores = run.router + t * layer.router.width
            top, total, kept = -INFINITY, 0, 0
            for e in range(c.n_experts):
                top = max(top, scores[e])
            for e in range(c.n_experts):
                scores[e] = expf(scores[e] - top)
                total += scores[e]
            for j in range(used):
                best = 0
                for e in range(1, c.n_experts):
                    if scores[e] > scores[best]:
                        best = e
                run.chosen[t * used + j], run.share[t * used + j] = <int32_t>best, scores[best]
                kept += scores[best]
                scores[best] = -1
            for j in range(used):
                run.share[t * used + j] /= kept if c.normalize_experts else total
    kv_team_barrier(team)
    if kv_team_take(team, 1, 1, &end) == 0:
        _sort_slots(c, run, n)
    kv_team_barrier(team)


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


cdef kv_input _slots(const Call* call, const float* floats, int64_t ld, int64_t cols, int64_t first) noexcept nogil:
    """The inputs of the slots from `first` on, in rows of `floats` and, quantised, in the slots' own buffers."""
    cdef kv_input x
    cdef int64_t planes = 2 if call.plan.n == 1 else call.run.planes, blocks = (cols + KV_BLOCK - 1) // KV_BLOCK
    cdef int64_t at = first * planes * blocks
    x.f, x.ld, x.blocks, x.planes = floats + first * ld, ld, blocks, planes
    x.q, x.scale, x.sum = call.run.slot_q + at * KV_BLOCK, call.run.slot_scale + at, call.run.slot_sum + at
    x.offset = call.run.slot_offset + 2 * at
    return x


cdef void _prepare_slots(const Call* call, kv_team* team, const kv_input* tokens, float* floats, int64_t ld,
                         int64_t cols, bint quantized, int64_t n_slots) noexcept nogil:
    """Inputs of all slots: copied from those of their tokens, or (tokens NULL) already in `floats`; quantised."""
    cdef const RunState* run = &call.run
    cdef int64_t slot, end = 0
    cdef kv_input x
    while tokens != NULL or quantized:
        slot = kv_team_take(team, n_slots, 1, &end)
        if slot < 0:
            kv_team_barrier(team)
            break
        if tokens != NULL:
            memcpy(floats + slot * ld, tokens.f + run.slot_choice[slot] // call.config.experts_used * tokens.ld,
                   cols * sizeof(float))
        if quantized:
            x = _slots(call, floats, ld, cols, slot)
            call.kern.quantize(floats + slot * ld, cols, x.planes, <int8_t*>x.q, <float*>x.scale, <int32_t*>x.sum,
                               <int32_t*>x.offset)


cdef void _expert_gate_up(const Call* call, const Expert* expert, int64_t e, int64_t start,
                          int64_t end) noexcept nogil:
    """Panels [start, end) of activation(gate x) * (up x) for an expert's slots, times the slots' shares: the product
    with `down` is linear."""
    cdef const RunState* run = &call.run
    cdef int64_t first = run.first[e], count = run.first[e + 1] - first, width = expert.up.width, s, i, at
    cdef int64_t size = KV_PANEL * (end - start)
    cdef float share
    cdef kv_input x = _slots(call, run.slot_input, run.input_width, expert.up.cols, first)
    _matmul_panels(call.kern, &expert.gate, &x, count, start, end, run.slot_gate + first * width, width, False)
    _matmul_panels(call.kern, &expert.up, &x, count, start, end, run.slot_up + first * width, width, False)
    for s in range(first, first + count):
        at = s * width + KV_PANEL * start
        call.kern.activate[call.config.activation](run.slot_gate + at, run.slot_up + at, size, run.slot_gate + at)
        share = run.share[run.slot_choice[s]]
        for i in range(at, at + size):
            run.slot_gate[i] *= share


cdef void _expert_down(const Call* call, const Expert* expert, int64_t e, int64_t start, int64_t end) noexcept nogil:
    """Panels [start, end) of down h for an expert's slots."""
    cdef const RunState* run = &call.run
    cdef int64_t first = run.first[e], ld = call.config.hidden_pad
    cdef kv_input x = _slots(call, run.slot_gate, expert.up.width, expert.down.cols, first)
    _matmul_panels(call.kern, &expert.down, &x, run.first[e + 1] - first, start, end, run.slot_out + first * ld, ld,
                   False)


cdef void _for_experts(const Call* call, kv_team* team, const Layer* layer, int64_t panels, bint down) noexcept nogil:
    """Shares out the panels of all experts that have slots."""
    cdef const RunState* run = &call.run
    cdef int64_t items = run.n_active[0] * panels, start, end = 0, stop, e
    while True:
        start = kv_team_take(team, items, kv_team_grab(team, items), &end)
        if start < 0:
            break
        while start < end:
            e = run.active[start // panels]
            stop = min(end, (start // panels + 1) * panels)
            if down:
                _expert_down(call, &layer.experts[e], e, start % panels, (stop - 1) % panels + 1)
            else:
                _expert_gate_up(call, &layer.experts[e], e, start % panels, (stop - 1) % panels + 1)
            start = stop
    kv_team_barrier(team)


cdef void _mixture(const Call* call, kv_team* team, int thread, const Layer* layer, int64_t i, int64_t n) noexcept nogil:
    """x [n][hidden] += the sum of the chosen experts' outputs, each times its share."""
    cdef const Config* c = call.config
    cdef const RunState* run = &call.run
    cdef const Expert* one = &layer.experts[0]
    cdef int64_t t, j, k, slots = n * c.experts_used, end = 0
    cdef float* to
    cdef const float* part
    cdef kv_input x = _input(call, team, thread, &layer.router, _normed, &layer.mlp_norm, i, 0, n)
    _matmul(call, team, thread, &layer.router, &x, n, run.router, layer.router.width, False, NULL)
    _choose(call, team, layer, n)
    _prepare_slots(call, team, &x, run.slot_input, run.input_width, c.hidden_size, layer.experts_quantized, slots)
    _for_experts(call, team, layer, one.up.panels, False)
    _prepare_slots(call, team, NULL, run.slot_gate, one.up.width, c.expert_size, layer.experts_quantized, slots)
    _for_experts(call, team, layer, one.down.panels, True)
    while True:
        t = kv_team_take(team, n, 1, &end)
        if t < 0:
            break
        to = (run.branch if c.branch else run.x) + t * c.hidden_pad
        if c.branch:
            memset(to, 0, c.hidden_size * sizeof(float))
        for j in range(c.experts_used):
            part = run.slot_out + run.slot_of[t * c.experts_used + j] * c.hidden_pad
            for k in range(c.hidden_size):
                to[k] += part[k]
    kv_team_barrier(team)
    _add_branch(call, team, n, &layer.mlp_post_norm)
