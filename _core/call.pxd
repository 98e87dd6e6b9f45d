# What the threads of one call share, and what each of them is given.

from libc.stdint cimport int8_t, int32_t, int64_t

from .attention cimport Plan
from .kernels cimport KV_BLOCK, kv_input, kv_kernels
from .model cimport Config, Layer, Matrix, Norm
from .team cimport kv_member

cdef enum:
    OWN_FLOATS = 1 << 15        # at least 16 for each token of a chunk


# Inputs of matrices as int8, in rows of `planes` times the blocks of an input. There is room for two planes of the
# widest.
ctypedef struct Codes:
    int8_t* q                   # [rows][planes][blocks * 32]
    float* scale                # [rows][planes][blocks]
    int32_t* sum                # [rows][planes][blocks]
    int32_t* offset             # [rows][planes][2 blocks]

# Buffers of one call; [rows] is the larger of tokens and threads: of one token each thread prepares its own input.
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
    # Experts; a slot is a token's place with one of them, and slots are sorted by expert.
    float* router               # [n][router.width] scores
    int32_t* chosen             # [n][experts_used] and the share of each
    float* share
    int32_t* slot_of            # [n][experts_used] the slot of each choice
    int32_t* slot_choice        # [slots] and back
    int32_t* first              # [n_experts + 1] expert e has slots [first[e], first[e + 1])
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
    Plan plan                   # n: tokens of the chunk
    RunState run
    int64_t planes              # of int8 inputs: two (16 bits) when decoding, or in a precise engine, and one otherwise
    int64_t head_planes         # of the head's: also two when the last token's logits alone are wanted
    const int32_t* tokens
    float* logits               # or NULL
    int64_t first_logit         # logits are wanted from this token of the chunk on

# One thread of a call.
ctypedef struct Worker:
    const Call* call
    kv_member* me
    const Matrix* next          # that is read after the step at hand, or NULL


cdef inline kv_input input_rows(const float* floats, int64_t ld, const Codes* codes, int64_t cols, int64_t planes,
                                int64_t first) noexcept nogil:
    """The input of a matrix in rows from `first` on: `cols` floats, ld apart, and their codes."""
    cdef kv_input x
    cdef int64_t blocks = (cols + KV_BLOCK - 1) // KV_BLOCK, at = first * planes * blocks
    x.f, x.ld, x.blocks, x.planes = floats + first * ld, ld, blocks, planes
    x.q, x.scale, x.sum, x.offset = codes.q + at * KV_BLOCK, codes.scale + at, codes.sum + at, codes.offset + 2 * at
    return x


cdef inline void quantize_row(const Call* call, const kv_input* x, int64_t cols, int64_t row) noexcept nogil:
    """The codes of a row from its floats."""
    cdef int64_t at = row * x.planes * x.blocks
    call.kern.quantize(x.f + row * x.ld, cols, x.planes, <int8_t*>x.q + at * KV_BLOCK, <float*>x.scale + at,
                       <int32_t*>x.sum + at, <int32_t*>x.offset + 2 * at)
