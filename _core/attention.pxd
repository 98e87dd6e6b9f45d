from libc.stdint cimport int32_t, int64_t, uint8_t

from .cache cimport Cache
from .kernels cimport kv_kernels
from .team cimport kv_member

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
    int64_t n_heads, group                       # group: query heads of a KV head
    float scale                                  # of queries, times log2(e): the softmax is to the base 2
    float soft_cap                               # of scores, times log2(e); 0: none
    Ropes ropes
    QueryBlock* blocks
    float* cos                                   # [ropes.n][n][head_dim/2] of the new tokens
    float* sin
    float* sink_cos                              # [ropes.n][n_shifts + 1][n_sinks][head_dim/2], last: where they were
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

# Several sequences in one step. scratch: [threads][scratch_floats], as much as the plan that needs most.
ctypedef struct Items:
    Item* item                                   # [n]
    int64_t n
    float* scratch
    int64_t scratch_floats

# A chunk is planned by these three, in this order; then for each layer come append_step, attend_step, commit_step if
# commit_needed (steps of a team), and combine.
cdef void plan_chunk(Plan* p, const kv_kernels* kern, const Cache* c, const Ropes* ropes, int64_t first, int64_t n,
                     int64_t n_heads, float scale, float soft_cap, bint written) noexcept nogil
cdef int64_t plan_buffers(Plan* p, uint8_t* block) noexcept nogil
cdef void plan_queries(Plan* p) noexcept nogil
cdef bint commit_needed(const Items* items) noexcept nogil
cdef void append_step(const Items* items, int64_t layer, const float* k, const float* v, int64_t ld,
                      kv_member* me) noexcept nogil
cdef void attend_step(const Items* items, int64_t layer, const float* q, int64_t ld, kv_member* me) noexcept nogil
cdef void commit_step(const Items* items, int64_t layer, kv_member* me) noexcept nogil
cdef void combine(const Plan* plan, int64_t layer, int64_t token, float* out) noexcept nogil

cdef enum:
    MAX_ITEMS = 256                              # of a step
