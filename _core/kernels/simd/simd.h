/* Vectors of 16 lanes, the width of a weight panel, under one set of names for every instruction-set level.
 *
 *   vf   16 floats                   vf_load vf_store vf_set1 vf_zero vf_add vf_sub vf_mul vf_fma(a,b,c)=a*b+c
 *                                    vf_max vf_min vf_abs vf_div vf_sum vf_top (largest lane)
 *                                    vf_round vf_pick(a,b,x,y) = a > b ? x : y
 *                                    vf_exp2i (2^n, n integral), vf_store_i8 (codes; returns their sum)
 *                                    vf_top4 vf_sum4 (of four at once), vf_round4 (four blocks of 32 or 64 floats,
 *                                    each times its factor, as int8; returns the sums of each block's)
 *                                    vf_load_f16 vf_store_f16, vf_bf16_even/odd (channels of a bf16 line)
 *   vw   64 weight bytes: 16 rows x 4 channels       vw_load vw_field (bits `mask` after a shift)
 *                                                    vw_code (those of one of the 4 channels, as vf)
 *                                    vw_store, vw_pack (four bytes a lane, of four vf), vw_or (x | y << shift in each
 *                                    byte), vw_fill (int8 of a vf, four times a lane), vw_count (n + (x > than), int8)
 *   vs   sums over the four bytes of a lane: vs_dot (n * x, n a few small counts, x int8; at most 32), vs_float
 *   d4   dot products of codes 0..15 with int8 inputs; at most 8 d4_dot between d4_zero and d4_float
 *   d6   the same for codes 0..63, with a start; d6_dot takes two lines, so 8 inputs
 *   d8   the same for bytes storing code + 128; `sum` is that of the inputs since d8_zero
 */
#ifndef KVRUN_SIMD_H
#define KVRUN_SIMD_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define KV_INLINE static inline __attribute__((always_inline, unused))
#define KV_OWN __attribute__((noinline, unused)) /* code of its own: for the sake of registers */
#define KV_PASTE_(a, b) a##_##b
#define KV_PASTE(a, b) KV_PASTE_(a, b)
#define KV_NAME(name) KV_PASTE(name, KV_LEVEL) /* this level's copy of a symbol */
#define KV_STRING_(a) #a
#define KV_STRING(a) KV_STRING_(a)

typedef float f4 __attribute__((vector_size(16))); /* one number for each of four rows or blocks */
KV_INLINE void f4_store(float *p, f4 x) { memcpy(p, &x, sizeof x); }

/* Loops over the rows kept in registers are unrolled; loops over lines (KV_LINES) only where there are 32 registers, or
 * GCC hoists every product of a block to its top and spills them. */
#if defined(__clang__)
#define KV_UNROLL _Pragma("clang loop unroll(full)")
#define KV_NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define KV_UNROLL _Pragma("GCC unroll 8")
#define KV_NO_UNROLL _Pragma("GCC unroll 1")
#endif

/* Asks for what is to be read from memory a little later: hardware prefetches one stream at a time, and stops at the end
 * of a page. Addresses beyond the data do no harm. */
#define KV_AHEAD 8192
KV_INLINE void kv_ahead(const void *p) { __builtin_prefetch((const char *)p + KV_AHEAD); }

#if defined(KV_LEVEL_AVX512)
#include "simd/avx512.h"
#elif defined(KV_LEVEL_AVX2)
#include "simd/avx2.h"
#elif defined(KV_LEVEL_NEON)
#include "simd/neon.h"
#else
#include "simd/scalar.h"
#endif

#ifndef KV_LINES
#define KV_LINES KV_NO_UNROLL
#endif

#ifndef KV_HAS_FOURS
KV_INLINE f4 vf_top4(const vf x[4]) { return (f4){vf_top(x[0]), vf_top(x[1]), vf_top(x[2]), vf_top(x[3])}; }
KV_INLINE f4 vf_sum4(const vf x[4]) { return (f4){vf_sum(x[0]), vf_sum(x[1]), vf_sum(x[2]), vf_sum(x[3])}; }
KV_INLINE f4 i8_sum4(const int8_t *q, const int n)
{
    int32_t sum[4] = {0};
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 4; j++)
            sum[j] += q[j * n + i];
    return (f4){(float)sum[0], (float)sum[1], (float)sum[2], (float)sum[3]};
}
#endif

#ifndef KV_HAS_ROUND4
KV_INLINE f4 vf_round4(const float *w, const int block, f4 by, int8_t *q)
{
    KV_UNROLL
    for (int i = 0; i < 4 * block; i += 32) {
        vf factor = vf_set1(by[i / block]);
        vf_store_codes(q + i, vf_mul(vf_load(w + i), factor), vf_mul(vf_load(w + i + 16), factor));
    }
    return i8_sum4(q, block);
}
#endif

/* e^x: x = n ln 2 + r, |r| <= ln 2 / 2, Taylor to the seventh power; relative error below 2e-7.
 * Clamped to [-87, 88], so that 2^n stays a normal number. */
KV_INLINE vf vf_exp(vf x)
{
    x = vf_min(vf_max(x, vf_set1(-87.0f)), vf_set1(88.0f));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.0f / 5040);
    p = vf_fma(p, r, vf_set1(1.0f / 720));
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_mul(p, vf_exp2i(n));
}

/* 2^x for x <= 0; below -125 it stays what it is there, 2e-38. x = n + r, |r| <= 1/2, and the polynomial of degree 5 in r
 * of least relative error: 3e-7 with its rounding. */
KV_INLINE vf vf_exp2(vf x)
{
    x = vf_max(x, vf_set1(-125.0f));
    vf n = vf_round(x), r = vf_sub(x, n);
    vf p = vf_fma(vf_set1(1.32764713e-3f), r, vf_set1(9.67554096e-3f));
    p = vf_fma(p, r, vf_set1(5.55071309e-2f));
    p = vf_fma(p, r, vf_set1(2.40221202e-1f));
    p = vf_fma(p, r, vf_set1(6.93146944e-1f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_mul(p, vf_exp2i(n));
}

/* The first n < 16 floats, zeros behind them. */
KV_INLINE vf vf_load_part(const float *p, int64_t n)
{
    float lanes[16] = {0};
    memcpy(lanes, p, (size_t)n * sizeof(float));
    return vf_load(lanes);
}

KV_INLINE void vf_store_part(float *p, vf v, int64_t n)
{
    float lanes[16];
    vf_store(lanes, v);
    memcpy(p, lanes, (size_t)n * sizeof(float));
}

#endif
