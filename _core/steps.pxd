from libc.stdint cimport int64_t

from .call cimport Inputs, Worker
from .kernels cimport kv_kernels
from .model cimport Layer, Matrix, Norm

# The steps of a call, which every thread of the team runs: they share its work.
cdef void embed(Worker* w) noexcept nogil
cdef Inputs prepare_normed(const Worker* w, const Matrix* m, const Norm* norm, bint kept) noexcept nogil
cdef Inputs prepare_attended(const Worker* w, const Matrix* m, int64_t layer) noexcept nogil
cdef Inputs prepare_gated(const Worker* w, const Matrix* m) noexcept nogil
cdef Inputs prepare_head(const Worker* w) noexcept nogil
cdef void matmul(Worker* w, const Matrix* m, const Inputs* x, float* out, int64_t ld, bint add,
                 const Matrix* next) noexcept nogil
cdef void norm_heads(Worker* w, const Layer* layer) noexcept nogil
cdef void attend(Worker* w, const Layer* layer, int64_t i) noexcept nogil
cdef void activate_mlp(Worker* w, const Layer* layer, const Inputs* x) noexcept nogil
cdef void add(Worker* w, const Matrix* m, const Inputs* x, const Norm* norm, const Matrix* next) noexcept nogil
cdef void add_branch(Worker* w, const Norm* norm) noexcept nogil
cdef void hidden_states(Worker* w) noexcept nogil
cdef void logits(Worker* w, const Inputs* x) noexcept nogil

# Parts of steps.
cdef void matmul_panels(const kv_kernels* kern, const Matrix* m, const Inputs* x, int64_t start, int64_t end, float* out,
                        int64_t ld, bint add) noexcept nogil
cdef int64_t grab_of(const Matrix* m, int64_t n) noexcept nogil
cdef float* own(const Worker* w, int64_t i) noexcept nogil
