from libc.stdint cimport int32_t, int64_t, uint8_t

from .cache cimport Cache, first_tile, ring_tile, tile_bytes, tiles_packed, window_bytes, window_tile
from .kernels cimport kv_kernels
from .pool cimport TileRef

# The rotary embeddings that layers choose from: table t turns pair i of a head's channels, i and i + head_dim/2, by
# position * inv_freq[t][i] and multiplies it by amplitude[t][i]. A pair that does not turn has frequency 0.
ctypedef struct Ropes:
    int64_t n
    const double* inv_freq      # [n][head_dim/2]
    const double* amplitude     # [n][head_dim/2], or NULL: all 1
    const int64_t* of_layer     # [n_layers], or NULL: all 0

# Queries [start, end) of the chunk that see the same tiles.
ctypedef struct QueryBlock:
    int64_t start, end, packed

# What the attention of one chunk needs, for every layer.
ctypedef struct Plan:
    const kv_kernels* kern
    const Cache* cache                           # the one held, as it was before the chunk, with references of its own:
    Cache held                                   # threads that are late still look here when the cache has changed
    int64_t n, first, last_tile                  # new tokens, position of the first, tile of the last one
    int64_t packed_before, packed_after          # tiles packed when the chunk starts and when it is in
    int64_t evicted_before, n_shifts             # sinks are rotated for n_shifts numbers of evicted tiles
    int64_t n_blocks, block_tokens               # query blocks
    bint split                                   # whether tiles are split into spans
    int64_t n_spans                              # most spans of tiles that a layer's work is split into
    bint shares                                  # whether other caches may have tiles of this one
    int64_t n_heads, group                       # group: query heads of a KV head
    float scale                                  # of queries, times log2(e): the softmax is to the base 2
    float soft_cap                               # of scores, times log2(e); 0: none
    Ropes ropes
    QueryBlock* blocks
    float* cos                                   # [ropes.n][n][head_dim/2] of the new tokens
    float* sin
    float* sink_cos                              # [ropes.n][n_shifts + 1][head_dim/2][sink_lanes], last: where they were
    float* sink_sin
    float* sinks                                 # [n_kv_heads][n_shifts] rotated keys [head_dim][sink_lanes]
    uint8_t* staged_windows                      # [n_kv_heads] window tiles beyond the window, max_tiles each
    uint8_t* staged_tiles                        # [n_kv_heads] packed tiles not yet in the ring, max_tiles each
    int64_t max_tiles
    int64_t scratch_floats                       # that each thread needs of its own
    float* acc                                   # [n_spans][n_kv_heads][n][group][head_pad] partial outputs
    float* top                                   # the same without head_pad: running maximum
    float* total                                 # and sum of weights

# One sequence's part of a step: rows [row, row + plan.n) of all.
ctypedef struct Item:
    Plan plan
    int64_t row

# A query block of an item. Those that go through a span together are a list.
ctypedef struct Member:
    int32_t item, block
    int32_t next                                 # the next one in its group, or -1

# Query blocks of texts that are written, and the span of tiles which they go through together: those whose first tile there
# is in the same place. A tile that several sequences have is then read once for all.
ctypedef struct Group:
    int64_t length, span                         # tiles [length * span, length * (span + 1))
    int32_t first, last                          # members
    int32_t n, rows                              # how many, and their rows: queries times heads of a KV head
    const uint8_t* tile                          # of the first KV head

# The groups of the layers that have the same sliding window, or none.
ctypedef struct Groups:
    Group* group                                 # [n]
    int64_t n, rows                              # rows: of the largest

# Several sequences in one step. scratch: [threads][scratch_floats], as much as the plan that needs most.
ctypedef struct Items:
    Item* item                                   # [n]
    int64_t n
    float* scratch
    int64_t scratch_floats
    Groups* kinds                                # [n_kinds] for layers of each kind
    Member* members                              # [n_members] of all kinds
    int64_t n_members

cdef enum:
    MAX_ITEMS = 256       # of a step
    SPLIT_TOKENS = 16     # of a text that is written, longer chunks have enough queries to share out; in shorter ones
                          # tiles are split into spans
    MAX_MEMBERS = 32      # of a group,
    GROUP_ROWS = 24       # and rows, whose queries and sums a core keeps at hand: three times what a tile meets at once
    GRAB = 8              # groups that a thread takes at a time, at most

# A chunk is planned by the first three, in this order, and the items of a step by the others, once their plans are made.
cdef void plan_chunk(Plan* p, const kv_kernels* kern, const Cache* c, const Ropes* ropes, int64_t first, int64_t n,
                     int64_t n_heads, float scale, float soft_cap, bint written) noexcept nogil
cdef int64_t plan_buffers(Plan* p, uint8_t* block) noexcept nogil
cdef void plan_queries(Plan* p) noexcept nogil
cdef int64_t items_buffers(Items* items, int64_t kinds, int64_t members, uint8_t* block) noexcept nogil
cdef void plan_groups(Items* items) noexcept nogil
cdef int64_t span_length(const Plan* plan, int64_t layer) noexcept nogil
cdef int64_t n_spans(const Plan* plan, int64_t layer) noexcept nogil


cdef inline int64_t oldest_tile(const Plan* plan, int64_t layer) noexcept nogil:
    """The oldest tile that the chunk sees in a layer."""
    return first_tile(plan.cache, layer, plan.first, tiles_packed(plan.cache, plan.first + 1))


cdef inline int64_t rope_of(const Plan* plan, int64_t layer) noexcept nogil:
    """The number of a layer's rotary embedding."""
    return plan.ropes.of_layer[layer] if plan.ropes.of_layer != NULL else 0


cdef inline int64_t most_members(const Plan* plan) noexcept nogil:
    """Of groups, in the layers of one kind."""
    return plan.n_spans * plan.n if plan.split else 0


cdef inline int64_t block_rows(const Plan* plan) noexcept nogil:
    """Rows of a whole query block."""
    return plan.block_tokens * plan.group


cdef inline int64_t group_rows(const Plan* plan) noexcept nogil:
    """The most rows that go through a span together."""
    return max(block_rows(plan), <int64_t>GROUP_ROWS)


cdef inline int64_t output_rows(const Plan* plan) noexcept nogil:
    """Rows whose outputs a thread has room for."""
    return max(GRAB * block_rows(plan), group_rows(plan))


# Where a tile is while a chunk is under way -------------------------------------------------------------------------

cdef inline uint8_t* unpacked_tile(const Plan* plan, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    """Window tile, in the window or, when the chunk reaches beyond it, staged."""
    cdef const Cache* c = plan.cache
    cdef int64_t beyond = tile - plan.packed_before - c.n_window_tiles
    if beyond < 0:
        return window_tile(c, layer, head, tile)
    return plan.staged_windows + (head * plan.max_tiles + beyond) * window_bytes(&c.layers[layer])


cdef inline uint8_t* packed_tile(const Plan* plan, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    """Tile in the ring, or staged when this chunk packs it."""
    cdef const Cache* c = plan.cache
    cdef int64_t fresh = tile - plan.packed_before
    if fresh < 0:
        return ring_tile(c, layer, head, tile)
    return plan.staged_tiles + (head * plan.max_tiles + fresh) * tile_bytes(&c.layers[layer])


cdef inline const uint8_t* tile_at(const Plan* plan, const QueryBlock* block, int64_t layer, int64_t head,
                                   int64_t tile) noexcept nogil:
    """As the queries of a block see it: packed, or in the window."""
    if tile < block.packed:
        return packed_tile(plan, layer, head, tile)
    return unpacked_tile(plan, layer, head, tile)
