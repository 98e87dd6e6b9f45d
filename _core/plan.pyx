"""How the attention of a step is shared out: query blocks, spans of tiles, and those that go through tiles together."""

from libc.math cimport M_LOG2E, cos, sin
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy, memset

from .cache cimport Cache, first_tile, tile_bytes, tile_of, tiles_evicted, tiles_packed, window_bytes
from .kernels cimport KV_TILE, kv_kernels
from .pool cimport TileRef

cdef enum:
    BLOCK_ROWS = 32       # rows (queries times heads) that share a tile while it is in the cache
    SPAN_LEAST = 4        # tiles of a span, once there are twice as many, that those of a short text keep threads busy,
    SPAN_MOST = 64        # or of 8, of 16 and so on up to so many,
    SPANS = 12            # while there would be this many spans or more; whatever the number of threads, which is not to
                          # change results
    WHOLE = 1 << 30       # a span that has all tiles


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
    p.block_tokens = BLOCK_ROWS // p.group if p.group < BLOCK_ROWS else 1
    p.n_spans = 1
    for layer in range(c.n_layers):
        p.n_spans = max(p.n_spans, n_spans(p, layer))
    p.max_tiles = p.last_tile - p.packed_before + 1
    # of a thread: a tile while it is packed; or outputs, and of one group rotated queries, scores, two counts
    p.scratch_floats = max(KV_TILE * c.head_pad,
                           output_rows(p) * (c.head_pad + 2) + group_rows(p) * (c.head_dim + KV_TILE + 2))
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
    p.sink_cos = <float*>_take(block, &used, 4 * p.ropes.n * (p.n_shifts + 1) * half * c.sink_lanes)
    p.sink_sin = <float*>_take(block, &used, 4 * p.ropes.n * (p.n_shifts + 1) * half * c.sink_lanes)
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
            _angles(p, rope, p.first + t, p.cos + (rope * p.n + t) * half, p.sin + (rope * p.n + t) * half, 1)
        for s in range(p.n_shifts + (c.n_sliding > 0)):
            shift = KV_TILE * (p.evicted_before + s) if s < p.n_shifts else 0
            t = (rope * (p.n_shifts + 1) + s) * half * c.sink_lanes
            memset(p.sink_cos + t, 0, half * c.sink_lanes * sizeof(float))
            memset(p.sink_sin + t, 0, half * c.sink_lanes * sizeof(float))
            for j in range(c.n_sinks):
                _angles(p, rope, j + shift, p.sink_cos + t + j, p.sink_sin + t + j, c.sink_lanes)


cdef void _angles(const Plan* p, int64_t rope, int64_t position, float* cosines, float* sines,
                  int64_t ld) noexcept nogil:
    """Of every pair of channels, ld floats apart."""
    cdef int64_t i, half = p.cache.head_dim // 2
    cdef double angle, amplitude
    for i in range(half):
        angle = position * p.ropes.inv_freq[rope * half + i]
        amplitude = p.ropes.amplitude[rope * half + i] if p.ropes.amplitude != NULL else 1
        cosines[i * ld] = <float>(amplitude * cos(angle))
        sines[i * ld] = <float>(amplitude * sin(angle))


# Spans --------------------------------------------------------------------------------------------------------------

cdef int64_t span_length(const Plan* plan, int64_t layer) noexcept nogil:
    """Tiles of a span. Spans begin at multiples of it: they are the same for texts of about the same length, whose common
    tiles can then be read together."""
    cdef int64_t tiles = plan.last_tile - oldest_tile(plan, layer) + 1, length = SPAN_LEAST
    if tiles < 2 * SPAN_LEAST:
        return WHOLE
    while tiles >= SPANS * length and length < SPAN_MOST:
        length *= 2
    return length


cdef int64_t n_spans(const Plan* plan, int64_t layer) noexcept nogil:
    """Spans that the tiles of a layer are split into: as its queries see, not as the cache has."""
    cdef int64_t first = oldest_tile(plan, layer), length
    if not plan.split:
        return 1
    length = span_length(plan, layer)
    return max(plan.last_tile, first) // length - first // length + 1


# Groups -------------------------------------------------------------------------------------------------------------

cdef int64_t items_buffers(Items* items, int64_t kinds, int64_t members, uint8_t* block) noexcept nogil:
    """Places the groups in a block on a 64-byte boundary, which needs as many bytes as are returned; NULL: only counts
    them. kinds: of layers. members: `most_members` of all items together."""
    cdef int64_t used = 0, kind
    cdef void* group
    items.kinds = <Groups*>_take(block, &used, kinds * sizeof(Groups))
    items.members = <Member*>_take(block, &used, kinds * members * sizeof(Member))
    for kind in range(kinds):
        group = _take(block, &used, members * sizeof(Group))
        if block != NULL:
            items.kinds[kind].group = <Group*>group
    return used


cdef void plan_groups(Items* items) noexcept nogil:
    """Which blocks of queries go through which spans together, in the layers of each kind."""
    cdef const Cache* c = items.item[0].plan.cache
    cdef int64_t kind, layer
    items.n_members = 0
    for kind in range(c.n_kinds):
        layer = 0
        while c.layers[layer].kind != kind:
            layer += 1
        items.kinds[kind].n = items.kinds[kind].rows = 0
        _group_layer(items, &items.kinds[kind], layer)


cdef void _group_layer(Items* items, Groups* groups, int64_t layer) noexcept nogil:
    cdef const Plan* plan
    cdef int64_t i, b, span, length, first, start
    for i in range(items.n):
        plan = &items.item[i].plan
        if not plan.split:
            continue
        length, first, start = span_length(plan, layer), oldest_tile(plan, layer), groups.n
        for span in range(first // length, first // length + n_spans(plan, layer)):
            for b in range(plan.n_blocks):
                _join(items, groups, 0 if plan.shares else start, layer, i, b, length, span)


cdef void _join(Items* items, Groups* groups, int64_t start, int64_t layer, int64_t i, int64_t b, int64_t length,
                int64_t span) noexcept nogil:
    """Puts a block into the group from `start` on that has the first tile which it sees of a span, or into a new one."""
    cdef const Plan* plan = &items.item[i].plan
    cdef const QueryBlock* block = &plan.blocks[b]
    cdef int64_t g = start, first = max(first_tile(plan.cache, layer, plan.first + block.start, block.packed), length * span)
    cdef int64_t rows = (block.end - block.start) * plan.group, last = tile_of(plan.cache, plan.first + block.end - 1)
    cdef const uint8_t* tile = NULL
    cdef Group* group
    if first <= min(last, length * (span + 1) - 1):
        tile = tile_at(plan, block, layer, 0, first)
    while g < groups.n:
        group = &groups.group[g]
        if (tile != NULL and group.tile == tile and group.span == span and group.length == length
                and group.rows + rows <= GROUP_ROWS and group.n < MAX_MEMBERS):
            items.members[group.last].next = <int32_t>items.n_members
            break
        g += 1
    group = &groups.group[g]
    if g == groups.n:
        groups.n += 1
        group.length, group.span, group.tile, group.n, group.rows = length, span, tile, 0, 0
        group.first = <int32_t>items.n_members
    group.last, group.n, group.rows = <int32_t>items.n_members, group.n + 1, group.rows + <int32_t>rows
    items.members[items.n_members].item, items.members[items.n_members].block = <int32_t>i, <int32_t>b
    items.members[items.n_members].next = -1
    items.n_members += 1
    groups.rows = max(groups.rows, <int64_t>group.rows)
