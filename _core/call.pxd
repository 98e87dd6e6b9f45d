# What the threads of one call share, and what each of them is given.

from libc.stdint cimport int8_t, int32_t, int64_t

from .plan cimport Items
from .kernels cimport KV_BLOCK, kv_input, kv_kernels
from .model cimport Config, Layer, Matrix, Norm
from .team cimport kv_member

# Rows of a step are tokens of its items, one sequence after the other; those whose inputs of matrices have one plane of
# int8 come before those with two.
cdef enum:
    ONE = 0
    TWO = 1
    OWN_FLOATS = 1 << 15        # at least 16 for each row of a step

# Inputs of matrices as int8, in rows of one plane and then rows of two, each of the blocks of an input. There is room
# for two planes of the widest in every row.
ctypedef struct Codes:
    int8_t* q                   # [rows][blocks][planes][32]
    float* scale                # [rows][planes][blocks]
    int32_t* sum                # [rows][planes][blocks]
    int32_t* offset             # [rows][planes][2 blocks]

# The inputs of a product: n[ONE] rows, then n[TWO].
ctypedef struct Inputs:
    kv_input part[2]
    int64_t n[2]

# Buffers of one call; [rows] is the larger of the step's rows and threads: of one row each thread prepares its own input.
# A thread that comes back late may read any of them, while others write what is next.
ctypedef struct RunState:
    float* x                    # [n][hidden_pad] residual stream
    float* branch               # [n][hidden_pad] what is to be added to it, where it is not added at once
    float* input                # [rows][input_width] normed or combined input of a matrix
    Codes codes                 # [rows] of it, or of the gated activations
    int64_t own_blocks          # of codes, from one thread's own to the next one's
    float* qkv                  # [n][qkv.width]
    float* gate                 # [n][gate.width]
    float* own                  # [threads][2][OWN_FLOATS] what a thread computes before it counts
    int64_t input_width
    # Experts; a slot is a row's place with one of them, and slots are sorted by expert.
    float* router               # [n][router.width] scores
    int32_t* chosen             # [n][experts_used] and the share of each
    float* share
    int32_t* slot_of            # [n][experts_used] the slot of each choice
    int32_t* slot_choice        # [slots] and back
    int32_t* first              # [n_experts + 1] expert e has slots [first[e], first[e + 1]),
    int32_t* middle             # [n_experts] those from middle[e] on of rows with two planes
    int32_t* next               # [n_experts]
    int32_t* active             # [n_active[0]] experts that have slots
    int64_t* n_active
    float* slot_input           # [slots][input_width]
    Codes slot_codes            # [slots] of it, or of slot_gate
    float* slot_gate            # [slots][width of an expert]
    float* slot_out             # [slots][hidden_pad]

ctypedef struct Call:
    const kv_kernels* kern
    const Config* config
    const Layer* layers
    const Matrix* embed
    const Matrix* head
    const Matrix* positions     # without segments unless the model has learned positions
    const Norm* norm
    Items items
    int64_t n[2]                # rows of one plane, and of two
    int64_t rows                # both together
    RunState run
    int32_t* tokens             # [rows]
    int32_t* item_of            # [rows] whose they are
    # The rows whose logits are wanted, those first for which the head takes one plane.
    int32_t* wanted             # [n_wanted[ONE] + n_wanted[TWO]]
    int64_t n_wanted[2]
    float* logits               # [wanted][head.width], or NULL
    float* hidden               # [rows][hidden_size] the last norm's output, or NULL

# One thread of a call.
ctypedef struct Worker:
    const Call* call
    kv_member* me
    const Matrix* next          # that is read after the step at hand, or NULL


cdef inline kv_input input_at(const float* floats, int64_t ld, const Codes* codes, int64_t cols, int64_t planes,
                              int64_t at) noexcept nogil:
    """Inputs of a matrix: rows of `cols` floats, ld apart, with their codes from block `at` on."""
    cdef kv_input x
    x.f, x.ld, x.blocks, x.planes = floats, ld, (cols + KV_BLOCK - 1) // KV_BLOCK, planes
    x.q, x.scale, x.sum, x.offset = codes.q + at * KV_BLOCK, codes.scale + at, codes.sum + at, codes.offset + 2 * at
    return x


cdef inline Inputs inputs_at(const float* floats, int64_t ld, const Codes* codes, int64_t cols, const int64_t* n,
                             int64_t at) noexcept nogil:
    """n[ONE] rows, then n[TWO], with their codes from block `at` on."""
    cdef Inputs x
    x.n[ONE], x.n[TWO] = n[ONE], n[TWO]
    x.part[ONE] = input_at(floats, ld, codes, cols, 1, at)
    x.part[TWO] = input_at(floats + n[ONE] * ld, ld, codes, cols, 2, at + n[ONE] * x.part[ONE].blocks)
    return x


cdef inline float* input_row(const Inputs* x, int64_t row) noexcept nogil:
    """The floats of a row."""
    return <float*>x.part[ONE].f + row * x.part[ONE].ld


cdef inline void quantize_row(const kv_kernels* kern, const Inputs* x, int64_t cols, int64_t row) noexcept nogil:
    """The codes of a row from its floats."""
    cdef int64_t of = row if row < x.n[ONE] else row - x.n[ONE]
    cdef const kv_input* part = &x.part[ONE if row < x.n[ONE] else TWO]
    cdef int64_t at = of * part.planes * part.blocks
    kern.quantize(part.f + of * part.ld, cols, part.planes, <int8_t*>part.q + at * KV_BLOCK, <float*>part.scale + at,
                  <int32_t*>part.sum + at, <int32_t*>part.offset + 2 * at)
