from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t

from .attention cimport Plan
from .kernels cimport kv_input, kv_kernels
from .kv cimport Cache

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

ctypedef struct Layer:
    const float* attn_norm
    Matrix qkv
    Matrix o
    const float* mlp_norm
    Matrix gate
    Matrix up
    Matrix down

ctypedef struct Config:
    int64_t n_layers, hidden_size, intermediate_size, n_heads, n_kv_heads, head_dim, vocab_size
    int64_t hidden_pad          # rounded up to 16, as every row of floats below
    float norm_eps, attention_scale

# Buffers of one call; [rows] is the larger of tokens and threads, since each thread prepares its own input in decode.
# `planes` is that of chunks; a single token always has two, which cost it nothing.
ctypedef struct RunState:
    int64_t planes
    float* x                    # [n][hidden_pad] residual stream
    float* input                # [rows][input_width] normed or combined input of a matrix
    int8_t* q                   # [rows][2 planes][blocks of the widest input * 32]
    float* q_scale              # [rows][2][blocks]
    int32_t* q_sum              # [rows][2][blocks]
    float* qkv                  # [n][qkv.width]
    float* gate                 # [n][gate.width]
    float* up                   # [n][gate.width]
    int64_t input_width

# All that the threads of one call share.
ctypedef struct Call:
    const kv_kernels* kern
    const Config* config
    const Layer* layers
    const Matrix* embed
    const Matrix* head
    const float* norm
    const Cache* cache
    Plan plan
    RunState run
    const int32_t* tokens
    float* logits               # or NULL
    int64_t first_logit         # logits are wanted from this token of the chunk on
