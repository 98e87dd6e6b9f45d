from libc.stdint cimport int64_t

cdef extern from "team.h":
    enum:
        KV_MAX_THREADS
    ctypedef struct kv_team:
        pass
    ctypedef struct kv_member:
        int thread
        int size
        void (*spare)(void*) noexcept nogil
        void* spare_arg
    ctypedef void (*kv_team_fn)(void*, kv_member*) noexcept nogil
    kv_team* kv_team_new() nogil
    void kv_team_free(kv_team*) nogil
    ctypedef struct kv_team_use:
        int threads
        double seconds, waiting
    kv_team_use kv_team_run(kv_team*, int, kv_team_fn, void*) nogil
    bint kv_team_busy(const kv_team*) nogil
    void kv_team_settle(kv_team*) nogil
    void kv_team_keep() nogil
    void kv_team_release() nogil
    int64_t kv_team_share(const kv_member*, int, int64_t) nogil
    bint kv_team_late(const kv_member*) nogil
    bint kv_team_take(kv_member*, int64_t, int64_t, int64_t*, int64_t*) nogil
    bint kv_team_repeat(kv_member*, int64_t, int64_t, int64_t*, int64_t*) nogil
    bint kv_team_commit(kv_member*) nogil
