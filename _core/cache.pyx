"""The key/value cache: sinks, ring of tiles, window. ``cache.pxd`` has the layout and the addresses.

What a cache holds follows from two numbers, the tokens and the tiles that were ever packed, and the geometry, so
truncating, copying, saving and loading move whole tiles and keep no records.
"""

import threading
from collections import Counter

from libc.stdint cimport int32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

cimport cython
import numpy as np

from .kernels cimport KV_FORMAT_F16, KV_FORMAT_F32, KV_MAX_HEAD_DIM, KV_TILE, kernels, kv_head_pad
from .kernels cimport KV_FORMATS as N_FORMATS
from .pool cimport KVPool, TileRef, references
from .memory import advise_huge, collapse, release, touch
from .pace import Pace


cdef enum:
    HUGE_PAGE = 2 << 20
    SMALL_HEAD = 2 * HUGE_PAGE
    HUGE_SHARE = 8           # once an eighth of a cache is in use all of it gets huge pages,
    HUGE_AT_ONCE = 8 << 20   # so many bytes after each call, some milliseconds' work


KV_FORMATS = {kernels().format[i].name.decode(): kernels().format[i].bits for i in range(N_FORMATS)}
"""Cache formats and their bits per cached value, scales included."""


cdef const kv_format* _format(name) except NULL:
    if name not in KV_FORMATS:
        raise ValueError(f"KV format {name!r} is not one of {', '.join(KV_FORMATS)}")
    return &kernels().format[list(KV_FORMATS).index(name)]


def sliding_windows(description):
    """Tokens that a query of each layer sees, itself included, 0 for all: a tuple of n_layers numbers.

    description: one without ``sliding_windows`` has no such layers. Raises ValueError for impossible ones.
    """
    windows = tuple(w or 0 for w in getattr(description, "sliding_windows", None) or (0,) * description.n_layers)
    if len(windows) != description.n_layers:
        raise ValueError(f"there are {len(windows)} sliding windows for {description.n_layers} layers")
    if windows and min(windows) < 0:
        raise ValueError(f"a sliding window cannot be negative: {min(windows)}")
    return windows


cdef int _lay_out(Cache* c, description, ctx, sinks, window) except -1:
    """Fills what the layers have in common."""
    if sinks < 0 or window < 0:
        raise ValueError(f"sinks and window cannot be negative: {sinks}, {window}")
    if ctx < sinks + window + KV_TILE:
        raise ValueError(f"a context of {ctx} is too small: sinks ({sinks}), window ({window}) and one tile "
                         f"({KV_TILE}) take {sinks + window + KV_TILE}")
    if not 1 <= description.head_dim <= KV_MAX_HEAD_DIM:
        raise ValueError(f"head_dim {description.head_dim} is not between 1 and {KV_MAX_HEAD_DIM}")
    if ctx >= 1 << 32:
        raise ValueError(f"a context of {ctx} is out of range")
    c.n_layers, c.n_kv_heads, c.head_dim = description.n_layers, description.n_kv_heads, description.head_dim
    c.head_pad = kv_head_pad(c.head_dim)
    c.n_sinks, c.window = sinks, window
    c.sink_lanes = (c.n_sinks + 15) // 16 * 16
    c.n_window_tiles = (window + 2 * KV_TILE - 1) // KV_TILE
    c.n_slots = (ctx - sinks - window + KV_TILE - 1) // KV_TILE
    return 0


cdef const kv_format* _in_window(const kv_format* ring) noexcept:
    """The format that a tile has before it is packed into one of the ring's."""
    cdef const kv_format* f32 = &kernels().format[KV_FORMAT_F32]
    return f32 if ring == f32 else &kernels().format[KV_FORMAT_F16]


cdef CacheLayer _lay_out_layer(const Cache* c, const kv_format* k, const kv_format* v, int64_t sight) noexcept:
    """A layer at offset 0. A sliding window that no token can reach beyond is none."""
    cdef CacheLayer layer
    cdef int64_t most = c.n_sinks + KV_TILE * c.n_slots + c.window + KV_TILE - 1   # tokens that such a layer shows
    layer.k, layer.v, layer.wk, layer.wv = k, v, _in_window(k), _in_window(v)
    layer.k_bytes, layer.v_bytes = layer.k.k_bytes(c.head_dim), layer.v.v_bytes(c.head_dim)
    layer.window_k_bytes, layer.window_v_bytes = layer.wk.k_bytes(c.head_dim), layer.wv.v_bytes(c.head_dim)
    layer.sink_v = 4 * c.head_dim * c.sink_lanes
    layer.windows = layer.sink_v + 4 * c.n_sinks * c.head_pad
    layer.ring = layer.windows + c.n_window_tiles * window_bytes(&layer)
    layer.start = 0
    layer.sight = sight if sight < most else 0
    layer.n_slots = c.n_slots
    if layer.sight:    # the oldest in sight are in the ring unless the window, which is no longer than this, has them
        layer.n_slots = (sight - c.window + KV_TILE - 1) // KV_TILE if sight > c.window else 0
    layer.head_bytes = layer.ring + layer.n_slots * tile_bytes(&layer)
    return layer


