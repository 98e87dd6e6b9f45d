"""Memory of the system: pages, huge ones, those that are there already, and those given back."""

import mmap

import numpy as np

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    #define release_freed() malloc_trim(0)
    #else
    #define release_freed() 0
    #endif
    """
    int release_freed() nogil


def anonymous(size):
    """Zeroed memory of its own, on a page boundary: a writable buffer of `size` bytes. Untouched pages cost nothing.

    Raises MemoryError when the system has no room for it.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return mmap.mmap(-1, size, **private)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for {size} bytes") from error


def advise_huge(memory, start=0, size=None):
    """Asks for huge pages, which hardware prefetches far into, in a part of `anonymous` memory; None: all the rest.
    For no effect but speed, so a system without them is no error."""
    end = len(memory) if size is None else start + size
    start = (start + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_HUGEPAGE") and start < end:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE, start, end - start)
        except OSError:
            pass


def trim():
    """Gives memory that was freed back to the system at once, where the C library keeps it."""
    release_freed()


def touch(memory):
    """Makes every page of a buffer present now, that none is waited for later. Changes nothing in it."""
    pages = np.frombuffer(memory, np.uint8)[::mmap.PAGESIZE]
    if pages.flags.writeable:
        pages |= 0
    else:
        pages.max()
