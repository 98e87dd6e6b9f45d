/* AVX2, FMA, F16C: two 256-bit registers to a vector of 16. */
#include <immintrin.h>

#define KV_ROWS 4 /* 8 accumulators of the 16 registers, 4 weights, the rest temporaries */
#define KV_TOKENS 2 /* in two planes: as many accumulators */

/* Keeps a sum where it is: GCC would add products in pairs first, and run out of registers for them. */
#define KV_IN_ORDER(x) __asm__("" : "+x"(x))

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

#define KV_HAS_FOURS 1
/* The largest lanes, and the sums, of four at once. */
#define KV_FOUR(NAME, OP)                                                                                              \
    KV_INLINE f4 NAME(const vf x[4])                                                                                   \
    {                                                                                                                  \
        __m256 a = OP(x[0].a, x[0].b), b = OP(x[1].a, x[1].b), c = OP(x[2].a, x[2].b), d = OP(x[3].a, x[3].b);         \
        __m256 ab = OP(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));                                            \
        __m256 cd = OP(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));                                            \
        __m256 all = OP(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));                             \
        return KV_FOUR_##NAME(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));                             \
    }
#define KV_FOUR_vf_top4 _mm_max_ps
#define KV_FOUR_vf_sum4 _mm_add_ps
KV_FOUR(vf_top4, _mm256_max_ps)
KV_FOUR(vf_sum4, _mm256_add_ps)

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

KV_INLINE void vf_store_codes(int8_t *p, vf x, vf y)
{
    __m256i i = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    __m256i j = _mm256_packs_epi32(_mm256_cvtps_epi32(y.a), _mm256_cvtps_epi32(y.b));
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packing works on halves of registers */
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(i, j), order));
}

KV_INLINE __m256i kv_sum_codes(const int8_t *q, const int n)
{
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 32)
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i *)(q + i))));
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}
KV_INLINE f4 i8_sum4(const int8_t *q, const int n)
{
    __m256i ab = _mm256_hadd_epi32(kv_sum_codes(q, n), kv_sum_codes(q + n, n));
    __m256i cd = _mm256_hadd_epi32(kv_sum_codes(q + 2 * n, n), kv_sum_codes(q + 3 * n, n));
    ab = _mm256_hadd_epi32(ab, cd);
    return _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(ab), _mm256_extracti128_si256(ab, 1)));
}

