"""Memory of the system: pages, huge ones, those that are there already, those of a file, and those given back."""

import mmap
import os
import re

import numpy as np

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uintptr_t

cdef extern from "mapped.h":
    ctypedef struct MappedMemory "struct mapped_file":
        uintptr_t start
        int fd

    MappedMemory* mapped_open(int fd, size_t size, const char* line)
    void mapped_close(MappedMemory* file)

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

cdef extern from "<sys/mman.h>":
    enum: MADV_DONTNEED
    int madvise(void* start, size_t length, int advice)


cdef enum:
    MADV_COLLAPSE = 25   # Linux 6.1 on; older headers have no name for it

# What Linux says of its memory: of the machine, in kB, and of the control group (v2, v1), in bytes or "max".
cdef dict _LIMITS = {
    "/proc/meminfo": (rb"(?:Mem|Swap)Total: +(\d+) kB", 1024),
    "/sys/fs/cgroup/memory.max": (rb"(\d+)", 1),
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": (rb"(\d+)", 1),
}


def most():
    """Bytes that a process can have at most, of memory and swap or as far as its container lets it; None where the
    system does not say."""
    limits = []
    for path, (pattern, unit) in _LIMITS.items():
        try:
            with open(path, "rb") as file:
                found = re.findall(pattern, file.read())
        except OSError:
            continue
        limits += [unit * sum(map(int, found))] if found else []
    return min(limits, default=None)


def anonymous(size):
    """Zeroed memory of its own, on a page boundary: a writable buffer of `size` bytes. Untouched pages cost nothing.

    Raises MemoryError when the system has no room for it, or could never have: pages that come as they are touched
    would be refused too late.
    """
    limit = most()
    if limit is not None and size > limit:
        raise MemoryError(f"no memory for {size} bytes: there are {limit} in all")
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


def collapse(memory, start, size):
    """Huge pages, now, for what is in use of a part of `anonymous` memory, whose `start` is on a page, and around it.
    Where the system has none, or not like this (before Linux 6.1), nothing happens."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", "rb") as file:
            if b"[never]" not in file.read():
                memory.madvise(MADV_COLLAPSE, start, size)
    except (OSError, AttributeError):
        pass


def release(memory, start, size):
    """Gives whole pages in a part of `anonymous` memory back to the system; they are zero when they are used again."""
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, first, end - first)


def trim():
    """Gives memory that was freed back to the system at once, where the C library keeps it."""
    release_freed()


cdef class MappedFile:
    """The first `size` bytes, one at least, of an open file, mapped to be read: a read-only buffer.

    It keeps a descriptor of its own. If the file loses pages while it is mapped, as by being truncated, and one of them
    is needed, the process writes `line` to standard error and ends with status 1, where the system would end it with
    SIGBUS; a handler of SIGBUS that the process had before still gets what does not concern mapped files. Raises
    OSError, ValueError if the file is shorter.
    """

    cdef MappedMemory* memory
    cdef Py_ssize_t size

    def __cinit__(self, int fd, Py_ssize_t size, bytes line):
        if not 0 < size <= os.fstat(fd).st_size:
            raise ValueError(f"the file has fewer bytes than {size}, or none")
        self.size = size
        self.memory = mapped_open(fd, size, line)
        if self.memory == NULL:
            number = errno
            raise OSError(number, os.strerror(number))

    def __dealloc__(self):
        if self.memory != NULL:
            mapped_close(self.memory)

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void*>self.memory.start, self.size, 1, flags)

    def fileno(self):
        """The descriptor, valid as long as this object."""
        return self.memory.fd

    def forget(self, start, length):
        """Unmaps pages that were read and are not needed soon, so that they do not count as memory in use."""
        cdef Py_ssize_t first = start // mmap.PAGESIZE * mmap.PAGESIZE, end = min(start + length, self.size)
        if 0 <= first < end:
            madvise(<void*>(self.memory.start + first), end - first, MADV_DONTNEED)


def touch(memory):
    """Makes every page of a buffer present now, that none is waited for later. Changes nothing in it."""
    pages = np.frombuffer(memory, np.uint8)[::mmap.PAGESIZE]
    if pages.flags.writeable:
        pages |= 0
    else:
        pages.max()