def kv_bytes(description, k="f16", v="f16", ctx=2048, sinks=4, window=64):
    """Bytes that ``KVCache`` allocates for a model with these options, exactly.

    description: anything with n_layers, n_kv_heads, head_dim and, if it has any, sliding_windows. Raises ValueError
    as KVCache does.
    """
    cdef Cache c
    cdef CacheLayer layer
    cdef const kv_format* keys
    cdef const kv_format* values
    _lay_out(&c, description, ctx, sinks, window)
    keys, values, total = _format(k), _format(v), 0
    for sight, n in Counter(min(w, MAX_TOKENS) for w in sliding_windows(description)).items():
        layer = _lay_out_layer(&c, keys, values, sight)
        total += n * int(c.n_kv_heads) * int(layer.head_bytes)
    return total


def bytes_held(caches):
    """Bytes of the sinks and windows of these ``KVCache``s, and of the tiles that any of them has, each once."""
    cdef KVCache kv
    cdef const TileRef* ref
    cdef int64_t ring, i
    cdef dict tiles = {}
    total = 0
    for kv in caches:
        total += int(kv.pool.own_bytes)
        for ring in range(kv.c.n_rings):
            for i in range(kv.rings[ring, 1], kv.rings[ring, 1] + kv.rings[ring, 0]):
                ref = &kv.c.tiles[i]
                if ref.base != NULL:
                    tiles[<size_t>ref.base, ring, ref.at] = int(kv.rings[ring, 2])
    return total + sum(tiles.values())


# Parts in use -------------------------------------------------------------------------------------------------------

cdef enum Direction:
    SAVE   # from the cache to a buffer
    LOAD   # from a buffer to the cache, where nobody else has the tiles
    COPY   # from the cache to the block of another one with the same options

cdef enum Share:
    WHOLE      # sinks and all tiles
    CHANGING   # the tiles that later tokens may replace or round
    OWN        # sinks and window

cdef int64_t MAX_TOKENS = <int64_t>1 << 60   # far from any overflow


# The tiles in use: [first, packed) in the ring, [packed, end) in the window.
ctypedef struct Tiles:
    int64_t first, packed, end


cdef Tiles _tiles_with(const Cache* c, int64_t n_slots) noexcept nogil:
    """With a ring of so many slots."""
    cdef Tiles t
    cdef int64_t packed = tiles_packed(c, c.n_tokens)
    t.first = tiles_evicted(c, n_slots, packed)
    t.packed = max(packed, t.first)
    t.end = tile_of(c, c.n_tokens - 1) + 1
    return t


cdef Tiles _tiles(const Cache* c, int64_t layer) noexcept nogil:
    return _tiles_with(c, c.layers[layer].n_slots)


cdef Tiles _tiles_of(const Cache* c, int64_t layer, Share share) noexcept nogil:
    """Of the tiles in use those of a share. A ring without sight keeps its tiles, another one replaces them."""
    cdef Tiles t = _tiles(c, layer)
    if share == OWN or (share == CHANGING and not c.layers[layer].sight):
        t.first = t.packed
    return t


cdef int64_t _state_bytes(const Cache* c, Share share) noexcept nogil:
    cdef Tiles t
    cdef const CacheLayer* of
    cdef int64_t layer, bytes = 0
    for layer in range(c.n_layers):
        t, of = _tiles_of(c, layer, share), &c.layers[layer]
        bytes += (t.packed - t.first) * tile_bytes(of) + (t.end - t.packed) * window_bytes(of)
        bytes += of.windows if share != CHANGING else 0
    return bytes * c.n_kv_heads


cdef bint _can_keep(const Cache* c, int64_t layer, int64_t n, int64_t evicted) noexcept nogil:
    """Whether a layer whose ring has lost so many tiles can go on after n tokens: one without a sliding window if any
    but the first are left, one with it if the next token will see all that it should, and the last one is there."""
    cdef int64_t left = c.n_sinks + KV_TILE * evicted, sight = c.layers[layer].sight
    if n <= c.n_sinks or not evicted:
        return True
    return max(min(n + 1 - sight, n - 1), c.n_sinks) >= left if sight else n > left


cdef bint _keeps_values(const CacheLayer* of) noexcept nogil:
    """Whether a tile that is packed and unpacked again has every value that it had in the window."""
    cdef const kv_format* f16 = &kernels().format[KV_FORMAT_F16]
    return (of.k == of.wk or of.k == f16) and (of.v == of.wv or of.v == f16)


cdef bint _is_as_it_was(const Cache* c, int64_t n) noexcept nogil:
    """Whether truncation to n tokens leaves what the next tokens see as it was when there were n: nothing of it has
    been rounded since, or has left a ring."""
    cdef int64_t layer, evicted, packed = tiles_packed(c, c.n_tokens), then = tiles_packed(c, n)
    # What was packed before a truncation tells what a ring had lost then, unless as much has been packed since.
    cdef int64_t lost = tiles_evicted(c, c.n_slots, then) if c.packed_ever > packed else max(then - c.n_slots, <int64_t>0)
    cdef bint unpacks = then < min(packed, tile_of(c, n - 1) + 1)
    for layer in range(c.n_layers):
        evicted = _tiles(c, layer).first
        if unpacks and not _keeps_values(&c.layers[layer]):
            return False
        if not _can_keep(c, layer, n, evicted):
            return False
        if not c.layers[layer].sight and evicted != lost:
            return False
    return True


