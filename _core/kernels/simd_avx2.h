/* AVX2, FMA, F16C: two 256-bit registers to a vector of 16. */
#include <immintrin.h>

#define KV_ROWS 4 /* 8 accumulators of the 16 registers, 4 weights, the rest temporaries */

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vw;
typedef struct { __m256i a, b; } d4; /* int16: up to 8 sums of 2 * 15 * 127 fit */
typedef struct { __m256i a, b; } d8; /* int32 */

KV_INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KV_INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
KV_INLINE vf vf_set1(float x) { __m256 v = _mm256_set1_ps(x); return (vf){v, v}; }
KV_INLINE vf vf_zero(void) { return vf_set1(0); }
KV_INLINE vf vf_add(vf x, vf y) { return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
KV_INLINE vf vf_sub(vf x, vf y) { return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
KV_INLINE vf vf_mul(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
KV_INLINE vf vf_div(vf x, vf y) { return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
KV_INLINE vf vf_fma(vf x, vf y, vf z) { return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
KV_INLINE vf vf_max(vf x, vf y) { return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
KV_INLINE vf vf_min(vf x, vf y) { return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
KV_INLINE vf vf_abs(vf x)
{
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
KV_INLINE vf vf_round(vf x) { return (vf){_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
KV_INLINE __m256 kv_exp2i(__m256 n)
{
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
KV_INLINE vf vf_exp2i(vf n) { return (vf){kv_exp2i(n.a), kv_exp2i(n.b)}; }

KV_INLINE float vf_sum(vf x)
{
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
KV_INLINE float vf_top(vf x)
{
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

KV_INLINE vf vf_load_f16(const uint16_t *p)
{
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
KV_INLINE void vf_store_f16(uint16_t *p, vf x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, 0));
}
KV_INLINE vf vf_bf16_even(const uint16_t *p)
{
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)p), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(p + 16)), 16))};
}
KV_INLINE vf vf_bf16_odd(const uint16_t *p)
{
    __m256i high = _mm256_set1_epi32((int)0xffff0000);
    return (vf){_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)p), high)),
                _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(p + 16)), high))};
}

KV_INLINE int32_t vf_store_i8(int8_t *p, vf x)
{
    __m256i i = _mm256_cvtps_epi32(x.a), j = _mm256_cvtps_epi32(x.b), s = _mm256_add_epi32(i, j);
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(i, j), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

KV_INLINE vw vw_load(const uint8_t *p)
{
    return (vw){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
KV_INLINE vw vw_field(vw w, const int shift, const int mask)
{
    __m256i m = _mm256_set1_epi8((char)mask);
    return (vw){_mm256_and_si256(_mm256_srli_epi16(w.a, shift), m), _mm256_and_si256(_mm256_srli_epi16(w.b, shift), m)};
}

KV_INLINE __m256i kv_quad(const int8_t *x) { int32_t q; memcpy(&q, x, 4); return _mm256_set1_epi32(q); }
KV_INLINE vf kv_i32_float(__m256i a, __m256i b) { return (vf){_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)}; }

KV_INLINE vf vw_code(vw w, const int input, const int shift, const int mask)
{
    __m256i m = _mm256_set1_epi32(mask);
    return kv_i32_float(_mm256_and_si256(_mm256_srli_epi32(w.a, 8 * input + shift), m),
                        _mm256_and_si256(_mm256_srli_epi32(w.b, 8 * input + shift), m));
}

KV_INLINE d4 d4_zero(void) { return (d4){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
KV_INLINE d4 d4_dot(d4 s, vw w, const int8_t *x)
{
    __m256i q = kv_quad(x);
    return (d4){_mm256_add_epi16(s.a, _mm256_maddubs_epi16(w.a, q)), _mm256_add_epi16(s.b, _mm256_maddubs_epi16(w.b, q))};
}
KV_INLINE vf d4_float(d4 s)
{
    __m256i ones = _mm256_set1_epi16(1);
    return kv_i32_float(_mm256_madd_epi16(s.a, ones), _mm256_madd_epi16(s.b, ones));
}

/* |w| * (x with the sign of w): the unsigned operand of vpmaddubsw stays at or below 128, so no sum saturates. */
KV_INLINE __m256i kv_dot8(__m256i s, __m256i w, __m256i q)
{
    w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
    return _mm256_add_epi32(s, _mm256_madd_epi16(p, _mm256_set1_epi16(1)));
}
KV_INLINE d8 d8_zero(void) { return (d8){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
KV_INLINE d8 d8_dot(d8 s, vw w, const int8_t *x)
{
    __m256i q = kv_quad(x);
    return (d8){kv_dot8(s.a, w.a, q), kv_dot8(s.b, w.b, q)};
}
KV_INLINE vf d8_float(d8 s, int32_t sum) { (void)sum; return kv_i32_float(s.a, s.b); }

/* 16-bit inputs with whole bytes, where there is no instruction for sums of byte products: vpmaddwd costs no more than
 * one plane of int8 with its signs put right. int32, two sums to a lane. */
#define KV_WIDE 1
typedef struct { __m256i v[4]; } d16;

KV_INLINE d16 d16_zero(void)
{
    __m256i zero = _mm256_setzero_si256();
    return (d16){{zero, zero, zero, zero}};
}
KV_INLINE d16 d16_dot(d16 s, const __m256i w[4], const int16_t *x)
{
    int64_t quad;
    memcpy(&quad, x, 8);
    __m256i q = _mm256_set1_epi64x(quad);
    for (int i = 0; i < 4; i++)
        s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(w[i], q));
    return s;
}
KV_INLINE void d16_load(__m256i w[4], const uint8_t *line)
{
    for (int i = 0; i < 4; i++)
        w[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(line + 16 * i)));
}
KV_INLINE vf d16_float(d16 s)
{
    __m256i a = _mm256_hadd_epi32(s.v[0], s.v[1]), b = _mm256_hadd_epi32(s.v[2], s.v[3]);
    return kv_i32_float(_mm256_permute4x64_epi64(a, 0xd8), _mm256_permute4x64_epi64(b, 0xd8));
}
/* 256 * high + low for n (a multiple of 16) codes of two planes */
KV_INLINE void d16_join(const int8_t *high, const int8_t *low, int64_t n, int16_t *x)
{
    for (int64_t i = 0; i < n; i += 16) {
        __m256i h = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(high + i)));
        __m256i l = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(low + i)));
        _mm256_storeu_si256((__m256i *)(x + i), _mm256_add_epi16(_mm256_slli_epi16(h, 8), l));
    }
}
