/* The AVX-512 intrinsics that the kernels use, in plain C, for machines without the instructions. Included first. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "f16.h"

typedef float v16f __attribute__((vector_size(64), aligned(1), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint32_t v16u __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t v32u __attribute__((vector_size(64), aligned(1), may_alias));

#define FN static inline __attribute__((always_inline, unused))
#define LANES(type, expression)      \
    do {                             \
        type r;                      \
        for (int i = 0; i < 16; i++) \
            r[i] = (expression);     \
        return r;                    \
    } while (0)

FN v16f in_c_loadu_ps(const void *p) { v16f r; memcpy(&r, p, 64); return r; }
FN void in_c_storeu_ps(void *p, v16f a) { memcpy(p, &a, 64); }
FN v16f in_c_set1_ps(float x) { LANES(v16f, x); }
FN v16f in_c_fmadd_ps(v16f a, v16f b, v16f c) { LANES(v16f, fmaf(a[i], b[i], c[i])); }
FN v16f in_c_max_ps(v16f a, v16f b) { LANES(v16f, a[i] > b[i] ? a[i] : b[i]); }
FN v16f in_c_min_ps(v16f a, v16f b) { LANES(v16f, a[i] < b[i] ? a[i] : b[i]); }
FN v16f in_c_abs_ps(v16f a) { LANES(v16f, fabsf(a[i])); }
FN v16f in_c_roundscale_ps(v16f a, int mode) { (void)mode; LANES(v16f, rintf(a[i])); }
FN v16i in_c_cvtps_epi32(v16f a) { LANES(v16i, (int32_t)rintf(a[i])); }
FN v16f in_c_cvtepi32_ps(v16i a) { LANES(v16f, (float)a[i]); }
FN float in_c_reduce_add_ps(v16f a) { float s = 0; for (int i = 0; i < 16; i++) s += a[i]; return s; }
FN float in_c_reduce_max_ps(v16f a) { float m = a[0]; for (int i = 1; i < 16; i++) m = a[i] > m ? a[i] : m; return m; }
FN uint16_t in_c_above_ps(v16f a, v16f b) { unsigned m = 0; for (int i = 0; i < 16; i++) m |= (unsigned)(a[i] > b[i]) << i; return (uint16_t)m; }
FN v16f in_c_mask_blend_ps(uint16_t m, v16f a, v16f b) { LANES(v16f, m >> i & 1 ? b[i] : a[i]); }
FN int32_t in_c_reduce_add_epi32(v16i a) { int32_t s = 0; for (int i = 0; i < 16; i++) s += a[i]; return s; }

FN v16i in_c_loadu_si512(const void *p) { v16i r; memcpy(&r, p, 64); return r; }
FN v16i in_c_set1_epi32(int32_t x) { LANES(v16i, x); }
FN v16i in_c_set1_epi8(char x) { v16i r; memset(&r, x, 64); return r; }
FN v16i in_c_srli_epi16(v16i a, int n) { return (v16i)((v32u)a >> n); }
FN v16i in_c_dpbusd_epi32(v16i s, v16i w, v16i x)
{
    const uint8_t *u = (const uint8_t *)&w;
    const int8_t *v = (const int8_t *)&x;
    for (int i = 0; i < 64; i++)
        s[i / 4] += u[i] * v[i];
    return s;
}
FN __m128i in_c_cvtsepi32_epi8(v16i a)
{
    int8_t r[16];
    for (int i = 0; i < 16; i++)
        r[i] = (int8_t)(a[i] > 127 ? 127 : a[i] < -128 ? -128 : a[i]);
    return _mm_loadu_si128((const __m128i *)r);
}
FN v16i in_c_dpwssd_epi32(v16i s, v16i w, v16i x)
{
    const int16_t *u = (const int16_t *)&w, *v = (const int16_t *)&x;
    for (int i = 0; i < 32; i++)
        s[i / 2] += u[i] * v[i];
    return s;
}
FN v16i in_c_set1_epi16(short x) { v16i r; for (int i = 0; i < 32; i++) memcpy((short *)&r + i, &x, 2); return r; }
FN int32_t in_c_within(int32_t x, int32_t most) { return x > most ? most : x < -most - 1 ? -most - 1 : x; }
FN v16i in_c_packs_epi32(v16i a, v16i b)
{
    v16i r;
    for (int i = 0; i < 32; i++)
        ((int16_t *)&r)[i] = (int16_t)in_c_within((i & 4 ? b : a)[i / 8 * 4 + i % 4], 32767);
    return r;
}
FN v16i in_c_packs_epi16(v16i a, v16i b)
{
    v16i r;
    for (int i = 0; i < 64; i++)
        ((int8_t *)&r)[i] = (int8_t)in_c_within(((const int16_t *)(i & 8 ? &b : &a))[i / 16 * 8 + i % 8], 127);
    return r;
}
FN v16i in_c_permutexvar_epi32(v16i order, v16i a) { LANES(v16i, a[order[i] & 15]); }
FN v16i in_c_unpack_epi32(v16i a, v16i b, int high) { LANES(v16i, (i & 1 ? b : a)[i / 4 * 4 + i % 4 / 2 + 2 * high]); }
FN v16i in_c_unpack_epi64(v16i a, v16i b, int high) { LANES(v16i, (i & 2 ? b : a)[i / 4 * 4 + i % 2 + 2 * high]); }
FN v16i in_c_shuffle_epi32(v16i a, v16i b, int by) { LANES(v16i, (i & 2 ? b : a)[i / 4 * 4 + (by >> i % 4 * 2 & 3)]); }
FN v16i in_c_shuffle_i64x2(v16i a, v16i b, int by) { LANES(v16i, (i & 8 ? b : a)[(by >> i / 4 * 2 & 3) * 4 + i % 4]); }
FN __m128i in_c_extracti32x4_epi32(v16i a, int n) { return _mm_loadu_si128((const __m128i *)&a + n); }
typedef struct { uint16_t h[16]; } v16h;
FN v16h in_c_cvtsepi32_epi16(v16i a)
{
    v16h r;
    for (int i = 0; i < 16; i++)
        r.h[i] = (uint16_t)in_c_within(a[i], 32767);
    return r;
}
FN v16h in_c_load_halves(const void *p) { v16h r; memcpy(&r, p, 32); return r; }
FN v16f in_c_cvtph_ps(v16h a) { LANES(v16f, kv_f16_float(a.h[i])); }
FN v16h in_c_cvtps_ph(v16f a, int mode) { v16h r; (void)mode; for (int i = 0; i < 16; i++) r.h[i] = kv_float_f16(a[i]); return r; }
FN void in_c_store_halves(void *p, v16h a) { memcpy(p, &a, 32); }
FN void in_c_storeu_si512(void *p, v16i a) { memcpy(p, &a, 64); }
FN uint64_t in_c_above_epi8(v16i a, v16i b)
{
    const int8_t *x = (const int8_t *)&a, *y = (const int8_t *)&b;
    uint64_t m = 0;
    for (int i = 0; i < 64; i++)
        m |= (uint64_t)(x[i] > y[i]) << i;
    return m;
}
FN v16i in_c_mask_add_epi8(v16i src, uint64_t m, v16i a, v16i b)
{
    int8_t *r = (int8_t *)&src;
    const int8_t *x = (const int8_t *)&a, *y = (const int8_t *)&b;
    for (int i = 0; i < 64; i++)
        if (m >> i & 1)
            r[i] = (int8_t)(x[i] + y[i]);
    return src;
}

#define __m512 v16f
#define __m512i v16i
#define _mm512_loadu_ps in_c_loadu_ps
#define _mm512_storeu_ps in_c_storeu_ps
#define _mm512_set1_ps in_c_set1_ps
#define _mm512_setzero_ps() in_c_set1_ps(0)
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_fmadd_ps in_c_fmadd_ps
#define _mm512_max_ps in_c_max_ps
#define _mm512_min_ps in_c_min_ps
#define _mm512_abs_ps in_c_abs_ps
#define _mm512_roundscale_ps in_c_roundscale_ps
#define _mm512_cvtps_epi32 in_c_cvtps_epi32
#define _mm512_cvtepi32_ps in_c_cvtepi32_ps
#define _mm512_castsi512_ps(a) ((v16f)(a))
#define _mm512_reduce_add_ps in_c_reduce_add_ps
#define _mm512_reduce_max_ps in_c_reduce_max_ps
#define _mm512_reduce_add_epi32 in_c_reduce_add_epi32
#define _mm512_loadu_si512 in_c_loadu_si512
#define _mm512_setzero_si512() in_c_set1_epi32(0)
#define _mm512_set1_epi32 in_c_set1_epi32
#define _mm512_set1_epi8 in_c_set1_epi8
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_add_epi32(a, b) ((a) + (b))
#define _mm512_sub_epi32(a, b) ((a) - (b))
#define _mm512_slli_epi32(a, n) ((a) << (n))
#define _mm512_srli_epi16 in_c_srli_epi16
#define _mm512_srli_epi32(a, n) ((v16i)((v16u)(a) >> (n)))
#define _mm512_dpbusd_epi32 in_c_dpbusd_epi32
#define _mm512_cvtsepi32_epi8 in_c_cvtsepi32_epi8
#define _mm512_cvtph_ps in_c_cvtph_ps
#define _mm512_cvtps_ph in_c_cvtps_ph
#define _mm256_loadu_si256 in_c_load_halves
#define _mm256_storeu_si256 in_c_store_halves
#define _mm512_cmp_ps_mask(a, b, greater) in_c_above_ps(a, b)
#define _mm512_mask_blend_ps in_c_mask_blend_ps
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_storeu_si512 in_c_storeu_si512
#define _mm512_cmpgt_epi8_mask in_c_above_epi8
#define _mm512_mask_add_epi8 in_c_mask_add_epi8
#define _mm512_dpwssd_epi32 in_c_dpwssd_epi32
#define _mm512_set1_epi16 in_c_set1_epi16
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) ((v16i){__VA_ARGS__})
#define _mm512_packs_epi32 in_c_packs_epi32
#define _mm512_packs_epi16 in_c_packs_epi16
#define _mm512_permutexvar_epi32 in_c_permutexvar_epi32
#define _mm512_unpacklo_epi32(a, b) in_c_unpack_epi32(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) in_c_unpack_epi32(a, b, 1)
#define _mm512_unpacklo_epi64(a, b) in_c_unpack_epi64(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) in_c_unpack_epi64(a, b, 1)
#define _mm512_unpacklo_ps(a, b) ((v16f)in_c_unpack_epi32((v16i)(a), (v16i)(b), 0))
#define _mm512_unpackhi_ps(a, b) ((v16f)in_c_unpack_epi32((v16i)(a), (v16i)(b), 1))
#define _mm512_shuffle_epi32(a, by) in_c_shuffle_epi32(a, a, by)
#define _mm512_shuffle_ps(a, b, by) ((v16f)in_c_shuffle_epi32((v16i)(a), (v16i)(b), by))
#define _mm512_shuffle_i64x2 in_c_shuffle_i64x2
#define _mm512_shuffle_f32x4(a, b, by) ((v16f)in_c_shuffle_i64x2((v16i)(a), (v16i)(b), by))
#define _mm512_castsi512_si128(a) in_c_extracti32x4_epi32(a, 0)
#define _mm512_extracti32x4_epi32 in_c_extracti32x4_epi32
#define _mm512_castps512_ps128(a) _mm_castsi128_ps(in_c_extracti32x4_epi32((v16i)(a), 0))
#define _mm512_extractf32x4_ps(a, n) _mm_castsi128_ps(in_c_extracti32x4_epi32((v16i)(a), n))
#define _mm512_cvtsepi32_epi16 in_c_cvtsepi32_epi16
