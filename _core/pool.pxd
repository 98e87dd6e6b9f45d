from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t

# Where a tile is: in a block, at a number of its ring there. base is the block's, NULL: nowhere.
ctypedef struct TileRef:
    uint8_t* base
    int32_t block, at


# Memory with room for one cache: its own part, and the tiles of its rings, which other caches may refer to.
ctypedef struct Block:
    uint8_t* base               # NULL: gone
    PyObject* memory            # that base is of; no list has it, which a garbage collector might empty
    int32_t* references         # [n_tiles] caches that have each tile, one ring after the other
    int64_t used                # tiles that have any
    bint owned                  # whether a cache has its own part there


cdef class KVPool:
    cdef readonly object most
    cdef readonly int64_t n_caches          # that are in it
    cdef Block* blocks
    cdef int64_t n_blocks, n_tiles          # and the tiles of a block
    cdef int64_t block_bytes, own_bytes     # of a block, and of its cache's own part
    cdef object rings                       # int64 [n_rings, 3]: tiles in a block, the first of them, bytes of one

    cdef int open(self, int64_t block_bytes, int64_t own_bytes, rings) except -1
    cdef int64_t own(self) except -1
    cdef bint disown(self, int64_t block) noexcept
    cdef bint _left(self, int64_t block) noexcept
    cdef int64_t _new_block(self) except -1
    cdef bint _take(self, int64_t block, int64_t ring, int64_t at, TileRef* ref) noexcept
    cdef int acquire(self, int64_t block, int64_t ring, int64_t slots, int64_t at, TileRef* ref) except -1
    cdef void drop(self, TileRef* ref, int64_t ring) noexcept


cdef inline int32_t* references(KVPool pool, const TileRef* ref, int64_t ring) noexcept:
    """How many caches have a tile; ring: the first of its ring in a block."""
    return &pool.blocks[ref.block].references[ring + ref.at]
