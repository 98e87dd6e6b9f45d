"""Attention over the cache: append a chunk, attend with an online softmax over sinks, tiles and window, commit.

A query sees the cache as it would when decoding token by token, whatever chunk it comes in: tiles that are packed
on the way are staged beside the ring until every query of the chunk is done, since earlier ones still see the window's
copy of them, or the ring tile they will replace.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy

from .kernels cimport KV_FORMAT_F32, KV_TILE, kv_format, kv_kernels, kv_prefetch
from .team cimport kv_member, kv_team_commit, kv_team_repeat, kv_team_take
from .cache cimport (Cache, CacheLayer, first_tile, sink_keys, sink_values, tile_bytes, tile_in, tile_of, tiles_evicted,
                     window_bytes, window_tile)
from .plan cimport (GRAB, MAX_ITEMS, MAX_MEMBERS, Group, Groups, Item, Member, Plan, QueryBlock, block_rows, group_rows,
                    n_spans, oldest_tile, output_rows, packed_tile, rope_of, span_length, tile_at, unpacked_tile)

cdef extern from "<math.h>" nogil:
    float exp2f(float)

cdef enum:
    FEW_TOKENS = 16       # of which a thread appends all that goes to a head together


# Append -------------------------------------------------------------------------------------------------------------

# What a layer adds to the cache.
ctypedef struct Added:
    const Plan* plan
    int64_t layer
    const float* k              # [n][n_kv_heads * head_dim], before RoPE, ld floats between tokens
    const float* v
    int64_t ld


cdef void _append_sinks(const Added* added, int64_t head) noexcept nogil:
    """Keeps the chunk's share of the first tokens, and rotates all sinks for every place they are seen at: with a
    sliding window where they were."""
    cdef const Plan* plan = added.plan
    cdef const Cache* c = plan.cache
    cdef int64_t t, i, s, at, lanes = c.sink_lanes, set = c.head_dim * c.sink_lanes
    cdef const CacheLayer* of = &c.layers[added.layer]
    cdef float* keys = sink_keys(c, added.layer, head)
    cdef float* values = sink_values(c, added.layer, head)
    cdef float* out = plan.sinks + head * plan.n_shifts * set
    for t in range(max(<int64_t>0, min(plan.n, c.n_sinks - plan.first))):
        at = t * added.ld + head * c.head_dim
        for i in range(c.head_dim):
            keys[i * lanes + plan.first + t] = added.k[at + i]
        memcpy(values + (plan.first + t) * c.head_pad, added.v + at, c.head_dim * sizeof(float))
        if of.v.hadamard:
            plan.kern.hadamard(values + (plan.first + t) * c.head_pad, c.head_dim)
    if not of.sight:
        for s in range(plan.n_shifts):
            _rotate_sinks(plan, rope_of(plan, added.layer), s, keys, out + s * set)
    elif plan.first - of.sight + 1 < c.n_sinks:
        _rotate_sinks(plan, rope_of(plan, added.layer), plan.n_shifts, keys, out)


cdef void _rotate_sinks(const Plan* plan, int64_t rope, int64_t place, const float* keys, float* out) noexcept nogil:
    cdef const Cache* c = plan.cache
    cdef int64_t i, start, half = c.head_dim // 2, lanes = c.sink_lanes
    cdef int64_t at = (rope * (plan.n_shifts + 1) + place) * half * lanes
    for i in range(half):
        for start in range(i * lanes, (i + 1) * lanes, 16):
            _rotate(keys + start, keys + half * lanes + start, plan.sink_cos + at + start, plan.sink_sin + at + start,
                    out + start, out + half * lanes + start)


cdef inline void _rotate(const float* a, const float* b, const float* cosines, const float* sines, float* x,
                         float* y) noexcept nogil:
    """16 pairs of channels (a, b); lanes without a sink have angles, too, which nobody looks at."""
    cdef float turned[32]
    cdef int j
    for j in range(16):
        turned[j] = a[j] * cosines[j] - b[j] * sines[j]
        turned[16 + j] = b[j] * cosines[j] + a[j] * sines[j]
    memcpy(x, turned, 16 * sizeof(float))
    memcpy(y, turned + 16, 16 * sizeof(float))


cdef void _append_tile(const Added* added, int64_t head, int64_t tile, float* scratch) noexcept nogil:
    """Puts the chunk's tokens of one tile into its window copy; packs the tile if it leaves the window."""
    cdef const Plan* plan = added.plan
    cdef const Cache* c = plan.cache
    cdef const CacheLayer* of = &c.layers[added.layer]
    cdef int64_t start = c.n_sinks + tile * KV_TILE, half = c.head_dim // 2, position, t, at
    cdef int64_t angles = rope_of(plan, added.layer) * plan.n * half
    cdef uint8_t* window = unpacked_tile(plan, added.layer, head, tile)
    cdef uint8_t* packed
    for position in range(max(start, plan.first), min(start + KV_TILE, plan.first + plan.n)):
        t = position - plan.first
        at = t * added.ld + head * c.head_dim
        plan.kern.rope(added.k + at, plan.cos + angles + t * half, plan.sin + angles + t * half, c.head_dim, 1, scratch)
        of.wk.put_k(window, c.head_dim, position - start, scratch)
        memcpy(scratch, added.v + at, c.head_dim * sizeof(float))
        if of.v.hadamard:
            plan.kern.hadamard(scratch, c.head_dim)
        of.wv.put_v(window + of.window_k_bytes, c.head_dim, position - start, scratch)
    if tile < plan.packed_after and of.n_slots:
        packed = packed_tile(plan, added.layer, head, tile)
        of.wk.unpack_k(window, c.head_dim, scratch)
        of.k.pack_k(scratch, c.head_dim, packed)
        of.wv.unpack_v(window + of.window_k_bytes, c.head_dim, scratch)
        of.v.pack_v(scratch, c.head_dim, packed + of.k_bytes)


