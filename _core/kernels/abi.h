/* The numbers that every part agrees on: kernels of the CPU, Cython, and CUDA, whose compiler has no standard headers.
 * Preprocessor and enums only. */
#ifndef KVRUN_ABI_H
#define KVRUN_ABI_H

#define KV_PANEL 16  /* rows of a weight matrix that are stored together */
#define KV_BLOCK 32  /* neighbouring columns that share a scale, and inputs that do */
#define KV_SUPER 256 /* columns of a super-block */
#define KV_TILE 64   /* tokens of a tile of the cache */

/* The weight types in the order of their numbers: X(NAME, name). Each has a file weights/name.c. */
#define KV_EACH_WEIGHT_TYPE(X) \
    X(F32, f32)                \
    X(F16, f16)                \
    X(BF16, bf16)              \
    X(Q8_0, q8_0)              \
    X(Q4_1, q4_1)              \
    X(Q4_0, q4_0)              \
    X(Q4_K, q4_k)              \
    X(Q6_K, q6_k)              \
    X(Q5_0, q5_0)

#define KV_WEIGHT_NUMBER(NAME, name) KV_##NAME,
enum kv_weight_type { KV_EACH_WEIGHT_TYPE(KV_WEIGHT_NUMBER) KV_N_WEIGHT_TYPES };
#undef KV_WEIGHT_NUMBER

enum kv_activation { KV_SILU, KV_GELU, KV_GELU_TANH, KV_ACTIVATIONS };
enum kv_format_id { KV_FORMAT_F32, KV_FORMAT_F16, KV_FORMAT_Q8, KV_FORMAT_Q4, KV_FORMAT_Q2, KV_FORMATS };

#endif
