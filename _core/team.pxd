from libc.stdint cimport int64_t

cdef extern from "team.h":
    enum:
        KV_MAX_THREADS
    ctypedef struct kv_team:
        pass
    ctypedef void (*kv_team_fn)(void*, kv_team*, int) noexcept nogil
    void kv_team_run(int, kv_team_fn, void*) noexcept nogil
    int kv_team_size(const kv_team*) noexcept nogil
    int64_t kv_team_grab(const kv_team*, int64_t) noexcept nogil
    void kv_team_barrier(kv_team*) noexcept nogil
    int64_t kv_team_share(const kv_team*, int, int64_t) noexcept nogil
    int64_t kv_team_take(kv_team*, int, int64_t, int64_t, int64_t*) noexcept nogil
