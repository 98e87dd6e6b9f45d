"""Memory that caches share: tiles with reference counts.

A tile is written once, so texts with a common beginning can have the same one. A pool has a block for each of its caches,
large enough for all that the cache can ever have, so that none runs out of memory in the middle of a text. A cache has its
sinks and window in its own block, and its tiles there too, but those that it has in common with others, of which it knows
where they are. A block whose cache is gone stays as long as others have tiles in it, and is the next cache's.

Counts change with the GIL held, and never while Python code could run in between.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport calloc, free, realloc

cimport cython

from .memory import anonymous


@cython.no_gc_clear
cdef class KVPool:
    """Memory for key/value caches of the same options, which are given to each ``KVCache`` in it.

    most: caches that it has room for at a time; None: as many as the system has memory for. It takes no memory itself.
    Raises ValueError unless `most` is None or a positive number.
    """

    def __cinit__(self, most=None):
        if most is not None and most < 1:
            raise ValueError(f"a pool has room for one cache at least, not {most}")
        self.most = most

    def __dealloc__(self):
        cdef int64_t i
        for i in range(self.n_blocks):
            if self.blocks[i].base != NULL:
                free(self.blocks[i].references)
                Py_DECREF(<object>self.blocks[i].memory)
        free(self.blocks)

    @property
    def nbytes(self):
        """Bytes of its blocks, whose pages take memory as they are used: room for every cache in it, and for those that
        have left tiles to others."""
        cdef int64_t i
        return self.block_bytes * sum([1 for i in range(self.n_blocks) if self.blocks[i].base != NULL])

    @property
    def bytes_in_use(self):
        """Bytes of the caches' sinks and windows, and of the tiles that any of them has, each once."""
        cdef int64_t i, j, slots, first, size, tiles, total = self.own_bytes * self.n_caches
        for i in range(self.n_blocks):
            for slots, first, size, _ in self.rings if self.blocks[i].base != NULL else ():
                tiles = 0
                for j in range(first, first + slots):
                    tiles += self.blocks[i].references[j] > 0
                total += tiles * size
        return int(total)

    cdef int open(self, int64_t block_bytes, int64_t own_bytes, rings) except -1:
        """For caches of this size and these rings. ValueError if it has others."""
        if self.rings is not None and (self.block_bytes, self.rings.tolist()) != (block_bytes, rings.tolist()):
            raise ValueError("this pool has caches of other options")
        self.block_bytes, self.own_bytes, self.rings = block_bytes, own_bytes, rings
        self.n_tiles = rings[:, 0].sum()
        return 0

    cdef int64_t own(self) except -1:
        """A block for a cache. MemoryError if there is none left, or no memory for one."""
        cdef int64_t i
        if self.most is not None and self.n_caches >= self.most:
            raise MemoryError(f"the pool has room for {self.most} caches, and as many are in it")
        for i in range(self.n_blocks):
            if self.blocks[i].base != NULL and not self.blocks[i].owned:
                break
        else:
            i = self._new_block()
        self.blocks[i].owned = True
        self.n_caches += 1
        return i

    cdef int64_t _new_block(self) except -1:
        cdef int64_t i = 0
        cdef Block* blocks
        cdef Block new
        cdef uint8_t[::1] bytes
        memory = anonymous(max(self.block_bytes, <int64_t>1))
        bytes = memory
        new.base, new.memory, new.used, new.owned = &bytes[0], <PyObject*>memory, 0, False
        new.references = <int32_t*>calloc(max(self.n_tiles, <int64_t>1), sizeof(int32_t))
        while i < self.n_blocks and self.blocks[i].base != NULL:
            i += 1
        if i == self.n_blocks:
            blocks = <Block*>realloc(self.blocks, (i + 1) * sizeof(Block))
            if blocks != NULL:
                blocks[i].base = NULL
                self.blocks, self.n_blocks = blocks, i + 1
        if i == self.n_blocks or new.references == NULL:
            free(new.references)
            raise MemoryError
        Py_INCREF(memory)
        self.blocks[i] = new
        return i

    cdef bint disown(self, int64_t block) noexcept:
        """A cache leaves its block, whose tiles others may still have. Whether they do."""
        self.blocks[block].owned = False
        self.n_caches -= 1
        return not self._left(block)

    cdef bint _left(self, int64_t block) noexcept:
        """Frees a block that nobody uses any more; whether it is one."""
        cdef Block* of = &self.blocks[block]
        cdef PyObject* memory = of.memory
        if of.owned or of.used:
            return False
        free(of.references)
        of.base = NULL
        Py_DECREF(<object>memory)
        return True

    cdef int acquire(self, int64_t block, int64_t ring, int64_t slots, int64_t at, TileRef* ref) except -1:
        """Room for a tile of a cache, in its own block at the given place if nobody has it, or else anywhere. ring: the
        first of its ring's `slots` tiles in a block.

        As many blocks as caches have room for all that each can have. But a tile is given back after the step that
        replaces it, and when every ring is full, and several caches replace one that they have in common at the same
        time, there may be none: then there is a block more, or MemoryError."""
        cdef int64_t i, j, other
        if self._take(block, ring, at, ref):
            return 0
        for i in range(self.n_blocks):
            other = (block + i) % self.n_blocks
            for j in range(slots if self.blocks[other].base != NULL else 0):
                if self._take(other, ring, j, ref):
                    return 0
        self._take(self._new_block(), ring, at, ref)
        return 0

    cdef bint _take(self, int64_t block, int64_t ring, int64_t at, TileRef* ref) noexcept:
        cdef Block* of = &self.blocks[block]
        if of.references[ring + at]:
            return False
        of.references[ring + at] = 1
        of.used += 1
        ref.base, ref.block, ref.at = of.base, <int32_t>block, <int32_t>at
        return True

    cdef void drop(self, TileRef* ref, int64_t ring) noexcept:
        """One cache fewer has a tile, and no late thread of its reads it; the reference leads nowhere afterwards."""
        cdef int32_t* count
        if ref.base == NULL:
            return
        count = references(self, ref, ring)
        count[0] -= 1
        ref.base = NULL
        if count[0] == 0:
            self.blocks[ref.block].used -= 1
            self._left(ref.block)
