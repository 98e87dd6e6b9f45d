/* Products of a few rows with 16-lane columns of a matrix stored channel by channel:
 * c[r][0..15] (+)= sum over k of a[r][k] * b[k][0..15]. Weight panels, cached keys and cached values all have this
 * form; only the load of b differs. Up to KV_ROWS rows are kept in registers. */
#ifndef KVRUN_GEMM_H
#define KVRUN_GEMM_H

#include "simd/simd.h"

#define KV_GEMM(NAME, TYPE, LOAD)                                                                                      \
    KV_INLINE void NAME##_rows(const int rows, const int groups, const float *a, int64_t ld_a, const TYPE *b,          \
                               int64_t ld_b, int64_t depth, float *c, int64_t ld_c, int add)                           \
    {                                                                                                                  \
        vf sum[KV_ROWS][2];                                                                                            \
        KV_UNROLL                                                                                                      \
        for (int r = 0; r < rows; r++)                                                                                 \
            KV_UNROLL                                                                                                  \
            for (int g = 0; g < groups; g++)                                                                           \
                sum[r][g] = add ? vf_load(c + r * ld_c + 16 * g) : vf_zero();                                          \
        for (int64_t k = 0; k < depth; k++) {                                                                          \
            vf x[KV_ROWS];                                                                                             \
            KV_UNROLL                                                                                                  \
            for (int r = 0; r < rows; r++)                                                                             \
                x[r] = vf_set1(a[r * ld_a + k]);                                                                       \
            kv_ahead(b + k * ld_b);                                                                                    \
            KV_UNROLL                                                                                                  \
            for (int g = 0; g < groups; g++) {                                                                         \
                vf line = LOAD(b + k * ld_b + 16 * g);                                                                 \
                KV_UNROLL                                                                                              \
                for (int r = 0; r < rows; r++)                                                                         \
                    sum[r][g] = vf_fma(x[r], line, sum[r][g]);                                                         \
            }                                                                                                          \
        }                                                                                                              \
        KV_UNROLL                                                                                                      \
        for (int r = 0; r < rows; r++)                                                                                 \
            KV_UNROLL                                                                                                  \
            for (int g = 0; g < groups; g++)                                                                           \
                vf_store(c + r * ld_c + 16 * g, sum[r][g]);                                                            \
    }                                                                                                                  \
                                                                                                                       \
    static KV_OWN void NAME##_few(const int rows, const float *a, int64_t ld_a, const TYPE *b, int64_t ld_b,           \
                                  int64_t depth, int64_t lanes, float *c, int64_t ld_c, int add)                       \
    {                                                                                                                  \
        int64_t n = 0;                                                                                                 \
        for (; n + 32 <= lanes; n += 32)                                                                               \
            switch (rows) {                                                                                            \
            case 4: NAME##_rows(4, 2, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            case 3: NAME##_rows(3, 2, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            case 2: NAME##_rows(2, 2, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            case 1: NAME##_rows(1, 2, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            }                                                                                                          \
        if (n < lanes)                                                                                                 \
            switch (rows) {                                                                                            \
            case 4: NAME##_rows(4, 1, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            case 3: NAME##_rows(3, 1, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            case 2: NAME##_rows(2, 1, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            case 1: NAME##_rows(1, 1, a, ld_a, b + n, ld_b, depth, c + n, ld_c, add); break;                           \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    __attribute__((unused)) static void NAME(int64_t rows, const float *a, int64_t ld_a, const TYPE *b, int64_t ld_b,  \
                                             int64_t depth, int64_t lanes, float *c, int64_t ld_c, int add)            \
    {                                                                                                                  \
        int64_t r = rows / KV_ROWS * KV_ROWS;                                                                          \
        for (int64_t n = 0; n < lanes && r; n += 16)                                                                   \
            for (int64_t i = 0; i < r; i += KV_ROWS)                                                                   \
                NAME##_rows(KV_ROWS, 1, a + i * ld_a, ld_a, b + n, ld_b, depth, c + i * ld_c + n, ld_c, add);          \
        for (int few; r < rows; r += few) {                                                                            \
            few = (int)(rows - r < 4 ? rows - r : 4);                                                                  \
            NAME##_few(few, a + r * ld_a, ld_a, b, ld_b, depth, lanes, c + r * ld_c, ld_c, add);                       \
        }                                                                                                              \
    }

KV_GEMM(gemm_f32, float, vf_load)
KV_GEMM(gemm_f16, uint16_t, vf_load_f16)

#endif