cdef bint _sees_the_same_tiles(const Cache* c, int64_t position, int64_t later) noexcept nogil:
    """Whether tokens at two positions are in the same tile and see the same others, in every layer."""
    cdef int64_t layer, packed = tiles_packed(c, position + 1)
    if tile_of(c, position) != tile_of(c, later) or tiles_packed(c, later + 1) != packed:
        return False
    for layer in range(c.n_layers):
        if first_tile(c, layer, position, packed) != first_tile(c, layer, later, packed):
            return False
    return True


cdef bint _has_all(const Cache* c) noexcept nogil:
    """Whether every layer can go on from what it has."""
    cdef int64_t layer
    for layer in range(c.n_layers):
        if not _can_keep(c, layer, c.n_tokens, _tiles(c, layer).first):
            return False
    return True


cdef inline uint8_t* _move(const Cache* c, uint8_t* part, int64_t bytes, uint8_t* other,
                           Direction direction) noexcept nogil:
    """Moves one part; returns where the next one goes."""
    if direction == COPY:
        memcpy(other + (part - c.base), part, bytes)
        return other
    if direction == SAVE:
        memcpy(other, part, bytes)
    else:
        memcpy(part, other, bytes)
    return other + bytes


cdef void _move_parts(const Cache* c, uint8_t* other, Direction direction, Share share) noexcept nogil:
    """Moves what is in use: for each layer and head its sinks, ring tiles and window tiles, oldest first."""
    cdef int64_t layer, head, tile
    cdef Tiles t
    cdef const CacheLayer* of
    for layer in range(c.n_layers):
        t, of = _tiles_of(c, layer, share), &c.layers[layer]
        for head in range(c.n_kv_heads):
            if share != CHANGING:
                other = _move(c, head_at(c, layer, head), of.windows, other, direction)
            for tile in range(t.first, t.packed):
                other = _move(c, ring_tile(c, layer, head, tile), tile_bytes(of), other, direction)
            for tile in range(t.packed, t.end):
                other = _move(c, window_tile(c, layer, head, tile), window_bytes(of), other, direction)


cdef void _clear_gap(const Cache* c) noexcept nogil:
    """Zeros in window tiles that are lost but lie where the next tile to be packed is read from."""
    cdef int64_t layer, head, tile
    for layer in range(c.n_layers):
        for head in range(c.n_kv_heads):
            for tile in range(tiles_packed(c, c.n_tokens), _tiles(c, layer).first):
                memset(window_tile(c, layer, head, tile), 0, window_bytes(&c.layers[layer]))


cdef void _back_to_window(const Cache* c, int64_t layer, int64_t head, int64_t tile, float* scratch) noexcept nogil:
    """Unpacks a ring tile into the window. scratch: [64][head_pad]."""
    cdef const CacheLayer* of = &c.layers[layer]
    cdef const uint8_t* packed = ring_tile(c, layer, head, tile)
    cdef uint8_t* window = window_tile(c, layer, head, tile)
    of.k.unpack_k(packed, c.head_dim, scratch)
    of.wk.pack_k(scratch, c.head_dim, window)
    of.v.unpack_v(packed + of.k_bytes, c.head_dim, scratch)
    of.wv.pack_v(scratch, c.head_dim, window + of.window_k_bytes)


cdef dict _layer_geometry(const CacheLayer* of):
    cdef const kv_format* table = &kernels().format[0]
    return {
        "start": of.start, "head_bytes": of.head_bytes, "sight": of.sight, "n_slots": of.n_slots,
        "sink_v": of.sink_v, "windows": of.windows, "ring": of.ring, "k_bytes": of.k_bytes, "v_bytes": of.v_bytes,
        "window_k_bytes": of.window_k_bytes, "window_v_bytes": of.window_v_bytes, "k_format": of.k - table,
        "v_format": of.v - table, "wk_format": of.wk - table, "wv_format": of.wv - table,
    }


class Exclusive:
    """A lock for one user at a time: a second one does not wait but gets the error, an exception. To wait for a step
    would be to join in a text that another thread is changing, and in a signal handler never to return. Compiled, so
    that no Ctrl-C comes between taking it and letting it go, but in what is run meanwhile.
    """

    def __init__(self, error, message):
        self._lock, self._error, self._message = threading.Lock(), error, message

    def __enter__(self):
        if not self._lock.acquire(False):
            raise self._error(self._message)

    def __exit__(self, *_):
        self._lock.release()

    def run(self, function, *args, **options):
        """What the function returns, with the lock held."""
        with self:
            return function(*args, **options)


cdef inline bint _same(const TileRef* a, const TileRef* b) noexcept:
    return a.base == b.base and a.at == b.at


