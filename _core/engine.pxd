from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t

from .attention cimport Plan, Ropes
from .kernels cimport kv_input, kv_kernels
from .cache cimport Cache

cdef enum:
    MAX_SEGMENTS = 3

# Some rows of a matrix: one tensor of the file.
ctypedef struct Segment:
    const uint8_t* data
    const float* bias           # or NULL
    int type
    int64_t rows, panels
    int64_t panel_bytes
    int64_t offset              # of its first output; segments are padded to whole panels

# [rows, cols] in up to three segments, as Q, K and V are, that share an input and a pass.
ctypedef struct Matrix:
    Segment segments[MAX_SEGMENTS]
    int n_segments
    bint quantized              # some segment takes int8 inputs
    int64_t cols, panels, width # width: 16 * panels, outputs of a token

# Of the residual stream, or of what is added to it; weight NULL: none. bias: of LayerNorm.
ctypedef struct Norm:
    const float* weight
    const float* bias

ctypedef struct Expert:
    Matrix gate
    Matrix up
    Matrix down

ctypedef struct Layer:
    Norm attn_norm
    Matrix qkv
    const float* q_norm         # of each head, or of all at once; or NULL
    const float* k_norm
    Matrix o
    Norm attn_post_norm
    Norm mlp_norm
    Matrix gate                 # no segments: up alone is activated
    Matrix up
    Matrix down
    Matrix router               # without segments: one feed-forward step for all tokens, the one above
    Expert* experts
    bint experts_quantized      # some of them take int8 inputs
    Norm mlp_post_norm

ctypedef struct Config:
    int64_t n_layers, hidden_size, intermediate_size, n_heads, n_kv_heads, head_dim, vocab_size
    int64_t n_experts, experts_used, expert_size
    int64_t hidden_pad          # rounded up to 16, as every row of floats below
    float norm_eps, attention_scale, attention_softcap      # a soft cap of 0: none
    float embedding_scale, residual_scale, logit_scale, logit_softcap
    bint layer_norm             # LayerNorm, not RMSNorm
    bint norm_all_heads         # q_norm and k_norm are of all heads at once
    bint normalize_experts      # the shares of a token's experts sum to 1
    bint branch                 # what a layer adds is normed or scaled first
    int activation

# Buffers of one call; [rows] is the larger of tokens and threads, since each thread prepares its own input in decode.
# `planes` is that of chunks; a single token always has two, which cost it nothing.
ctypedef struct RunState:
    int64_t planes
    float* x                    # [n][hidden_pad] residual stream
    float* branch               # [n][hidden_pad] what is to be added to it, where it is not added at once
    float* input                # [rows][input_width] normed or combined input of a matrix
    int8_t* q                   # [rows][2 planes][blocks of the widest input * 32]
    float* q_scale              # [rows][2][blocks]
    int32_t* q_sum              # [rows][2][blocks]
    int32_t* q_offset           # [rows][2][2 blocks]
    float* qkv                  # [n][qkv.width]
    float* gate                 # [n][gate.width]
    float* up                   # [n][gate.width]
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
    int8_t* slot_q              # as q, q_scale, q_sum and q_offset
    float* slot_scale
    int32_t* slot_sum
    int32_t* slot_offset
    float* slot_gate            # [slots][width of an expert]
    float* slot_up
    float* slot_out             # [slots][hidden_pad]

# All that the threads of one call share.
ctypedef struct Call:
    const kv_kernels* kern
    const Config* config
    const Layer* layers
    const Matrix* embed
    const Matrix* head
    const Matrix* positions     # without segments unless the model has learned positions
    const Norm* norm
    const Cache* cache
    Plan plan
    RunState run
    const int32_t* tokens
    float* logits               # or NULL
    int64_t first_logit         # logits are wanted from this token of the chunk on
