from libc.stdint cimport int64_t

from .plan cimport Items, Plan
from .team cimport kv_member

# Once the items of a step are planned, there come for each layer append_step, attend_step, commit_step if commit_needed
# (steps of a team), and combine.
cdef bint commit_needed(const Items* items) noexcept nogil
cdef void append_step(const Items* items, int64_t layer, const float* k, const float* v, int64_t ld,
                      kv_member* me) noexcept nogil
cdef void attend_step(const Items* items, int64_t layer, const float* q, int64_t ld, kv_member* me) noexcept nogil
cdef void commit_step(const Items* items, int64_t layer, kv_member* me) noexcept nogil
cdef void combine(const Plan* plan, int64_t layer, int64_t token, float* out) noexcept nogil
