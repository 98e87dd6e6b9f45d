from libc.stdint cimport int64_t, uint8_t

from .kernels cimport KV_TILE, kv_format

# Geometry and memory of one cache. For each layer and KV head, one after the other:
#   sink keys, before RoPE  float32 [head_dim][sink_lanes]
#   sink values             float32 [n_sinks][head_pad]
#   window                  n_window_tiles tiles of the window's format; tile i is in slot i mod n_window_tiles
#   ring                    n_slots tiles of the chosen formats; tile i is in slot i mod n_slots
# Tile i holds tokens n_sinks + 64 i to n_sinks + 64 i + 63. Everything starts on a 64-byte boundary.
ctypedef struct Cache:
    int64_t n_layers, n_kv_heads, head_dim, head_pad
    int64_t n_sinks, sink_lanes, window, n_window_tiles, n_slots
    int64_t sink_v, windows, ring, head_bytes               # offsets of the parts of a head, and its size
    int64_t k_bytes, v_bytes, window_k_bytes, window_v_bytes
    int64_t n_tokens
    int64_t lost                                            # tiles below it are gone, whatever room the ring has
    const kv_format* k
    const kv_format* v
    const kv_format* wk                                      # formats of the window
    const kv_format* wv
    uint8_t* base


cdef inline uint8_t* head_at(const Cache* c, int64_t layer, int64_t head) noexcept nogil:
    return c.base + (layer * c.n_kv_heads + head) * c.head_bytes


cdef inline float* sink_keys(const Cache* c, int64_t layer, int64_t head) noexcept nogil:
    return <float*>head_at(c, layer, head)


cdef inline float* sink_values(const Cache* c, int64_t layer, int64_t head) noexcept nogil:
    return <float*>(head_at(c, layer, head) + c.sink_v)


cdef inline uint8_t* window_tile(const Cache* c, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    """Keys of a window tile; its values follow window_k_bytes later."""
    return head_at(c, layer, head) + c.windows + tile % c.n_window_tiles * (c.window_k_bytes + c.window_v_bytes)


cdef inline uint8_t* ring_tile(const Cache* c, int64_t layer, int64_t head, int64_t tile) noexcept nogil:
    """Keys of a ring tile; its values follow k_bytes later."""
    return head_at(c, layer, head) + c.ring + tile % c.n_slots * (c.k_bytes + c.v_bytes)


cdef inline int64_t tile_of(const Cache* c, int64_t position) noexcept nogil:
    """The tile that holds a token, -1 for a sink."""
    return (position - c.n_sinks) // KV_TILE if position >= c.n_sinks else -1


cdef inline int64_t tiles_packed(const Cache* c, int64_t n_tokens) noexcept nogil:
    """Tiles that have left the window once n_tokens are in the cache: the window keeps [window, window + 64)."""
    cdef int64_t gathered = n_tokens - c.n_sinks - c.window
    return gathered // KV_TILE if gathered >= KV_TILE else 0


cdef inline int64_t tiles_evicted(const Cache* c, int64_t n_packed) noexcept nogil:
    """Tiles that can no longer be seen. More than n_packed when what truncation left is all in the window."""
    return max(n_packed - c.n_slots, c.lost)


cdef class KVCache:
    cdef Cache c
    cdef void* memory
    cdef readonly int64_t ctx, nbytes
    cdef readonly str k, v
    cdef readonly object description
    cdef object lock, buffers      # buffers: the engine's, for its calls with this cache
    cdef int _truncate(self, int64_t n) except -1
    cdef int _clear_unused(self) except -1
