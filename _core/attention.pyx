"""Attention over the cache: append a chunk, attend with an online softmax over sinks, tiles and window, commit.

A query sees the cache as it would when decoding token by token, whatever chunk it comes in: tiles that are packed
on the way are staged beside the ring until every query of the chunk is done, since earlier ones still see the window's
copy of them, or the ring tile they will replace.
"""

from libc.math cimport INFINITY, M_LOG2E, cos, sin
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy

from .kernels cimport KV_FORMAT_F32, KV_TILE, kv_format, kv_prefetch
from .team cimport kv_member, kv_team_commit, kv_team_repeat, kv_team_take
from .cache cimport (CacheLayer, first_tile, ring_tile, sink_keys, sink_values, tile_bytes, tile_of, tiles_evicted,
                     tile_in, tiles_packed, window_bytes, window_tile)
from .pool cimport TileRef

cdef extern from "<math.h>" nogil:
    float exp2f(float)

cdef enum:
    BLOCK_ROWS = 32       # rows (queries times heads) that share a tile while it is in the cache
    SPLIT_TOKENS = 16     # of a text that is written, longer chunks have enough queries to share out; in shorter ones
                          # tiles are split into spans:
    GRAB = 8              # spans that a thread takes at a time, at most
    SPAN_LEAST = 4        # of at least so many tiles, that a few of a short text keep every thread busy,
    SPAN_MOST = 64        # and at most so many, once there are
    SPANS = 8             # so many spans; whatever the number of threads, which is not to change results


# Plan ---------------------------------------------------------------------------------------------------------------

cdef inline int64_t _queries_per_block(int64_t group) noexcept nogil:
    return BLOCK_ROWS // group if group < BLOCK_ROWS else 1


cdef inline int64_t _rows(int64_t group) noexcept nogil:
    return _queries_per_block(group) * group


cdef inline int64_t _first(const Plan* plan, int64_t layer) noexcept nogil:
    """The oldest tile that the chunk sees in a layer."""
    return first_tile(plan.cache, layer, plan.first, tiles_packed(plan.cache, plan.first + 1))


