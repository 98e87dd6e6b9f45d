"""The key/value cache: sinks, ring of tiles, window. ``kv.pxd`` has the layout and the addresses."""

import threading

from libc.stdlib cimport calloc, free

from .kernels cimport KV_FORMAT_F16, KV_FORMAT_F32, KV_TILE, kernels
from .kernels cimport KV_FORMATS as N_FORMATS


KV_FORMATS = {kernels().format[i].name.decode(): kernels().format[i].bits for i in range(N_FORMATS)}
"""Cache formats and their bits per cached value, scales included."""


cdef const kv_format* _format(name) except NULL:
    if name not in KV_FORMATS:
        raise ValueError(f"KV format {name!r} is not one of {', '.join(KV_FORMATS)}")
    return &kernels().format[list(KV_FORMATS).index(name)]


cdef int _lay_out(Cache* c, description, k, v, ctx, sinks, window) except -1:
    """Fills the geometry; the one place that says how much memory a cache takes."""
    if sinks < 0 or window < 0:
        raise ValueError(f"sinks and window cannot be negative: {sinks}, {window}")
    if ctx < sinks + window + KV_TILE:
        raise ValueError(f"a context of {ctx} is too small: sinks ({sinks}), window ({window}) and one tile "
                         f"({KV_TILE}) take {sinks + window + KV_TILE}")
    if ctx >= 1 << 32:
        raise ValueError(f"a context of {ctx} is out of range")
    c.k, c.v = _format(k), _format(v)
    c.wk = &kernels().format[KV_FORMAT_F32 if k == "f32" else KV_FORMAT_F16]
    c.wv = &kernels().format[KV_FORMAT_F32 if v == "f32" else KV_FORMAT_F16]
    c.n_layers, c.n_kv_heads, c.head_dim = description.n_layers, description.n_kv_heads, description.head_dim
    c.head_pad = (c.head_dim + 15) // 16 * 16
    c.n_sinks, c.window = sinks, window
    c.sink_lanes = (c.n_sinks + 15) // 16 * 16
    c.n_window_tiles = (window + 2 * KV_TILE - 1) // KV_TILE
    c.n_slots = (ctx - sinks - window + KV_TILE - 1) // KV_TILE
    c.k_bytes, c.v_bytes = c.k.k_bytes(c.head_dim), c.v.v_bytes(c.head_dim)
    c.window_k_bytes, c.window_v_bytes = c.wk.k_bytes(c.head_dim), c.wv.v_bytes(c.head_dim)
    c.sink_v = 4 * c.head_dim * c.sink_lanes
    c.windows = c.sink_v + 4 * c.n_sinks * c.head_pad
    c.ring = c.windows + c.n_window_tiles * (c.window_k_bytes + c.window_v_bytes)
    c.head_bytes = c.ring + c.n_slots * (c.k_bytes + c.v_bytes)
    return 0


def kv_bytes(description, k="f16", v="f16", ctx=2048, sinks=4, window=64):
    """Bytes that ``KVCache`` allocates for a model with these options, exactly.

    description: anything with n_layers, n_kv_heads and head_dim. Raises ValueError as KVCache does.
    """
    cdef Cache c
    _lay_out(&c, description, k, v, ctx, sinks, window)
    return int(c.head_bytes) * int(c.n_layers) * int(c.n_kv_heads)


cdef class KVCache:
    """One sequence's keys and values, in memory that is fixed from the start.

    engine: anything with a ``description``. k, v: formats of the ring's keys and values (``KV_FORMATS``).
    ctx: tokens that stay visible at least (the newest ctx - sinks, and the first `sinks`). window: newest tokens
    kept unquantised, at least. Raises ValueError for options that make no cache, MemoryError when it does not fit.
    """

    def __cinit__(self, engine, k="f16", v="f16", ctx=2048, sinks=4, window=64):
        _lay_out(&self.c, engine.description, k, v, ctx, sinks, window)
        self.k, self.v, self.ctx = k, v, ctx
        self.nbytes = kv_bytes(engine.description, k, v, ctx, sinks, window)
        self.lock = threading.Lock()
        self.memory = calloc(self.nbytes + 64, 1)  # untouched pages cost nothing until tokens reach them
        if self.memory == NULL:
            raise MemoryError(f"no memory for a KV cache of {self.nbytes} bytes")
        self.c.base = <uint8_t*>((<size_t>self.memory + 63) // 64 * 64)

    def __dealloc__(self):
        free(self.memory)

    @property
    def n_tokens(self):
        """Tokens that went in since the start, evicted ones included."""
        return self.c.n_tokens

    @property
    def n_sinks(self):
        return self.c.n_sinks

    @property
    def window(self):
        return self.c.window

    def reset(self):
        """Forgets every token."""
        with self.lock:
            self.c.n_tokens = 0
