/* Products of a few rows with 16-lane columns of a matrix stored channel by channel:
 * c[r][0..15] (+)= sum over k of a[r][k] * b[k][0..15]. Weight panels, cached keys and cached values all have this
 * form; only the load of b differs. Up to KV_ROWS rows are kept in registers. */
#ifndef KVRUN_GEMM_H
#define KVRUN_GEMM_H

#include "simd.h"

#define KV_GEMM(NAME, TYPE, LOAD)                                                                                  \
    KV_INLINE void NAME##_rows(const int rows, const float *a, int64_t ld_a, const TYPE *b, int64_t ld_b,          \
                               int64_t depth, float *c, int64_t ld_c, int add)                                     \
    {                                                                                                              \
        vf sum[KV_ROWS];                                                                                           \
        KV_UNROLL                                                                                                  \
        for (int r = 0; r < rows; r++)                                                                             \
            sum[r] = add ? vf_load(c + r * ld_c) : vf_zero();                                                      \
        for (int64_t k = 0; k < depth; k++) {                                                                      \
            vf line = LOAD(b + k * ld_b);                                                                          \
            KV_UNROLL                                                                                              \
            for (int r = 0; r < rows; r++)                                                                         \
                sum[r] = vf_fma(vf_set1(a[r * ld_a + k]), line, sum[r]);                                           \
        }                                                                                                          \
        KV_UNROLL                                                                                                  \
        for (int r = 0; r < rows; r++)                                                                             \
            vf_store(c + r * ld_c, sum[r]);                                                                        \
    }                                                                                                              \
                                                                                                                   \
    static void NAME(int64_t rows, const float *a, int64_t ld_a, const TYPE *b, int64_t ld_b, int64_t depth,       \
                     int64_t lanes, float *c, int64_t ld_c, int add)                                               \
    {                                                                                                              \
        for (int64_t n = 0; n < lanes; n += 16) {                                                                  \
            int64_t r = 0;                                                                                         \
            for (; r + KV_ROWS <= rows; r += KV_ROWS)                                                              \
                NAME##_rows(KV_ROWS, a + r * ld_a, ld_a, b + n, ld_b, depth, c + r * ld_c + n, ld_c, add);         \
            if (KV_ROWS > 4 && rows - r >= 4) {                                                                    \
                NAME##_rows(4, a + r * ld_a, ld_a, b + n, ld_b, depth, c + r * ld_c + n, ld_c, add);               \
                r += 4;                                                                                            \
            }                                                                                                      \
            switch (rows - r) {                                                                                    \
            case 3: NAME##_rows(3, a + r * ld_a, ld_a, b + n, ld_b, depth, c + r * ld_c + n, ld_c, add); break;    \
            case 2: NAME##_rows(2, a + r * ld_a, ld_a, b + n, ld_b, depth, c + r * ld_c + n, ld_c, add); break;    \
            case 1: NAME##_rows(1, a + r * ld_a, ld_a, b + n, ld_b, depth, c + r * ld_c + n, ld_c, add); break;    \
            }                                                                                                      \
        }                                                                                                          \
    }

KV_GEMM(gemm_f32, float, vf_load)
KV_GEMM(gemm_f16, uint16_t, vf_load_f16)

#endif