cdef class Snapshot:
    """What later tokens replace or round of a cache with `n_tokens`, for `KVCache.rewind`: the tiles of the window, and
    the rings of layers with a sliding window, as uint8 [n] `data`."""

    def __cinit__(self, n_tokens, packed_ever, data):
        self.n_tokens, self.packed_ever, self.data = n_tokens, packed_ever, data

    @property
    def nbytes(self):
        return len(self.data)


@cython.no_gc_clear
cdef class KVCache:
    """One sequence's keys and values, in memory that is fixed from the start. Its pages are taken as they are used.

    engine: anything with a ``description``. k, v: formats of the ring's keys and values (``KV_FORMATS``).
    ctx: tokens that stay visible at least (the newest ctx - sinks, and the first `sinks`). window: newest tokens
    kept unquantised, at least. A layer with a sliding window that ends before those has a ring for this window only.
    prefault: have all memory present from the start. pool: of caches with the same options, which it can have tiles in
    common with (see `copy`); None: one of its own. Raises ValueError for options that make no cache, or are not those of
    the pool, MemoryError when it does not fit into the memory there is, or the pool is full. Every method raises
    RuntimeError while another thread is in one.
    """

    def __cinit__(self, engine, k="f16", v="f16", ctx=2048, sinks=4, window=64, prefault=False, KVPool pool=None):
        self.block = -1
        self.pool = KVPool() if pool is None else pool
        _lay_out(&self.c, engine.description, ctx, sinks, window)
        self.k, self.v, self.ctx = k, v, ctx
        self.description = engine.description
        self.sliding_windows = sliding_windows(engine.description)
        size = kv_bytes(engine.description, k, v, ctx, sinks, window)
        if size >= 1 << 62:
            raise MemoryError(f"no memory for a KV cache of {size} bytes")
        self.nbytes = size
        self._lay_out_layers()
        self.lock = Exclusive(RuntimeError, "this cache is in use by another thread")
        self.pace, self.late = Pace(), ()
        self._allocate()
        if prefault:
            self._all_huge(self.nbytes)
            touch(self.memory)

    def __dealloc__(self):
        if self.block >= 0:
            self._settle()
            self.c.n_tokens = self.c.packed_ever = 0
            self._drop_unused()
            if self.pool.disown(self.block):
                self._give_back()
        free(self.c.layers)
        free(self.c.tiles)
        free(self.c.after)

    cdef int _allocate(self) except -1:
        """Small pages, so that a short text takes what it uses of every head and no more. Large heads, of which the
        first huge page would be the most that a short text needs, have huge ones from the second on."""
        cdef int64_t layer, head, at
        self.block = self.pool.own()
        self.memory = <object>self.pool.blocks[self.block].memory
        self.c.base = self.pool.blocks[self.block].base
        for layer in range(self.c.n_layers):
            if self.c.layers[layer].head_bytes <= SMALL_HEAD:
                continue
            for head in range(self.c.n_kv_heads):
                at = self.c.layers[layer].start + head * self.c.layers[layer].head_bytes
                advise_huge(self.memory, at + HUGE_PAGE, self.c.layers[layer].head_bytes - HUGE_PAGE)
        return 0

    cdef bint grown(self) except -1:
        """After tokens have come: huge pages, which hardware prefetches far into, once it pays. False if there are none
        to be made."""
        if self.huge >= self.nbytes or self._own_bytes() < self.nbytes // HUGE_SHARE:
            return False
        self._all_huge(HUGE_AT_ONCE)
        return True

    cdef int _all_huge(self, int64_t bytes) except -1:
        """For so many more bytes."""
        if self.huge == 0:
            advise_huge(self.memory)
        collapse(self.memory, self.huge, min(bytes, self.nbytes - self.huge))
        self.huge += bytes
        return 0

    cdef int _lay_out_layers(self) except -1:
        cdef Cache* c = &self.c
        cdef CacheLayer layer
        cdef const kv_format* k = _format(self.k)
        cdef const kv_format* v = _format(self.v)
        cdef int64_t i, at = 0
        c.layers = <CacheLayer*>calloc(max(c.n_layers, <int64_t>1), sizeof(CacheLayer))
        if c.layers == NULL:
            raise MemoryError
        c.min_slots = MAX_TOKENS
        kinds = list(dict.fromkeys(self.sliding_windows))
        c.n_kinds = len(kinds)
        for i in range(c.n_layers):
            layer = _lay_out_layer(c, k, v, min(self.sliding_windows[i], MAX_TOKENS))
            layer.start, layer.kind = at, kinds.index(self.sliding_windows[i])
            at += c.n_kv_heads * layer.head_bytes
            c.layers[i], c.min_slots = layer, min(c.min_slots, layer.n_slots)
            c.n_sliding += layer.sight > 0
        return self._lay_out_rings()

    cdef int _lay_out_rings(self) except -1:
        """One reference for a slot of all layers whose rings have as many of them, and are written alike."""
        cdef Cache* c = &self.c
        cdef CacheLayer* of
        cdef int64_t i, own = 0
        kinds = sorted({(int(c.layers[i].n_slots), c.layers[i].sight > 0) for i in range(c.n_layers)
                        if c.layers[i].n_slots})
        rings = np.zeros((len(kinds), 4), np.int64)
        for ring, (slots, sight) in zip(rings, kinds):
            ring[:] = slots, c.n_refs, 0, sight
            for i in range(c.n_layers):
                of = &c.layers[i]
                if (of.n_slots, of.sight > 0) == (slots, sight):
                    of.ring_ref = c.n_refs
                    ring[2] += c.n_kv_heads * tile_bytes(of)
            c.n_refs += slots
        for i in range(c.n_layers):
            own += c.n_kv_heads * c.layers[i].ring
        self.rings, c.n_rings = rings, len(kinds)
        c.tiles = <TileRef*>calloc(max(c.n_refs, <int64_t>1), sizeof(TileRef))
        c.after = <TileRef*>calloc(max(c.n_refs, <int64_t>1), sizeof(TileRef))
        if c.tiles == NULL or c.after == NULL:
            raise MemoryError
        return self.pool.open(self.nbytes, own, rings)

    # Tiles, of which others may have some ----------------------------------------------------------------------------

    cdef int reserve(self, int64_t n) except -1:
        """Before n more tokens: room for the tiles that they pack, as `c.after` says. `append` or `unreserve` follows.
        Raises MemoryError, with nothing changed. A tile that others have stays as it is, until `append` where it was."""
        cdef Cache* c = &self.c
        cdef int64_t packed = tiles_packed(c, c.n_tokens), end = tiles_packed(c, c.n_tokens + n), i, tile, slots, first
        cdef TileRef* ref
        if packed == end:
            return 0
        memcpy(c.after, c.tiles, c.n_refs * sizeof(TileRef))
        self.reserved = True
        try:
            for i in range(c.n_rings):
                slots, first = self.rings[i, 0], self.rings[i, 1]
                for tile in range(max(packed, end - slots), end):
                    ref = &c.after[first + tile % slots]
                    if ref.base == NULL or references(self.pool, ref, first)[0] > 1:
                        self.pool.acquire(self.block, first, slots, tile % slots, ref)
        except MemoryError:
            self.unreserve()
            raise
        return 0

    cdef int unreserve(self) except -1:
        """Gives back what `reserve` has taken."""
        cdef int64_t i
        for i in range(self.c.n_refs if self.reserved else 0):
            if not _same(&self.c.tiles[i], &self.c.after[i]):
                self._drop(&self.c.after[i], self._ring_of(i))
        self.reserved = False
        return 0

    cdef int append(self, int64_t n) except -1:
        """After a step in which n tokens have come."""
        cdef int64_t i
        self.c.n_tokens += n
        for i in range(self.c.n_refs if self.reserved else 0):
            if not _same(&self.c.tiles[i], &self.c.after[i]):
                self._drop(&self.c.tiles[i], self._ring_of(i))
                self.c.tiles[i] = self.c.after[i]
        self.reserved = False
        return 0

    cdef int read_by(self, arena) except -1:
        """Remembers a call in which late threads may be."""
        if self.late or arena.busy():
            self.late = tuple([call for call in {*self.late, arena} if call.busy()])
        return 0

    cdef int _settle(self) except -1:
        """Waits until no late thread reads it."""
        for call in self.late or ():
            call.settle()
        self.late = ()
        return 0

    cdef int _drop(self, TileRef* ref, int64_t ring) except -1:
        """Gives a tile back. Only its own block stays in any case, whatever late threads read."""
        if self.late and ref.base != NULL and ref.base != self.c.base:
            self._settle()
        self.pool.drop(ref, ring)
        return 0

    cdef int64_t _ring_of(self, int64_t ref) noexcept:
        """The first reference of the ring that one is of."""
        cdef int64_t i = self.c.n_rings - 1
        while self.rings[i, 1] > ref:
            i -= 1
        return self.rings[i, 1]

    cdef int hold(self, int64_t n_tokens, int64_t packed_ever, bint all_rings=True) except -1:
        """Has these numbers, and in every slot that is in use a tile that nobody else has, to be written: in all rings,
        or those of layers with a sliding window."""
        cdef Tiles t
        cdef int64_t ring
        self.c.n_tokens, self.c.packed_ever = n_tokens, packed_ever
        self._drop_unused()
        for ring in range(self.c.n_rings):
            if all_rings or self.rings[ring, 3]:
                t = _tiles_with(&self.c, self.rings[ring, 0])
                self._own_run(ring, t.first, t.packed)
        return 0

    cdef int _own_run(self, int64_t ring, int64_t first, int64_t end) except -1:
        """For tiles [first, end) of a ring."""
        cdef int64_t tile, slots = self.rings[ring, 0], start = self.rings[ring, 1]
        cdef TileRef* ref
        cdef TileRef fresh
        for tile in range(first, end):
            ref = &self.c.tiles[start + tile % slots]
            if ref.base == NULL or references(self.pool, ref, start)[0] > 1:
                self.pool.acquire(self.block, start, slots, tile % slots, &fresh)
                self._drop(ref, start)
                ref[0] = fresh
        return 0

    cdef int _drop_unused(self) except -1:
        """Gives back tiles in slots that are not in use."""
        cdef Tiles t
        cdef int64_t i, tile, slots
        for i in range(self.c.n_rings):
            slots = self.rings[i, 0]
            t = _tiles_with(&self.c, slots)
            for tile in range(t.packed, t.first + slots):
                self._drop(&self.c.tiles[self.rings[i, 1] + tile % slots], self.rings[i, 1])
        return 0

    cdef int64_t _own_bytes(self) noexcept:
        """Bytes in use of its own block, by this cache."""
        cdef int64_t ring, i, tiles, bytes = _state_bytes(&self.c, OWN)
        for ring in range(self.c.n_rings):
            tiles = 0
            for i in range(self.rings[ring, 1], self.rings[ring, 1] + self.rings[ring, 0]):
                tiles += self.c.tiles[i].base == self.c.base
            bytes += tiles * self.rings[ring, 2]
        return bytes

    cdef int _give_back(self) except -1:
        """The pages of its block that hold no tile of others, when it is gone."""
        cdef const Cache* c = &self.c
        cdef const CacheLayer* of
        cdef const int32_t* counts = self.pool.blocks[self.block].references
        cdef int64_t layer, head, at, slot, start, end
        for layer in range(c.n_layers):
            of = &c.layers[layer]
            for head in range(c.n_kv_heads):
                at, start, end = of.start + head * of.head_bytes, 0, of.ring
                for slot in range(of.n_slots):
                    if counts[of.ring_ref + slot]:
                        release(self.memory, at + start, end - start)
                        start = of.ring + (slot + 1) * tile_bytes(of)
                    end = of.ring + (slot + 1) * tile_bytes(of)
                release(self.memory, at + start, end - start)
        return 0

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

    @property
    def lost(self):
        """Tiles of 64 tokens after the sinks that the smallest ring no longer has; 0 while every layer has all."""
        return tiles_evicted(&self.c, self.c.min_slots, tiles_packed(&self.c, self.c.n_tokens))

    @property
    def outgrown(self):
        """True once there were more tokens than ctx has room for, so that a layer without a sliding window has lost
        some that it would show. What leaves a sliding window would not be seen any more in any case."""
        return self._evicted() > 0

    @property
    def packed_ever(self):
        """Tiles that were packed before a truncation, 0 if no ring has lost any."""
        return self.c.packed_ever

    @property
    def bytes(self):
        """uint8 [nbytes], writable: the memory, laid out as cache.pxd says."""
        return np.frombuffer(self.memory, np.uint8)[:self.nbytes]

    def geometry(self):
        """The layout for kernels that are not the core's: numbers of cache.pxd by name, formats as in enum
        kv_format_id, and `layers`, for each its start, head_bytes, sight, n_slots, offsets, sizes and formats. The last
        three are beside `layers`, too: the first layer's."""
        cdef const Cache* c = &self.c
        layers = [_layer_geometry(&c.layers[i]) for i in range(c.n_layers)]
        places = ("start", "head_bytes", "sight", "n_slots")
        return {
            "n_kv_heads": c.n_kv_heads, "head_dim": c.head_dim, "head_pad": c.head_pad, "n_sinks": c.n_sinks,
            "sink_lanes": c.sink_lanes, "window": c.window, "n_window_tiles": c.n_window_tiles, "n_slots": c.n_slots,
            "n_sliding": c.n_sliding, **{name: n for name, n in layers[0].items() if name not in places},
            "layers": layers,
        }

    def count(self, n_tokens, packed_ever):
        """Says what the cache holds when something else than the core has put it there: `n_tokens` and `packed_ever`
        are those afterwards. ValueError for numbers that no cache has."""
        if not (0 <= n_tokens <= MAX_TOKENS and 0 <= packed_ever <= MAX_TOKENS):
            raise ValueError(f"a cache cannot have {n_tokens} tokens, and {packed_ever} tiles packed before")
        with self.lock:
            self.hold(n_tokens, packed_ever)

    def parts(self, keep=None, changing=False):
        """int64 [m, 2]: offsets and sizes of what is in use, or of what `truncate(keep)` reads and writes, or with
        `changing` a snapshot; sinks and window always whole. Raises ValueError unless 0 <= keep <= n_tokens."""
        cdef const Cache* c = &self.c
        cdef const CacheLayer* of
        cdef int64_t layer, head, first, end, slot, run, bytes
        cdef Tiles t
        if keep is not None and not 0 <= keep <= c.n_tokens:
            raise ValueError(f"cannot keep {keep} tokens: the cache has {c.n_tokens}")
        parts = []
        for layer in range(c.n_layers):
            t, of = _tiles_of(c, layer, CHANGING if changing else WHOLE), &c.layers[layer]
            first, end, bytes = t.first, t.packed, tile_bytes(of)
            if keep is not None:
                first, end = max(first, tiles_packed(c, keep)), min(end, tile_of(c, keep - 1) + 1)
            for head in range(c.n_kv_heads):
                at = of.start + head * of.head_bytes
                parts.append((at, of.ring))
                slot = first % of.n_slots if first < end else 0
                run = min(end - first, of.n_slots - slot)
                if first < end:
                    parts.append((at + of.ring + slot * bytes, run * bytes))
                if first + run < end:
                    parts.append((at + of.ring, (end - first - run) * bytes))
        return np.array(parts, np.int64).reshape(-1, 2)

    def reset(self):
        """Forgets every token."""
        with self.lock:
            self.c.n_tokens = self.c.packed_ever = 0
            self._drop_unused()

    def truncate(self, n):
        """Keeps the first n tokens, 0 <= n <= n_tokens.

        Tiles that the window reaches back to are unpacked into it; what a format has rounded stays rounded, and
        rounds to the same again. Tokens that were evicted do not come back: the next ones see the sinks and what is
        left of the tiles since. Raises ValueError, with nothing changed, when nothing would be left of them, when a
        layer with a sliding window no longer has all that the next token would see there, or n is out of range.
        """
        with self.lock:
            if not 0 <= n <= self.c.n_tokens:
                raise ValueError(f"cannot keep {n} tokens: the cache has {self.c.n_tokens}")
            if n < self.c.n_tokens:
                self._truncate(n)

    cdef int _truncate(self, int64_t n) except -1:
        cdef Cache* c = &self.c
        cdef int64_t layer, head, tile, evicted, packed = tiles_packed(c, c.n_tokens)
        cdef float[::1] scratch
        for layer in range(c.n_layers):
            evicted = tiles_evicted(c, c.layers[layer].n_slots, packed)
            if not _can_keep(c, layer, n, evicted):
                sight = f", and a sliding window of {c.layers[layer].sight} needs some" if c.layers[layer].sight else ""
                raise ValueError(f"cannot keep {n} tokens: {KV_TILE * evicted} tokens after the first {c.n_sinks} have "
                                 f"left the cache{sight}")
        scratch = np.empty(KV_TILE * c.head_pad, np.float32)
        with nogil:
            for layer in range(c.n_layers):
                evicted = tiles_evicted(c, c.layers[layer].n_slots, packed)
                for head in range(c.n_kv_heads):
                    for tile in range(max(tiles_packed(c, n), evicted), min(packed, tile_of(c, n - 1) + 1)):
                        _back_to_window(c, layer, head, tile, &scratch[0])
        packed = max(packed, c.packed_ever)
        c.n_tokens, c.packed_ever = n, packed if n > c.n_sinks and packed > c.min_slots else 0
        self._drop_unused()
        _clear_gap(c)
        return 0

    def exact_from(self, more=0):
        """The fewest tokens that `rewind` comes back to without a snapshot when `more` have come, until tokens leave
        the cache: 0, or with a format that rounds or sliding windows those of when the last tile was packed."""
        cdef int64_t packed = tiles_packed(&self.c, self.c.n_tokens + <int64_t>more)
        if not self.c.n_layers or not (self.c.n_sliding or not _keeps_values(&self.c.layers[0])):
            return 0
        return self.c.n_sinks + self.c.window + KV_TILE * packed if packed else 0

    def verifiable(self, most):
        """How many of the next tokens, 1 to `most`, may be written in one step and all but the first be taken back: each
        then gets what it would alone, and `rewind` comes back to where any of them was the last. They are in one tile,
        and see the same tiles from the same first one on: only the first of them may have one packed."""
        cdef const Cache* c = &self.c
        cdef int64_t first = c.n_tokens, n = 1, limit = most
        with self.lock:
            while n < limit and _sees_the_same_tiles(c, first, first + n):
                n += 1
        return n

    def snapshot(self, most=MAX_TOKENS):
        """A `Snapshot` with which `rewind` comes back to where the cache is now; None if it takes more than `most`
        bytes. Raises MemoryError."""
        cdef uint8_t[::1] to
        with self.lock:
            if _state_bytes(&self.c, CHANGING) > most:
                return None
            data = np.empty(_state_bytes(&self.c, CHANGING), np.uint8)
            to = data
            if to.shape[0]:
                with nogil:
                    _move_parts(&self.c, &to[0], SAVE, CHANGING)
            return Snapshot(self.c.n_tokens, self.c.packed_ever, data)

    def rewind(self, n, Snapshot snapshot=None):
        """Goes back to n tokens, 0 <= n <= n_tokens, so that what follows is, to the bit, what would have followed
        then. Returns False, with nothing changed, where that cannot be: something has been rounded since or has left
        a ring.

        snapshot: of this cache, or one it was copied from, at n tokens or later, but before the next tile was packed;
        it has what was rounded, and what has left the rings of layers with a sliding window. Raises ValueError for n
        out of range or the snapshot of another cache.
        """
        cdef Cache* c = &self.c
        cdef Cache then
        cdef const uint8_t[::1] data
        with self.lock:
            if not 0 <= n <= c.n_tokens:
                raise ValueError(f"cannot go back to {n} tokens: the cache has {c.n_tokens}")
            if n == c.n_tokens:
                return True
            if _is_as_it_was(c, n):
                self._truncate(n)
                return True
            if snapshot is None or not n <= snapshot.n_tokens:
                return False
            then = c[0]
            then.n_tokens, then.packed_ever, data = snapshot.n_tokens, snapshot.packed_ever, snapshot.data
            if data.shape[0] != _state_bytes(&then, CHANGING):
                raise ValueError(f"a snapshot of {snapshot.n_tokens} tokens in another cache")
            if (tiles_packed(c, n) != tiles_packed(c, then.n_tokens)
                    or self._evicted() != tiles_evicted(&then, c.n_slots, tiles_packed(c, n))):
                return False
            if not _is_as_it_was(&then, n):  # made after a truncation, of rings that had lost what n tokens see
                return False
            self.hold(then.n_tokens, then.packed_ever, False)
            if data.shape[0]:
                with nogil:
                    _move_parts(c, <uint8_t*>&data[0], LOAD, CHANGING)
            c.n_tokens = n
            _clear_gap(c)
            return True

    cdef int64_t _evicted(self) noexcept:
        """Tiles that a layer without a sliding window has lost."""
        return tiles_evicted(&self.c, self.c.n_slots, tiles_packed(&self.c, self.c.n_tokens))

    def copy(self):
        """Another cache with the same options and tokens, in the same pool. The tiles of the rings, which do not change
        any more, are both's; each has a window of its own. Raises MemoryError."""
        cdef KVCache other
        cdef Tiles t
        cdef int64_t i, tile, slots, first
        with self.lock:
            other = KVCache(self, self.k, self.v, self.ctx, self.c.n_sinks, self.c.window, False, self.pool)
            other.c.n_tokens, other.c.packed_ever = self.c.n_tokens, self.c.packed_ever
            for i in range(self.c.n_rings):
                slots, first = self.rings[i, 0], self.rings[i, 1]
                t = _tiles_with(&self.c, slots)
                for tile in range(t.first, t.packed):
                    other.c.tiles[first + tile % slots] = self.c.tiles[first + tile % slots]
                    references(self.pool, &self.c.tiles[first + tile % slots], first)[0] += 1
            with nogil:
                _move_parts(&self.c, other.c.base, COPY, OWN)
        return other

    def state(self):
        """uint8 [n]: the sinks and tiles in use, in a fixed order. With `n_tokens` and `lost` it is all that
        `load_state` needs; room that no token has reached is zero in it."""
        cdef uint8_t[::1] to
        with self.lock:
            self._clear_unused()
            state = np.empty(_state_bytes(&self.c, WHOLE), np.uint8)
            to = state
            if to.shape[0]:
                with nogil:
                    _move_parts(&self.c, &to[0], SAVE, WHOLE)
        return state

    def load_state(self, n_tokens, lost, state):
        """Replaces what is in the cache by what `state` returned from one of the same model and options.

        Raises ValueError, with nothing changed, for numbers that no cache has or a state of another size.
        """
        cdef const uint8_t[::1] data = np.ascontiguousarray(state, np.uint8)
        cdef Cache c = self.c
        if not 0 <= n_tokens <= MAX_TOKENS:
            raise ValueError(f"a cache cannot have {n_tokens} tokens")
        c.n_tokens, c.packed_ever = n_tokens, c.min_slots + lost if 0 < lost <= n_tokens // KV_TILE else 0
        if not 0 <= lost <= n_tokens // KV_TILE or not _has_all(&c):
            raise ValueError(f"of {n_tokens} tokens a cache cannot have lost {lost} tiles of {KV_TILE}")
        if data.shape[0] != _state_bytes(&c, WHOLE):
            raise ValueError(f"the state has {data.shape[0]} bytes; that of {n_tokens} tokens in this cache has "
                             f"{_state_bytes(&c, WHOLE)}")
        with self.lock:
            self.hold(c.n_tokens, c.packed_ever)
            if data.shape[0]:
                with nogil:
                    _move_parts(&self.c, <uint8_t*>&data[0], LOAD, WHOLE)
            _clear_gap(&self.c)

    cdef int _clear_unused(self) except -1:
        """Zeros in lanes that no token has reached: what an earlier text left there is nobody's business."""
        cdef Cache* c = &self.c
        cdef const CacheLayer* of
        cdef int64_t layer, head, lane, i, tile = tile_of(c, c.n_tokens - 1), used = min(c.n_tokens, c.n_sinks)
        cdef int64_t filled = KV_TILE
        cdef float* keys
        cdef uint8_t* window
        cdef const float[::1] zeros = np.zeros(c.head_dim, np.float32)
        if tile >= tiles_packed(c, c.n_tokens):
            filled = c.n_tokens - c.n_sinks - tile * KV_TILE
        for layer in range(c.n_layers):
            of = &c.layers[layer]
            for head in range(c.n_kv_heads):
                keys = sink_keys(c, layer, head)
                for i in range(c.head_dim):
                    memset(keys + i * c.sink_lanes + used, 0, (c.sink_lanes - used) * sizeof(float))
                memset(sink_values(c, layer, head) + used * c.head_pad, 0,
                       (c.n_sinks - used) * c.head_pad * sizeof(float))
                window = window_tile(c, layer, head, max(tile, <int64_t>0))
                for lane in range(filled, KV_TILE):
                    of.wk.put_k(window, c.head_dim, lane, &zeros[0])
                    of.wv.put_v(window + of.window_k_bytes, c.head_dim, lane, &zeros[0])
        return 0
