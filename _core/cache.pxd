from libc.stdint cimport int64_t, uint8_t

from .kernels cimport KV_TILE, kv_format
from .pool cimport KVPool, TileRef

# A layer of a cache: its formats, and where its parts are. For each KV head, one after the other:
#   sink keys, before RoPE  float32 [head_dim][sink_lanes]
#   sink values             float32 [n_sinks][head_pad]
#   window                  n_window_tiles tiles of the window's formats; tile i is in slot i mod n_window_tiles
#   ring                    room for n_slots tiles of the chosen formats; tile i is in slot i mod n_slots
# Which memory a slot has says a reference: usually that place in the cache's own block, but a tile that several caches
# have is in one of theirs. Layers with rings of the same size, and all or none of them with a sliding window, have one
# reference for a slot of all.
# Tile i holds tokens n_sinks + 64 i to n_sinks + 64 i + 63. Everything starts on a 64-byte boundary.
#
# A layer with a sliding window has only the ring that its queries can see, which is exact at any length: a query at
# position p sees the tokens after p - sight, the first ones like any other.
ctypedef struct CacheLayer:
    int64_t kind                # number of the sliding window it was asked for among those of the model's layers
    int64_t sight               # newest tokens that a query sees, itself included; 0: all that the cache has left
    int64_t n_slots, ring_ref   # slots of its ring, and the first of their references
    int64_t start, head_bytes   # offset of its first head, and the size of each
    int64_t sink_v, windows, ring                           # offsets of the parts of a head
    int64_t k_bytes, v_bytes, window_k_bytes, window_v_bytes                # of a tile
    const kv_format* k                                      # of the ring
    const kv_format* v
    const kv_format* wk                                     # of the window
    const kv_format* wv


# What the layers of a cache have in common, and its memory.
ctypedef struct Cache:
    int64_t n_layers, n_kv_heads, head_dim, head_pad
    int64_t n_sinks, sink_lanes, window, n_window_tiles
    int64_t n_slots, min_slots, n_sliding                   # ring of a layer without sight; smallest ring; layers with
    int64_t n_tokens
    int64_t packed_ever                                     # tiles packed before a truncation, 0 if no ring lost any
    CacheLayer* layers
    uint8_t* base                                           # of its own block
    int64_t n_kinds
    int64_t n_rings, n_refs                                 # rings with references of their own, and those of all
    TileRef* tiles                                          # [n_refs]
    TileRef* after                                          # [n_refs] when the step at hand has packed its tiles


cdef inline int64_t tile_bytes(const CacheLayer* layer) noexcept nogil:
    """Bytes of a tile in the ring: its keys, then its values."""
    return layer.k_bytes + layer.v_bytes


cdef inline int64_t window_bytes(const CacheLayer* layer) noexcept nogil:
    """Bytes of a tile in the window."""
    return layer.window_k_bytes + layer.window_v_bytes


cdef inline uint8_t* head_at(const Cache* c, int64_t layer, int64_t head) noexcept nogil:
    return c.base + c.layers[layer].start + head * c.layers[layer].head_bytes


cdef inline float* sink_keys(const Cache* c, int64_t layer, int64_t head) noexcept nogil:
    return <float*>head_at(c, layer, head)


cdef inline float* sink_values(const Cache* c, int64_t layer, int64_t head) noexcept nogil:
    return <float*>(head_at(c, layer, head) + c.layers[layer].sink_v)


cdef inline uint8_t* window_tile(const Cache* c, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    """Keys of a window tile; its values follow window_k_bytes later."""
    cdef const CacheLayer* of = &c.layers[layer]
    return head_at(c, layer, head) + of.windows + tile % c.n_window_tiles * window_bytes(of)


cdef inline uint8_t* tile_in(const TileRef* tiles, const Cache* c, int64_t layer, int64_t head,
                             int64_t tile) noexcept nogil:
    """Keys of a ring tile, where the references lead; its values follow k_bytes later. Never called for a ring without
    slots."""
    cdef const CacheLayer* of = &c.layers[layer]
    cdef const TileRef* ref = &tiles[of.ring_ref + tile % of.n_slots]
    return ref.base + of.start + head * of.head_bytes + of.ring + ref.at * tile_bytes(of)


cdef inline uint8_t* ring_tile(const Cache* c, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    return tile_in(c.tiles, c, layer, head, tile)


cdef inline int64_t tile_of(const Cache* c, int64_t position) noexcept nogil:
    """The tile that holds a token, -1 for a sink."""
    return (position - c.n_sinks) // KV_TILE if position >= c.n_sinks else -1


cdef inline int64_t tiles_packed(const Cache* c, int64_t n_tokens) noexcept nogil:
    """Tiles that have left the window once n_tokens are in the cache: the window keeps [window, window + 64)."""
    cdef int64_t gathered = n_tokens - c.n_sinks - c.window
    return gathered // KV_TILE if gathered >= KV_TILE else 0


cdef inline int64_t tiles_evicted(const Cache* c, int64_t n_slots, int64_t n_packed) noexcept nogil:
    """Tiles that a ring of n_slots no longer has. More than n_packed when what truncation left is all in the window."""
    return max(max(n_packed, c.packed_ever) - n_slots, <int64_t>0)


cdef inline int64_t first_tile(const Cache* c, int64_t layer, int64_t position, int64_t n_packed) noexcept nogil:
    """The oldest tile that a query at this position sees."""
    if c.layers[layer].sight:
        return max(tile_of(c, position + 1 - c.layers[layer].sight), <int64_t>0)
    return tiles_evicted(c, c.n_slots, n_packed)


cdef class Snapshot:
    cdef readonly int64_t n_tokens, packed_ever
    cdef readonly object data


cdef class KVCache:
    cdef Cache c
    cdef readonly int64_t ctx, nbytes
    cdef readonly str k, v
    cdef readonly tuple sliding_windows
    cdef readonly object description
    cdef readonly KVPool pool
    cdef int64_t block                     # its own in the pool
    cdef object memory, lock               # of its own block
    cdef object pace                       # the engine's, for its steps with this cache
    cdef tuple late                        # calls in which late threads may still read it
    cdef int64_t huge                      # bytes from the start on that have been given huge pages
    cdef const int64_t[:, ::1] rings       # [n_rings, 4]: slots, the first reference, bytes of a tile,
                                           # whether its layers have a sliding window
    cdef bint reserved                     # whether c.after is another than c.tiles
    cdef int reserve(self, int64_t n) except -1
    cdef int unreserve(self) except -1
    cdef int append(self, int64_t n) except -1
    cdef int read_by(self, arena) except -1
    cdef int _settle(self) except -1
    cdef int _drop(self, TileRef* ref, int64_t ring) except -1
    cdef int hold(self, int64_t n_tokens, int64_t packed_ever, bint all_rings=*) except -1
    cdef int _lay_out_rings(self) except -1
    cdef int64_t _ring_of(self, int64_t ref) noexcept
    cdef int _give_back(self) except -1
    cdef int _own_run(self, int64_t ring, int64_t first, int64_t end) except -1
    cdef int _drop_unused(self) except -1
    cdef int64_t _own_bytes(self) noexcept
    cdef int _allocate(self) except -1
    cdef bint grown(self) except -1
    cdef int _all_huge(self, int64_t bytes) except -1
    cdef int64_t _evicted(self) noexcept
    cdef int _lay_out_layers(self) except -1
    cdef int _truncate(self, int64_t n) except -1
    cdef int _clear_unused(self) except -1