/* Tiles */
KV_INLINE vf vf_pick(vf a, vf b, vf x, vf y)
{
    return (vf){_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
}
KV_INLINE __m256i kv_pack(__m256 a, __m256 b, __m256 c, __m256 d)
{
    __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
    __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_shuffle_epi8(_mm256_packus_epi16(ab, cd), _mm256_broadcastsi128_si256(turn));
}
KV_INLINE vw vw_pack(vf a, vf b, vf c, vf d) { return (vw){kv_pack(a.a, b.a, c.a, d.a), kv_pack(a.b, b.b, c.b, d.b)}; }
KV_INLINE vw vw_or(vw x, vw y, const int shift)
{
    return (vw){_mm256_or_si256(x.a, _mm256_slli_epi32(y.a, shift)), _mm256_or_si256(x.b, _mm256_slli_epi32(y.b, shift))};
}
KV_INLINE void vw_store(uint8_t *p, vw x)
{
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)(p + 32), x.b);
}
KV_INLINE vw vw_fill(vf x)
{
    __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    return (vw){_mm256_shuffle_epi8(_mm256_cvtps_epi32(x.a), first), _mm256_shuffle_epi8(_mm256_cvtps_epi32(x.b), first)};
}
KV_INLINE vw vw_count(vw n, vw x, vw than)
{
    return (vw){_mm256_sub_epi8(n.a, _mm256_cmpgt_epi8(x.a, than.a)), _mm256_sub_epi8(n.b, _mm256_cmpgt_epi8(x.b, than.b))};
}
typedef struct { __m256i a, b; } vs; /* int16, two sums to a lane */
KV_INLINE vs vs_zero(void) { return (vs){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
KV_INLINE vs vs_dot(vs s, vw n, vw x)
{
    return (vs){_mm256_add_epi16(s.a, _mm256_maddubs_epi16(n.a, x.a)), _mm256_add_epi16(s.b, _mm256_maddubs_epi16(n.b, x.b))};
}
KV_INLINE vf vs_float(vs s)
{
    __m256i ones = _mm256_set1_epi16(1);
    return (vf){_mm256_cvtepi32_ps(_mm256_madd_epi16(s.a, ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(s.b, ones))};
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
    s = (d4){_mm256_add_epi16(s.a, _mm256_maddubs_epi16(w.a, q)), _mm256_add_epi16(s.b, _mm256_maddubs_epi16(w.b, q))};
    KV_IN_ORDER(s.a);
    KV_IN_ORDER(s.b);
    return s;
}
KV_INLINE vf d4_float(d4 s)
{
    __m256i ones = _mm256_set1_epi16(1);
    return kv_i32_float(_mm256_madd_epi16(s.a, ones), _mm256_madd_epi16(s.b, ones));
}

/* 256 a + b */
KV_INLINE vf d4_two(d4 a, d4 b)
{
    __m256i ones = _mm256_set1_epi16(1), high = _mm256_set1_epi16(256);
    return kv_i32_float(_mm256_add_epi32(_mm256_madd_epi16(a.a, high), _mm256_madd_epi16(b.a, ones)),
                        _mm256_add_epi32(_mm256_madd_epi16(a.b, high), _mm256_madd_epi16(b.b, ones)));
}

typedef d8 d6; /* int32, since but two sums of 2 * 63 * 127 fit into int16 */
KV_INLINE d6 d6_start(int32_t s) { __m256i v = _mm256_set1_epi32(s); return (d6){v, v}; }
KV_INLINE __m256i kv_dot6(__m256i s, __m256i w, __m256i v, __m256i q, __m256i p)
{
    __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(w, q), _mm256_maddubs_epi16(v, p));
    return _mm256_add_epi32(s, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
}
KV_INLINE d6 d6_dot(d6 s, vw w, vw v, const int8_t *x)
{
    __m256i q = kv_quad(x), p = kv_quad(x + 4);
    return (d6){kv_dot6(s.a, w.a, v.a, q, p), kv_dot6(s.b, w.b, v.b, q, p)};
}
KV_INLINE vf d6_float(d6 s) { return kv_i32_float(s.a, s.b); }
KV_INLINE vf d6_two(d6 a, d6 b)
{
    return kv_i32_float(_mm256_add_epi32(_mm256_slli_epi32(a.a, 8), b.a), _mm256_add_epi32(_mm256_slli_epi32(a.b, 8), b.b));
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
KV_INLINE vf d8_float(d8 s, int32_t sum) { (void)sum; return d6_float(s); }
KV_INLINE vf d8_two(d8 a, d8 b, int32_t offset) { (void)offset; return d6_two(a, b); }

/* 16-bit inputs with whole bytes, where there is no instruction for sums of byte products: vpmaddwd costs no more than
 * one plane of int8 with its signs put right. Eight lanes of 4 inputs; sums are int32, two to a lane. */
#define KV_WIDE 1
enum { WIDE_LANES = 8 };   /* lanes that are done together, which leaves registers for four rows */
typedef struct { __m256i a, b; } d16;
typedef __m256 wf;
KV_INLINE wf wf_load(const float *p) { return _mm256_loadu_ps(p); }
KV_INLINE void wf_store(float *p, wf x) { _mm256_storeu_ps(p, x); }
KV_INLINE wf wf_set1(float x) { return _mm256_set1_ps(x); }
KV_INLINE wf wf_add(wf x, wf y) { return _mm256_add_ps(x, y); }
KV_INLINE wf wf_fma(wf x, wf y, wf z) { return _mm256_fmadd_ps(x, y, z); }

KV_INLINE d16 d16_zero(void) { return (d16){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
KV_INLINE d16 d16_load(const uint8_t *line)
{
    const __m128i *p = (const __m128i *)line;
    return (d16){_mm256_cvtepu8_epi16(_mm_loadu_si128(p)), _mm256_cvtepu8_epi16(_mm_loadu_si128(p + 1))};
}
KV_INLINE d16 d16_dot(d16 s, d16 w, const int16_t *x)
{
    int64_t quad;
    memcpy(&quad, x, 8);
    __m256i q = _mm256_set1_epi64x(quad);
    s = (d16){_mm256_add_epi32(s.a, _mm256_madd_epi16(w.a, q)), _mm256_add_epi32(s.b, _mm256_madd_epi16(w.b, q))};
    KV_IN_ORDER(s.a);
    KV_IN_ORDER(s.b);
    return s;
}
KV_INLINE wf d16_float(d16 s)
{
    return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(s.a, s.b), 0xd8));
}
/* n floats, a multiple of 32, times `by` as 16-bit integers. */
KV_INLINE void d16_round(const float *w, int64_t n, vf by, int16_t *x)
{
    for (int64_t i = 0; i < n; i += 16) {
        vf v = vf_mul(vf_load(w + i), by);
        __m256i codes = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
        _mm256_storeu_si256((__m256i *)(x + i), _mm256_permute4x64_epi64(codes, 0xd8));
    }
}
