"""The kernel table of this CPU's best instruction-set level, chosen when the module loads.

The environment variable ``KVRUN_ISA`` forces a level; tests compare levels through ``kernels_of``.
"""

import os

from libc.stdlib cimport calloc

TILE = KV_TILE  # tokens of a tile of the cache

cdef kv_kernels* _tables[4]
cdef kv_kernels* _chosen = NULL
_LEVELS = ("avx512", "avx2", "neon", "scalar")


cdef kv_kernels* _find(str level) except? NULL:
    """The table of a level, or NULL when it is not built or the CPU lacks it."""
    cdef int i = _LEVELS.index(level)
    cdef bytes name = level.encode()
    cdef kv_kernels* table
    if _tables[i] == NULL:
        table = <kv_kernels*>calloc(1, sizeof(kv_kernels))
        if table == NULL:
            raise MemoryError
        if not kv_kernels_find(name, table):
            return NULL
        _tables[i] = table
    return _tables[i]


cdef const kv_kernels* kernels() noexcept nogil:
    return _chosen


cdef const kv_kernels* kernels_of(str level) except NULL:
    if level not in isa_available():
        raise ValueError(f"instruction set {level!r} is not one of {', '.join(isa_available())}")
    return _find(level)


def isa_available():
    """Names of the levels that are built and that this CPU runs, best first."""
    return [level for level in _LEVELS if _find(level) != NULL]


def isa():
    """Name of the level in use: avx512, avx2, neon or scalar. Raises ValueError as `require_level` does."""
    require_level()
    return _chosen.name.decode()


def require_level():
    """Raises ValueError when KVRUN_ISA names a level that is not there; said here rather than when the module loads,
    where a command could only answer with a traceback."""
    if _problem is not None:
        raise ValueError(_problem)


_wanted = os.environ.get("KVRUN_ISA") or isa_available()[0]
_problem = None
if _wanted not in isa_available():
    _problem = f"KVRUN_ISA={_wanted}: this CPU and build have {', '.join(isa_available())}"
_chosen = _find("scalar" if _problem else _wanted)
