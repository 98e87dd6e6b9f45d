from libc.stdint cimport int64_t

from .call cimport Call, Worker
from .kernels cimport kv_input, kv_kernels
from .model cimport Layer, Matrix, Norm

# The steps of a call, which every thread of the team runs: they share its work.
cdef void embed(Worker* w) noexcept nogil
cdef kv_input prepare_normed(const Worker* w, const Matrix* m, const Norm* norm, bint kept) noexcept nogil
cdef kv_input prepare_attended(const Worker* w, const Matrix* m, int64_t layer) noexcept nogil
cdef kv_input prepare_gated(const Worker* w, const Matrix* m) noexcept nogil
cdef kv_input prepare_head(const Worker* w) noexcept nogil
cdef void matmul(Worker* w, const Matrix* m, const kv_input* x, float* out, int64_t ld, bint add,
                 const Matrix* next) noexcept nogil
cdef void norm_heads(Worker* w, const Layer* layer) noexcept nogil
cdef void attend(Worker* w, const Layer* layer, int64_t i) noexcept nogil
cdef void activate_mlp(Worker* w, const Layer* layer, const kv_input* x) noexcept nogil
cdef void add(Worker* w, const Matrix* m, const kv_input* x, const Norm* norm, const Matrix* next) noexcept nogil
cdef void add_branch(Worker* w, const Norm* norm) noexcept nogil
cdef void logits(Worker* w, const kv_input* x) noexcept nogil

# Parts of steps.
cdef void matmul_panels(const kv_kernels* kern, const Matrix* m, const kv_input* x, int64_t n, int64_t start,
                        int64_t end, float* out, int64_t ld, bint add) noexcept nogil
cdef int64_t grab_of(const Matrix* m, int64_t n) noexcept nogil
cdef float* own(const Worker* w, int64_t i) noexcept nogil
