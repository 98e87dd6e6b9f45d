# What the engine knows of a model: its weights where they lie, and the sizes and choices of its arithmetic.

from libc.stdint cimport int64_t, uint8_t

from .kernels cimport KV_PANEL

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
    int64_t hidden_pad          # rounded up to 16, as every row of floats is
    float norm_eps, attention_scale, attention_softcap      # a soft cap of 0: none
    float embedding_scale, residual_scale, logit_scale, logit_softcap
    bint layer_norm             # LayerNorm, not RMSNorm
    bint norm_all_heads         # q_norm and k_norm are of all heads at once
    bint normalize_experts      # the shares of a token's experts sum to 1
    bint branch                 # what a layer adds is normed or scaled first
    int activation


cdef inline int64_t whole_panels(int64_t n) noexcept nogil:
    return (n + KV_PANEL - 1) // KV_PANEL * KV_PANEL


cdef inline const Matrix* first_of_mlp(const Layer* layer) noexcept nogil:
    """The matrix that a layer's feed-forward step reads first."""
    if layer.router.n_segments:
        return &layer.router
    return &layer.gate if layer.gate.n_segments else &layer.up