# Work of several sequences --------------------------------------------------------------------------------------------

cdef inline int64_t _find(const int64_t* start, int64_t n, int64_t unit) noexcept nogil:
    """Which item a unit of work is of: start[i] is the first of item i."""
    cdef int64_t i = n - 1
    while start[i] > unit:
        i -= 1
    return i


cdef inline int64_t _appended(const Plan* plan) noexcept nogil:
    """Units of work of an append: of each KV head its sinks and each tile that gets tokens or is packed; of a few tokens
    all together."""
    cdef int64_t parts = 1 if plan.n <= FEW_TOKENS else plan.last_tile - plan.packed_before + 2
    return plan.cache.n_kv_heads * parts


cdef void _append_unit(const Added* added, int64_t unit, float* scratch) noexcept nogil:
    cdef const Plan* plan = added.plan
    cdef int64_t parts = plan.last_tile - plan.packed_before + 2, i
    cdef int64_t together = parts if plan.n <= FEW_TOKENS else 1
    for i in range(unit * together, (unit + 1) * together):
        if i % parts == 0:
            _append_sinks(added, i // parts)
        else:
            _append_tile(added, i // parts, plan.packed_before + i % parts - 1, scratch)


cdef void append_step(const Items* items, int64_t layer, const float* k, const float* v, int64_t ld,
                      kv_member* me) noexcept nogil:
    """k, v: [rows][n_kv_heads * head_dim], before RoPE, ld floats between rows."""
    cdef int64_t start[MAX_ITEMS + 1]
    cdef int64_t unit = 0, end = 0, i
    cdef const Item* item
    cdef Added added
    start[0] = 0
    for i in range(items.n):
        start[i + 1] = start[i] + _appended(&items.item[i].plan)
    while kv_team_take(me, start[items.n], 1, &unit, &end):
        i = _find(start, items.n, unit)
        item = &items.item[i]
        added.plan, added.layer, added.ld = &item.plan, layer, ld
        added.k, added.v = k + item.row * ld, v + item.row * ld
        _append_unit(&added, unit - start[i], items.scratch + me.thread * items.scratch_floats)


cdef inline bint _commits(const Plan* plan) noexcept nogil:
    return (plan.packed_after > plan.packed_before
            or plan.last_tile >= plan.packed_before + plan.cache.n_window_tiles)


cdef bint commit_needed(const Items* items) noexcept nogil:
    cdef int64_t i
    for i in range(items.n):
        if _commits(&items.item[i].plan):
            return True
    return False


cdef void commit_step(const Items* items, int64_t layer, kv_member* me) noexcept nogil:
    """Moves what was staged into the ring and the window, once no query of the chunk needs what it replaces. Work
    items: each KV head of each sequence."""
    cdef int64_t heads = items.item[0].plan.cache.n_kv_heads, unit = 0, end = 0
    cdef const Plan* plan
    while kv_team_take(me, items.n * heads, 1, &unit, &end):
        plan = &items.item[unit // heads].plan
        if _commits(plan):
            _commit_head(plan, layer, unit % heads)


cdef void _commit_head(const Plan* plan, int64_t layer, int64_t head) noexcept nogil:
    cdef const Cache* c = plan.cache
    cdef const CacheLayer* of = &c.layers[layer]
    cdef int64_t tile
    for tile in range(max(plan.packed_before, plan.packed_after - of.n_slots), plan.packed_after):
        memcpy(tile_in(c.after, c, layer, head, tile), packed_tile(plan, layer, head, tile), tile_bytes(of))
    for tile in range(max(plan.packed_after, plan.packed_before + c.n_window_tiles), plan.last_tile + 1):
        memcpy(window_tile(c, layer, head, tile), unpacked_tile(plan, layer, head, tile), window_bytes(of))


# Attend -------------------------------------------------------------------------------------------------------------

# What a block of queries sees of the tiles that a work item goes through.
ctypedef struct Part:
    const Plan* plan
    const QueryBlock* block
    int64_t row, n             # its rows, queries times heads of a group, of those of the work item
    int64_t first, last        # tiles, of the span
    int64_t at                 # in the plan's outputs

# One work item: the rows of one KV head, of one or several sequences, over one span of tiles.
ctypedef struct Rows:
    int64_t layer, head, n_parts
    Part part[MAX_MEMBERS]
    float* q                   # [rows][head_dim], rotated and scaled
    float* scores              # [rows][64]
    int32_t* visible           # [rows] of the tile at hand, each row sees tokens [hidden, visible), none if visible <= 0
    int32_t* hidden            # [rows] 0 without a sliding window
    float* top
    float* total
    float* acc                 # [rows][head_pad]

# Parts [start, end) of a work item, whose rows [row, row + n) see the same tile.
ctypedef struct Run:
    const Rows* rows
    const Plan* plan           # of the first, in what all have in common
    int64_t start, end, row, n, sight


cdef inline Run _run_of(const Rows* rows, int64_t start, int64_t end) noexcept nogil:
    cdef Run run
    run.rows, run.plan, run.start, run.end = rows, rows.part[start].plan, start, end
    run.row = rows.part[start].row
    run.n = rows.part[end - 1].row + rows.part[end - 1].n - run.row
    run.sight = run.plan.cache.layers[rows.layer].sight
    return run


cdef inline int64_t _see(const Run* run, int64_t start, int64_t tokens) noexcept nogil:
    """Counts, for every row, what it sees of the tokens from position `start` on: those that are not in its future, nor
    before its sliding window. Returns how far the row that sees the most of them does."""
    cdef int64_t p, t, h, r = run.row, seen, hidden, most = 0
    cdef const Part* part
    for p in range(run.start, run.end):
        part = &run.rows.part[p]
        for t in range(part.block.start, part.block.end):
            seen = part.plan.first + t + 1 - start
            hidden = max(seen - run.sight, <int64_t>0) if run.sight else 0
            seen = min(seen, tokens) if hidden < tokens else 0
            most = max(most, seen)
            for h in range(part.plan.group):
                run.rows.visible[r] = <int32_t>seen
                run.rows.hidden[r] = <int32_t>min(hidden, tokens)
                r += 1
    return most


cdef inline void _fill_hidden(const Run* run, float value) noexcept nogil:
    cdef int64_t r, i
    for r in range(run.row, run.row + run.n):
        for i in range(run.rows.hidden[r]):
            run.rows.scores[r * KV_TILE + i] = value


cdef inline void _weigh(const Run* run) noexcept nogil:
    """From scores to softmax weights: none for what a row does not see."""
    cdef const kv_kernels* kern = run.plan.kern
    cdef const Rows* rows = run.rows
    cdef int64_t r = run.row, width = run.plan.cache.head_pad
    if run.plan.soft_cap > 0:
        kern.soft_cap(rows.scores + r * KV_TILE, run.n * KV_TILE, run.plan.soft_cap)
    if run.sight:
        _fill_hidden(run, -INFINITY)
    kern.softmax_step(rows.scores + r * KV_TILE, rows.visible + r, run.n, width, rows.top + r, rows.total + r,
                      rows.acc + r * width)
    if run.sight:
        _fill_hidden(run, 0)  # their exponentials, 1e-38, have not changed the sum, which is at least 1


cdef inline void _gather(const Run* run, const kv_format* k, const kv_format* v, const void* keys, int64_t stride,
                         const void* values, int64_t start, int64_t lanes, int64_t tokens) noexcept nogil:
    """Scores, weights and weighted values of a tile whose tokens are those from position `start` on."""
    cdef const Cache* c = run.plan.cache
    cdef int64_t r = run.row
    tokens = _see(run, start, tokens)   # beyond them lies what an earlier text left
    if tokens <= 0:
        return
    k.k_dot(keys, stride, c.head_dim, run.rows.q + r * c.head_dim, c.head_dim, run.n,
            min(lanes, (tokens + 15) // 16 * 16), run.rows.scores + r * KV_TILE)
    _weigh(run)
    v.v_accumulate(values, c.head_dim, run.rows.scores + r * KV_TILE, run.n, tokens, run.rows.acc + r * c.head_pad)


cdef void _attend_sinks(const Rows* rows, int64_t p) noexcept nogil:
    """Of one part: its sinks are where its own text has them."""
    cdef const Part* part = &rows.part[p]
    cdef const Plan* plan = part.plan
    cdef const Cache* c = plan.cache
    cdef const kv_format* f32 = &plan.kern.format[KV_FORMAT_F32]
    cdef int64_t place = 0, start = 0, lanes
    cdef const float* keys
    cdef const float* values = sink_values(c, rows.layer, rows.head)
    cdef Run run = _run_of(rows, p, p + 1)
    if not run.sight:
        place = tiles_evicted(c, c.n_slots, part.block.packed) - plan.evicted_before
    keys = plan.sinks + (rows.head * plan.n_shifts + place) * c.head_dim * c.sink_lanes
    while start < c.n_sinks:
        lanes = min(c.sink_lanes - start, <int64_t>KV_TILE)
        _gather(&run, f32, f32, keys + start, c.sink_lanes, values + start * c.head_pad, start, lanes,
                min(c.n_sinks - start, <int64_t>KV_TILE))
        start += KV_TILE


cdef void _attend_tile(const Run* run, int64_t tile, const uint8_t* data) noexcept nogil:
    cdef const Cache* c = run.plan.cache
    cdef const CacheLayer* of = &c.layers[run.rows.layer]
    cdef bint packed = tile < run.rows.part[run.start].block.packed
    _gather(run, of.k if packed else of.wk, of.v if packed else of.wv, data, KV_TILE,
            data + (of.k_bytes if packed else of.window_k_bytes), c.n_sinks + tile * KV_TILE, KV_TILE, KV_TILE)


cdef inline bint _has(const Part* part, int64_t tile) noexcept nogil:
    return part.first <= tile <= part.last


cdef inline const uint8_t* _data(const Rows* rows, int64_t p, int64_t tile) noexcept nogil:
    return tile_at(rows.part[p].plan, rows.part[p].block, rows.layer, rows.head, tile)


cdef void _attend_everyone(const Rows* rows, int64_t tile) noexcept nogil:
    """A tile number: together for neighbouring parts that have the same tile."""
    cdef int64_t start = 0, end
    cdef const uint8_t* data
    cdef Run run
    while start < rows.n_parts:
        end = start + 1
        if _has(&rows.part[start], tile):
            data = _data(rows, start, tile)
            while end < rows.n_parts and _has(&rows.part[end], tile) and _data(rows, end, tile) == data:
                end += 1
            run = _run_of(rows, start, end)
            _attend_tile(&run, tile, data)
        start = end


cdef void _prepare(const Rows* rows, int64_t p, const float* q, int64_t ld) noexcept nogil:
    """Rotates and scales the queries of a part; starts their softmax. q: of the part's item."""
    cdef const Part* part = &rows.part[p]
    cdef const Plan* plan = part.plan
    cdef const Cache* c = plan.cache
    cdef int64_t i, t, r, half = c.head_dim // 2, at
    for i in range(part.n):
        t, r = part.block.start + i // plan.group, part.row + i
        at = (rope_of(plan, rows.layer) * plan.n + t) * half
        plan.kern.rope(q + t * ld + (rows.head * plan.group + i % plan.group) * c.head_dim, plan.cos + at,
                       plan.sin + at, c.head_dim, plan.scale, rows.q + r * c.head_dim)
        rows.top[r] = -INFINITY
        rows.total[r] = 0
    for i in range(part.row * c.head_pad, (part.row + part.n) * c.head_pad):
        rows.acc[i] = 0


cdef void _place(Rows* rows, const Plan* plan, float* scratch, int64_t at) noexcept nogil:
    """Where the rows are in a thread's scratch; their outputs are row `at` and those after it."""
    cdef const Cache* c = plan.cache
    rows.acc = scratch + at * c.head_pad
    rows.q = scratch + output_rows(plan) * c.head_pad
    rows.scores = rows.q + group_rows(plan) * c.head_dim
    rows.visible = <int32_t*>(rows.scores + group_rows(plan) * KV_TILE)
    rows.hidden = rows.visible + group_rows(plan)
    rows.top = <float*>(rows.hidden + group_rows(plan)) + at
    rows.total = rows.top + output_rows(plan)
    rows.n_parts = 0


cdef void _add_part(Rows* rows, const Plan* plan, int64_t block, int64_t span, int64_t first, int64_t last) noexcept nogil:
    """A block of queries, over the tiles that it sees from `first` to `last`: the plan's span of this number."""
    cdef Part* part = &rows.part[rows.n_parts]
    cdef const QueryBlock* queries = &plan.blocks[block]
    part.plan, part.block = plan, queries
    part.row = rows.part[rows.n_parts - 1].row + rows.part[rows.n_parts - 1].n if rows.n_parts else 0
    part.n = (queries.end - queries.start) * plan.group
    part.first = max(first, first_tile(plan.cache, rows.layer, plan.first + queries.start, queries.packed))
    part.last = min(last, tile_of(plan.cache, plan.first + queries.end - 1))
    part.at = ((span * plan.cache.n_kv_heads + rows.head) * plan.n + queries.start) * plan.group
    rows.n_parts += 1


cdef void _attend_rows(const Rows* rows) noexcept nogil:
    """What all rows gather from their tiles, and those that begin there from the sinks."""
    cdef int64_t p, tile, first = rows.part[0].first, last = rows.part[0].last
    cdef const Part* part
    for p in range(rows.n_parts):
        part = &rows.part[p]
        first, last = min(first, part.first), max(last, part.last)
        if part.at < part.plan.cache.n_kv_heads * part.plan.n * part.plan.group and part.plan.cache.n_sinks:
            _attend_sinks(rows, p)
    for tile in range(first, last + 1):
        _attend_everyone(rows, tile)


cdef void _attend_group(Rows* rows, const Items* items, const Group* group, const float* q, int64_t ld) noexcept nogil:
    """All members of a group over its span. q: of all items."""
    cdef int64_t m = group.first, p = 0, tiles = group.length
    cdef const Item* item
    cdef const Plan* plan
    while m >= 0:
        item = &items.item[items.members[m].item]
        plan = &item.plan
        _add_part(rows, plan, items.members[m].block, group.span - oldest_tile(plan, rows.layer) // tiles,
                  group.span * tiles, (group.span + 1) * tiles - 1)
        if p == 0 and _has(&rows.part[0], rows.part[0].first):
            kv_prefetch(_data(rows, 0, rows.part[0].first), tile_bytes(&plan.cache.layers[rows.layer]))
        _prepare(rows, p, q + item.row * ld, ld)
        m, p = items.members[m].next, p + 1
    _attend_rows(rows)


cdef void _attend_block(Rows* rows, const Item* item, int64_t unit, const float* q, int64_t ld) noexcept nogil:
    """A block of queries of a text that is read, over all tiles; the last blocks, which see most, first."""
    cdef const Plan* plan = &item.plan
    unit = plan.cache.n_kv_heads * plan.n_blocks - 1 - unit
    rows.head = unit % plan.cache.n_kv_heads
    _add_part(rows, plan, unit // plan.cache.n_kv_heads, 0, 0, plan.last_tile)
    _prepare(rows, 0, q + item.row * ld, ld)
    _attend_rows(rows)


cdef void _hand_over(const Rows* rows) noexcept nogil:
    """From a thread's own memory to where `combine` finds it."""
    cdef int64_t p, width
    cdef const Part* part
    for p in range(rows.n_parts):
        part = &rows.part[p]
        width = part.plan.cache.head_pad
        memcpy(part.plan.top + part.at, rows.top + part.row, part.n * sizeof(float))
        memcpy(part.plan.total + part.at, rows.total + part.row, part.n * sizeof(float))
        memcpy(part.plan.acc + part.at * width, rows.acc + part.row * width, part.n * width * sizeof(float))


cdef void attend_step(const Items* items, int64_t layer, const float* q, int64_t ld, kv_member* me) noexcept nogil:
    """A thread goes through neighbouring spans, so that memory is read in one go. q: [rows][n_heads * head_dim], before
    RoPE. Work items: each KV head and group of queries that go through a span together, then each KV head and block of
    queries of what is read."""
    cdef int64_t start[MAX_ITEMS + 1]
    cdef int64_t first = 0, end = 0, i, at, unit, most
    cdef const Plan* plan = &items.item[0].plan
    cdef const Groups* groups = &items.kinds[plan.cache.layers[layer].kind]
    cdef int64_t heads = plan.cache.n_kv_heads, grab = min(<int64_t>GRAB, output_rows(plan) // max(groups.rows, <int64_t>1))
    cdef float* scratch = items.scratch + me.thread * items.scratch_floats
    cdef Rows rows[GRAB]
    most = max(groups.rows, block_rows(plan))
    start[0] = heads * groups.n
    for i in range(items.n):
        plan = &items.item[i].plan
        start[i + 1] = start[i] + (0 if plan.split else heads * plan.n_blocks)
    if start[items.n] > start[0] or groups.rows > block_rows(plan):
        grab = 1
    while kv_team_repeat(me, start[items.n], grab, &first, &end):
        for unit in range(first, end):
            at = unit - first
            rows[at].layer = layer
            _place(&rows[at], plan, scratch, at * most)
            if unit < start[0]:
                rows[at].head = unit // groups.n
                _attend_group(&rows[at], items, &groups.group[unit % groups.n], q, ld)
            else:
                i = _find(start, items.n, unit)
                _attend_block(&rows[at], &items.item[i], unit - start[i], q, ld)
        if kv_team_commit(me):
            for i in range(end - first):
                _hand_over(&rows[i])


cdef void combine(const Plan* plan, int64_t layer, int64_t token, float* out) noexcept nogil:
    """Attention output of one token in a layer from its spans' partial softmax: out [n_heads * head_dim]."""
    cdef const Cache* c = plan.cache
    cdef int64_t h, span, at, i, spans = n_spans(plan, layer)
    cdef float top, total, weight
    cdef float* to
    for h in range(plan.n_heads):
        to = out + h * c.head_dim
        top, total = -INFINITY, 0
        for i in range(c.head_dim):
            to[i] = 0
        for span in range(spans):
            at = ((span * c.n_kv_heads + h // plan.group) * plan.n + token) * plan.group + h % plan.group
            top = max(top, plan.top[at])
        for span in range(spans):
            at = ((span * c.n_kv_heads + h // plan.group) * plan.n + token) * plan.group + h % plan.group
            if plan.total[at] == 0:
                continue
            weight = exp2f(plan.top[at] - top)
            total += weight * plan.total[at]
            for i in range(c.head_dim):
                to[i] += weight * plan.acc[at * c.head_pad + i]
        for i in range(c.head_dim):
            to[i] /= total
        if c.layers[layer].v.hadamard:
            plan.kern.hadamard(to, c.head_dim)