cdef inline int64_t _spans(const Plan* plan, int64_t layer) noexcept nogil:
    """Spans that the tiles of a layer are split into: as its queries see, not as the cache has."""
    cdef int64_t tiles = plan.last_tile - _first(plan, layer) + 1
    if not plan.split:
        return 1
    return max(max((tiles + SPAN_MOST - 1) // SPAN_MOST, <int64_t>1), min(tiles // SPAN_LEAST, <int64_t>SPANS))


cdef inline int64_t _rope(const Plan* plan, int64_t layer) noexcept nogil:
    """The number of a layer's rotary embedding."""
    return plan.ropes.of_layer[layer] if plan.ropes.of_layer != NULL else 0


cdef void plan_chunk(Plan* p, const kv_kernels* kern, const Cache* c, const Ropes* ropes, int64_t first, int64_t n,
                     int64_t n_heads, float scale, float soft_cap, bint written) noexcept nogil:
    """Counts what a chunk of n tokens from position `first` on needs; no buffer is placed. soft_cap: 0 for none.
    written: of a text that is being written. One that is read is not split into spans, whose sums round otherwise than
    one sum does, so that no result depends on the chunks it comes in."""
    cdef int64_t layer
    p.kern, p.held, p.ropes = kern, c[0], ropes[0]
    p.cache = &p.held
    p.soft_cap = <float>(soft_cap * M_LOG2E)
    p.split = written and n <= SPLIT_TOKENS
    p.n, p.first, p.last_tile = n, first, tile_of(c, first + n - 1)
    p.packed_before, p.packed_after = tiles_packed(c, first), tiles_packed(c, first + n)
    p.evicted_before = tiles_evicted(c, c.n_slots, tiles_packed(c, first + 1))
    p.n_shifts = tiles_evicted(c, c.n_slots, p.packed_after) - p.evicted_before + 1
    p.n_heads, p.group, p.scale = n_heads, n_heads // c.n_kv_heads, <float>(scale * M_LOG2E)
    p.block_tokens = _queries_per_block(p.group)
    p.n_spans = 1
    for layer in range(c.n_layers):
        p.n_spans = max(p.n_spans, _spans(p, layer))
    p.max_tiles = p.last_tile - p.packed_before + 1
    # of a thread: a tile while it is packed; or outputs, rotated queries, scores, two counts
    p.scratch_floats = max(KV_TILE * c.head_pad, _rows(p.group) * (GRAB * (c.head_pad + 2) + c.head_dim + KV_TILE + 2))
    p.scratch_floats = (p.scratch_floats + 15) // 16 * 16


cdef inline void* _take(uint8_t* block, int64_t* used, int64_t bytes) noexcept nogil:
    cdef int64_t at = used[0]
    used[0] += (bytes + 63) // 64 * 64
    return NULL if block == NULL else block + at


cdef int64_t plan_buffers(Plan* p, uint8_t* block) noexcept nogil:
    """Places the buffers in a block on a 64-byte boundary, which needs as many bytes as are returned; NULL: only
    counts them."""
    cdef const Cache* c = p.cache
    cdef int64_t used = 0, half = c.head_dim // 2, outputs = p.n_spans * p.n * p.n_heads, tile = 0, window = 0
    cdef TileRef* tiles = <TileRef*>_take(block, &used, c.n_refs * sizeof(TileRef))
    cdef TileRef* after = <TileRef*>_take(block, &used, c.n_refs * sizeof(TileRef))
    if block != NULL:
        memcpy(tiles, c.tiles, c.n_refs * sizeof(TileRef))
        memcpy(after, c.after, c.n_refs * sizeof(TileRef))
        p.held.tiles, p.held.after = tiles, after
    for i in range(c.n_layers):
        tile, window = max(tile, tile_bytes(&c.layers[i])), max(window, window_bytes(&c.layers[i]))
    p.blocks = <QueryBlock*>_take(block, &used, p.n * sizeof(QueryBlock))
    p.cos = <float*>_take(block, &used, 4 * p.ropes.n * p.n * half)
    p.sin = <float*>_take(block, &used, 4 * p.ropes.n * p.n * half)
    p.sink_cos = <float*>_take(block, &used, 4 * p.ropes.n * (p.n_shifts + 1) * c.n_sinks * half)
    p.sink_sin = <float*>_take(block, &used, 4 * p.ropes.n * (p.n_shifts + 1) * c.n_sinks * half)
    p.sinks = <float*>_take(block, &used, 4 * c.n_kv_heads * p.n_shifts * c.head_dim * c.sink_lanes)
    p.staged_windows = <uint8_t*>_take(block, &used, c.n_kv_heads * p.max_tiles * window)
    p.staged_tiles = <uint8_t*>_take(block, &used, c.n_kv_heads * p.max_tiles * tile)
    p.acc = <float*>_take(block, &used, 4 * outputs * c.head_pad)
    p.top = <float*>_take(block, &used, 4 * outputs)
    p.total = <float*>_take(block, &used, 4 * outputs)
    return used


cdef void plan_queries(Plan* p) noexcept nogil:
    """Query blocks, and the angles of the new tokens and of the sinks, in float64."""
    cdef const Cache* c = p.cache
    cdef int64_t t = 0, s, j, packed, shift, half = c.head_dim // 2, rope
    cdef QueryBlock* block
    p.n_blocks = 0
    while t < p.n:
        packed = tiles_packed(c, p.first + t + 1)
        block = &p.blocks[p.n_blocks]
        block.start, block.packed, block.end = t, packed, t + 1
        while (block.end < p.n and block.end - t < p.block_tokens
               and tiles_packed(c, p.first + block.end + 1) == packed):
            block.end += 1
        t = block.end
        p.n_blocks += 1
    for rope in range(p.ropes.n):
        for t in range(p.n):
            _angles(p, rope, p.first + t, half, p.cos + (rope * p.n + t) * half, p.sin + (rope * p.n + t) * half)
        for s in range(p.n_shifts + (c.n_sliding > 0)):
            shift = KV_TILE * (p.evicted_before + s) if s < p.n_shifts else 0
            for j in range(c.n_sinks):
                t = ((rope * (p.n_shifts + 1) + s) * c.n_sinks + j) * half
                _angles(p, rope, j + shift, half, p.sink_cos + t, p.sink_sin + t)


cdef void _angles(const Plan* p, int64_t rope, int64_t position, int64_t half, float* cosines,
                  float* sines) noexcept nogil:
    cdef int64_t i
    cdef double angle, amplitude
    for i in range(half):
        angle = position * p.ropes.inv_freq[rope * half + i]
        amplitude = p.ropes.amplitude[rope * half + i] if p.ropes.amplitude != NULL else 1
        cosines[i] = <float>(amplitude * cos(angle))
        sines[i] = <float>(amplitude * sin(angle))


# Where a tile is while a chunk is under way -------------------------------------------------------------------------

cdef inline uint8_t* _unpacked(const Plan* plan, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    """Window tile, in the window or, when the chunk reaches beyond it, staged."""
    cdef const Cache* c = plan.cache
    cdef int64_t beyond = tile - plan.packed_before - c.n_window_tiles
    if beyond < 0:
        return window_tile(c, layer, head, tile)
    return plan.staged_windows + (head * plan.max_tiles + beyond) * window_bytes(&c.layers[layer])


cdef inline uint8_t* _packed(const Plan* plan, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    """Tile in the ring, or staged when this chunk packs it."""
    cdef const Cache* c = plan.cache
    cdef int64_t fresh = tile - plan.packed_before
    if fresh < 0:
        return ring_tile(c, layer, head, tile)
    return plan.staged_tiles + (head * plan.max_tiles + fresh) * tile_bytes(&c.layers[layer])


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
            _rotate_sinks(plan, _rope(plan, added.layer), s, keys, out + s * set)
    elif plan.first - of.sight + 1 < c.n_sinks:
        _rotate_sinks(plan, _rope(plan, added.layer), plan.n_shifts, keys, out)


cdef void _rotate_sinks(const Plan* plan, int64_t rope, int64_t place, const float* keys, float* out) noexcept nogil:
    cdef const Cache* c = plan.cache
    cdef int64_t i, j, at, half = c.head_dim // 2, lanes = c.sink_lanes
    cdef float a, b
    for i in range(half):
        for j in range(min(c.n_sinks, plan.first + plan.n)):
            at = ((rope * (plan.n_shifts + 1) + place) * c.n_sinks + j) * half + i
            a, b = keys[i * lanes + j], keys[(i + half) * lanes + j]
            out[i * lanes + j] = a * plan.sink_cos[at] - b * plan.sink_sin[at]
            out[(i + half) * lanes + j] = b * plan.sink_cos[at] + a * plan.sink_sin[at]


cdef void _append_tile(const Added* added, int64_t head, int64_t tile, float* scratch) noexcept nogil:
    """Puts the chunk's tokens of one tile into its window copy; packs the tile if it leaves the window."""
    cdef const Plan* plan = added.plan
    cdef const Cache* c = plan.cache
    cdef const CacheLayer* of = &c.layers[added.layer]
    cdef int64_t start = c.n_sinks + tile * KV_TILE, half = c.head_dim // 2, position, t, at
    cdef int64_t angles = _rope(plan, added.layer) * plan.n * half
    cdef uint8_t* window = _unpacked(plan, added.layer, head, tile)
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
        packed = _packed(plan, added.layer, head, tile)
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
    cdef int64_t parts = 1 if plan.n <= SPLIT_TOKENS else plan.last_tile - plan.packed_before + 2
    return plan.cache.n_kv_heads * parts


cdef void _append_unit(const Added* added, int64_t unit, float* scratch) noexcept nogil:
    cdef const Plan* plan = added.plan
    cdef int64_t parts = plan.last_tile - plan.packed_before + 2, i
    cdef int64_t together = parts if plan.n <= SPLIT_TOKENS else 1
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
        memcpy(tile_in(c.after, c, layer, head, tile), _packed(plan, layer, head, tile), tile_bytes(of))
    for tile in range(max(plan.packed_after, plan.packed_before + c.n_window_tiles), plan.last_tile + 1):
        memcpy(window_tile(c, layer, head, tile), _unpacked(plan, layer, head, tile), window_bytes(of))


# Attend -------------------------------------------------------------------------------------------------------------

# One work item: the rows (queries of a block times heads of a group) of one KV head, over one span of tiles.
ctypedef struct Rows:
    const Plan* plan
    int64_t n, layer, head, sight
    const QueryBlock* block
    int64_t at                 # in the plan's outputs
    float* q                   # [n][head_dim], rotated and scaled
    float* scores              # [n][64]
    int32_t* visible           # [n] of the tile at hand, each row sees tokens [hidden, visible), none if visible <= 0
    int32_t* hidden            # [n] 0 without a sliding window
    float* top
    float* total
    float* acc                 # [n][head_pad]


cdef inline int64_t _see(Rows* rows, int64_t start, int64_t tokens) noexcept nogil:
    """Counts, for every row, what it sees of the tokens from position `start` on: those that are not in its future, nor
    before its sliding window. Returns how far the row that sees the most of them does."""
    cdef int64_t t, h, r = 0, seen, hidden, most = 0
    for t in range(rows.block.start, rows.block.end):
        seen = rows.plan.first + t + 1 - start
        hidden = max(seen - rows.sight, <int64_t>0) if rows.sight else 0
        seen = min(seen, tokens) if hidden < tokens else 0
        most = max(most, seen)
        for h in range(rows.plan.group):
            rows.visible[r] = <int32_t>seen
            rows.hidden[r] = <int32_t>min(hidden, tokens)
            r += 1
    return most


cdef inline void _fill_hidden(Rows* rows, float value) noexcept nogil:
    cdef int64_t r, i
    for r in range(rows.n):
        for i in range(rows.hidden[r]):
            rows.scores[r * KV_TILE + i] = value


cdef inline void _weigh(Rows* rows) noexcept nogil:
    """From scores to softmax weights: none for what a row does not see."""
    cdef const kv_kernels* kern = rows.plan.kern
    if rows.plan.soft_cap > 0:
        kern.soft_cap(rows.scores, rows.n * KV_TILE, rows.plan.soft_cap)
    if rows.sight:
        _fill_hidden(rows, -INFINITY)
    kern.softmax_step(rows.scores, rows.visible, rows.n, rows.plan.cache.head_pad, rows.top, rows.total, rows.acc)
    if rows.sight:
        _fill_hidden(rows, 0)  # their exponentials, 1e-38, have not changed the sum, which is at least 1


cdef void _attend_sinks(Rows* rows) noexcept nogil:
    cdef const Plan* plan = rows.plan
    cdef const Cache* c = plan.cache
    cdef const kv_format* f32 = &plan.kern.format[KV_FORMAT_F32]
    cdef int64_t place = 0, start = 0, lanes, tokens
    cdef const float* keys
    cdef const float* values = sink_values(c, rows.layer, rows.head)
    if not rows.sight:
        place = tiles_evicted(c, c.n_slots, rows.block.packed) - plan.evicted_before
    keys = plan.sinks + (rows.head * plan.n_shifts + place) * c.head_dim * c.sink_lanes
    while start < c.n_sinks:
        lanes, tokens = min(c.sink_lanes - start, <int64_t>KV_TILE), min(c.n_sinks - start, <int64_t>KV_TILE)
        tokens = _see(rows, start, tokens)  # beyond them lies what an earlier text left
        if tokens > 0:
            f32.k_dot(keys + start, c.sink_lanes, c.head_dim, rows.q, c.head_dim, rows.n, lanes, rows.scores)
            _weigh(rows)
            f32.v_accumulate(values + start * c.head_pad, c.head_dim, rows.scores, rows.n, tokens, rows.acc)
        start += KV_TILE


cdef inline const uint8_t* _tile_at(const Rows* rows, int64_t tile) noexcept nogil:
    if tile < rows.block.packed:
        return _packed(rows.plan, rows.layer, rows.head, tile)
    return _unpacked(rows.plan, rows.layer, rows.head, tile)


cdef void _attend_tile(Rows* rows, int64_t tile) noexcept nogil:
    cdef const Cache* c = rows.plan.cache
    cdef const CacheLayer* of = &c.layers[rows.layer]
    cdef bint packed = tile < rows.block.packed
    cdef const kv_format* k = of.k if packed else of.wk
    cdef const kv_format* v = of.v if packed else of.wv
    cdef int64_t start = c.n_sinks + tile * KV_TILE, k_bytes = of.k_bytes if packed else of.window_k_bytes, tokens
    cdef const uint8_t* data = _tile_at(rows, tile)
    tokens = _see(rows, start, KV_TILE)
    k.k_dot(data, KV_TILE, c.head_dim, rows.q, c.head_dim, rows.n, (tokens + 15) // 16 * 16, rows.scores)
    _weigh(rows)
    v.v_accumulate(data + k_bytes, c.head_dim, rows.scores, rows.n, tokens, rows.acc)


cdef void _prepare_rows(Rows* rows, const float* q, int64_t ld) noexcept nogil:
    """Rotates and scales the queries; starts the softmax."""
    cdef const Plan* plan = rows.plan
    cdef const Cache* c = plan.cache
    cdef int64_t r, t, i, half = c.head_dim // 2, at
    for r in range(rows.n):
        t = rows.block.start + r // plan.group
        at = (_rope(plan, rows.layer) * plan.n + t) * half
        plan.kern.rope(q + t * ld + (rows.head * plan.group + r % plan.group) * c.head_dim, plan.cos + at,
                       plan.sin + at, c.head_dim, plan.scale, rows.q + r * c.head_dim)
        rows.top[r] = -INFINITY
        rows.total[r] = 0
        for i in range(c.head_pad):
            rows.acc[r * c.head_pad + i] = 0


cdef Rows _rows_of(const Plan* plan, int64_t layer, int64_t head, int64_t block, int64_t span, float* scratch,
                   int64_t i) noexcept nogil:
    """The i-th of a grab: only its outputs have a place of their own."""
    cdef const Cache* c = plan.cache
    cdef Rows rows
    rows.plan, rows.layer, rows.head, rows.block = plan, layer, head, &plan.blocks[block]
    rows.sight = c.layers[layer].sight
    rows.n = (rows.block.end - rows.block.start) * plan.group
    rows.at = ((span * c.n_kv_heads + head) * plan.n + rows.block.start) * plan.group
    rows.acc = scratch + i * _rows(plan.group) * c.head_pad
    rows.q = scratch + GRAB * _rows(plan.group) * c.head_pad
    rows.scores = rows.q + _rows(plan.group) * c.head_dim
    rows.visible = <int32_t*>(rows.scores + _rows(plan.group) * KV_TILE)
    rows.hidden = rows.visible + _rows(plan.group)
    rows.top = <float*>(rows.hidden + _rows(plan.group)) + i * _rows(plan.group)
    rows.total = rows.top + GRAB * _rows(plan.group)
    return rows


cdef Rows _attend(const Plan* plan, int64_t layer, int64_t head, int64_t block, int64_t span, const float* q,
                  int64_t ld, float* scratch, int64_t i) noexcept nogil:
    """One work item, the i-th of a grab: what a block of queries gathers from a span of a head's tiles."""
    cdef const Cache* c = plan.cache
    cdef Rows rows = _rows_of(plan, layer, head, block, span, scratch, i)
    cdef int64_t tile, first, last, start = _first(plan, layer), spans = _spans(plan, layer)
    cdef int64_t tiles = plan.last_tile - start + 1
    first = first_tile(c, layer, plan.first + rows.block.start, rows.block.packed)
    last = tile_of(c, plan.first + rows.block.end - 1)
    first = max(first, start + span * tiles // spans)
    last = min(last, start + (span + 1) * tiles // spans - 1)
    if first <= last:
        kv_prefetch(_tile_at(&rows, first), tile_bytes(&c.layers[layer]))
    _prepare_rows(&rows, q, ld)
    if span == 0 and c.n_sinks:
        _attend_sinks(&rows)
    for tile in range(first, last + 1):
        _attend_tile(&rows, tile)
    return rows


cdef void _hand_over(const Plan* plan, const Rows* rows) noexcept nogil:
    """From a thread's own memory to where `combine` finds it."""
    memcpy(plan.top + rows.at, rows.top, rows.n * sizeof(float))
    memcpy(plan.total + rows.at, rows.total, rows.n * sizeof(float))
    memcpy(plan.acc + rows.at * plan.cache.head_pad, rows.acc, rows.n * plan.cache.head_pad * sizeof(float))


cdef inline int64_t _attended(const Plan* plan, int64_t layer) noexcept nogil:
    """Units of work of attention: each KV head, query block and span of tiles."""
    return plan.cache.n_kv_heads * plan.n_blocks * _spans(plan, layer)


cdef Rows _attend_unit(const Plan* plan, int64_t layer, int64_t unit, const float* q, int64_t ld, float* scratch,
                       int64_t i) noexcept nogil:
    cdef int64_t spans = _spans(plan, layer), blocks = plan.n_blocks, heads = plan.cache.n_kv_heads, rest
    if plan.split:
        rest = unit % (blocks * spans)
        return _attend(plan, layer, unit // (blocks * spans), rest // spans, rest % spans, q, ld, scratch, i)
    rest = heads * blocks - 1 - unit  # the last blocks see most: first
    return _attend(plan, layer, rest % heads, rest // heads, 0, q, ld, scratch, i)


cdef void attend_step(const Items* items, int64_t layer, const float* q, int64_t ld, kv_member* me) noexcept nogil:
    """A thread goes through neighbouring spans, so that memory is read in one go. q: [rows][n_heads * head_dim], before
    RoPE."""
    cdef int64_t start[MAX_ITEMS + 1]
    cdef int64_t first = 0, end = 0, i, unit, grab = GRAB
    cdef float* scratch = items.scratch + me.thread * items.scratch_floats
    cdef const Item* item
    cdef Rows rows[GRAB]
    start[0] = 0
    for i in range(items.n):
        start[i + 1] = start[i] + _attended(&items.item[i].plan, layer)
        if not items.item[i].plan.split:
            grab = 1
    while kv_team_repeat(me, start[items.n], grab, &first, &end):
        for unit in range(first, end):
            i = _find(start, items.n, unit)
            item = &items.item[i]
            rows[unit - first] = _attend_unit(&item.plan, layer, unit - start[i], q + item.row * ld, ld, scratch,
                                              unit - first)
        if kv_team_commit(me):
            for i in range(end - first):
                _hand_over(rows[i].plan, &rows[i])


cdef void combine(const Plan* plan, int64_t layer, int64_t token, float* out) noexcept nogil:
    """Attention output of one token in a layer from its spans' partial softmax: out [n_heads * head_dim]."""
    cdef const Cache* c = plan.cache
    cdef int64_t h, span, at, i, spans = _spans(plan, layer)
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
