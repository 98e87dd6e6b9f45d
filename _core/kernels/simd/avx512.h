/* AVX-512 with VNNI: one register to a vector of 16. */
#include <immintrin.h>

#define KV_ROWS 8
#define KV_TOKENS 4 /* in two planes: eight accumulators, four sums */
#define KV_LINES KV_UNROLL

typedef __m512 vf;
typedef __m512i vw;
typedef __m512i d4;
typedef __m512i d8;

KV_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
KV_INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
KV_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
KV_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
KV_INLINE vf vf_add(vf x, vf y) { return _mm512_add_ps(x, y); }
KV_INLINE vf vf_sub(vf x, vf y) { return _mm512_sub_ps(x, y); }
KV_INLINE vf vf_mul(vf x, vf y) { return _mm512_mul_ps(x, y); }
KV_INLINE vf vf_div(vf x, vf y) { return _mm512_div_ps(x, y); }
KV_INLINE vf vf_fma(vf x, vf y, vf z) { return _mm512_fmadd_ps(x, y, z); }
KV_INLINE vf vf_max(vf x, vf y) { return _mm512_max_ps(x, y); }
KV_INLINE vf vf_min(vf x, vf y) { return _mm512_min_ps(x, y); }
KV_INLINE vf vf_abs(vf x) { return _mm512_abs_ps(x); }
KV_INLINE vf vf_round(vf x) { return _mm512_roundscale_ps(x, 8); }
KV_INLINE vf vf_exp2i(vf n)
{
    __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
KV_INLINE float vf_sum(vf x) { return _mm512_reduce_add_ps(x); }
KV_INLINE float vf_top(vf x) { return _mm512_reduce_max_ps(x); }

#define KV_HAS_FOURS 1
/* The largest lanes, and the sums, of four at once: within 128 bits, then of the four quarters. */
#define KV_FOUR(NAME, OP, OP128)                                                                                       \
    KV_INLINE f4 NAME(const vf x[4])                                                                                   \
    {                                                                                                                  \
        vf ab = OP(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));                                    \
        vf cd = OP(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));                                    \
        vf all = OP(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));                                 \
        all = OP(all, _mm512_shuffle_f32x4(all, all, 0x4e));                                                           \
        return OP128(_mm512_castps512_ps128(all), _mm512_extractf32x4_ps(all, 1));                                     \
    }
KV_FOUR(vf_top4, _mm512_max_ps, _mm_max_ps)
KV_FOUR(vf_sum4, _mm512_add_ps, _mm_add_ps)

KV_INLINE __m512i i8_quads(__m512i q) { return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), q); }
KV_INLINE __m512i vi_pairs(__m512i a, __m512i b)
{
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
/* 64 codes of w, the first and last half with a scale of its own. */
KV_INLINE __m512i i8_round(const float *w, float first, float last)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    vf a = vf_set1(first), b = vf_set1(last);
    __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w), a)),
                                     _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + 16), a)));
    __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + 32), b)),
                                      _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + 48), b)));
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}
#define KV_HAS_ROUND4 1
KV_INLINE f4 vf_round4(const float *w, const int block, f4 by, int8_t *q)
{
    __m512i codes[4], all;
    __m128i sum;
    for (int i = 0; i < block / 16; i++) {
        codes[i] = i8_round(w + 64 * i, by[64 * i / block], by[(64 * i + 32) / block]);
        _mm512_storeu_si512(q + 64 * i, codes[i]);
        codes[i] = i8_quads(codes[i]);
    }
    if (block == 32) { /* two blocks in each register */
        all = vi_pairs(codes[0], codes[1]);
        all = _mm512_add_epi32(all, _mm512_shuffle_epi32(all, 0x4e));
        all = _mm512_add_epi32(all, _mm512_shuffle_i64x2(all, all, 0xb1));
        sum = _mm_unpacklo_epi32(_mm512_castsi512_si128(all), _mm512_extracti32x4_epi32(all, 2));
    } else {
        __m512i ab = vi_pairs(codes[0], codes[1]), cd = vi_pairs(codes[2], codes[3]);
        all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        all = _mm512_add_epi32(all, _mm512_shuffle_i64x2(all, all, 0x4e));
        sum = _mm_add_epi32(_mm512_castsi512_si128(all), _mm512_extracti32x4_epi32(all, 1));
    }
    return _mm_cvtepi32_ps(sum);
}

KV_INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
KV_INLINE void vf_store_f16(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, 0)); }
KV_INLINE vf vf_bf16_even(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
KV_INLINE vf vf_bf16_odd(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)));
}

KV_INLINE int32_t vf_store_i8(int8_t *p, vf x)
{
    __m512i i = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(i));
    return _mm512_reduce_add_epi32(i);
}

/* Tiles */
KV_INLINE vf vf_pick(vf a, vf b, vf x, vf y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x); }
KV_INLINE vw vw_or(vw x, vw y, const int shift) { return _mm512_or_si512(x, _mm512_slli_epi32(y, shift)); }
KV_INLINE vw vw_pack(vf a, vf b, vf c, vf d)
{
    vw low = vw_or(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b), 8);
    return vw_or(low, vw_or(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d), 8), 16);
}
KV_INLINE void vw_store(uint8_t *p, vw x) { _mm512_storeu_si512(p, x); }
KV_INLINE vw vw_fill(vf x)
{
    __m512i low = _mm512_and_si512(_mm512_cvtps_epi32(x), _mm512_set1_epi32(255));
    low = vw_or(low, low, 8);
    return vw_or(low, low, 16);
}
KV_INLINE vw vw_count(vw n, vw x, vw than)
{
    return _mm512_mask_add_epi8(n, _mm512_cmpgt_epi8_mask(x, than), n, _mm512_set1_epi8(1));
}
typedef __m512i vs;
KV_INLINE vs vs_zero(void) { return _mm512_setzero_si512(); }
KV_INLINE vs vs_dot(vs s, vw n, vw x) { return _mm512_dpbusd_epi32(s, n, x); }
KV_INLINE vf vs_float(vs s) { return _mm512_cvtepi32_ps(s); }

KV_INLINE vw vw_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
KV_INLINE vw vw_field(vw w, const int shift, const int mask)
{
    return _mm512_and_si512(_mm512_srli_epi16(w, shift), _mm512_set1_epi8((char)mask));
}

KV_INLINE vf vw_code(vw w, const int input, const int shift, const int mask)
{
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(w, 8 * input + shift), _mm512_set1_epi32(mask)));
}

KV_INLINE __m512i kv_quad(const int8_t *x) { int32_t q; memcpy(&q, x, 4); return _mm512_set1_epi32(q); }

KV_INLINE d4 d4_zero(void) { return _mm512_setzero_si512(); }
KV_INLINE d4 d4_dot(d4 s, vw w, const int8_t *x) { return _mm512_dpbusd_epi32(s, w, kv_quad(x)); }
KV_INLINE vf d4_float(d4 s) { return _mm512_cvtepi32_ps(s); }
KV_INLINE vf d4_two(d4 a, d4 b) { return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(a, 8), b)); }

typedef __m512i d6;
KV_INLINE d6 d6_start(int32_t s) { return _mm512_set1_epi32(s); }
KV_INLINE d6 d6_dot(d6 s, vw w, vw v, const int8_t *x)
{
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(s, w, kv_quad(x)), v, kv_quad(x + 4));
}
KV_INLINE vf d6_float(d6 s) { return _mm512_cvtepi32_ps(s); }
KV_INLINE vf d6_two(d6 a, d6 b) { return d4_two(a, b); }

KV_INLINE d8 d8_zero(void) { return _mm512_setzero_si512(); }
KV_INLINE d8 d8_dot(d8 s, vw w, const int8_t *x) { return _mm512_dpbusd_epi32(s, w, kv_quad(x)); }
KV_INLINE vf d8_float(d8 s, int32_t sum) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(s, _mm512_set1_epi32(128 * sum))); }
KV_INLINE vf d8_two(d8 a, d8 b, int32_t offset)
{
    return d4_two(a, _mm512_sub_epi32(b, _mm512_set1_epi32(offset)));
}

/* 8-bit codes with inputs of 16 bits, those of a line apart: even inputs, odd inputs. */
#define KV_WIDE 1
enum { WIDE_LANES = 16 };
typedef struct { __m512i a, b; } d16;
typedef vf wf;
#define wf_load vf_load
#define wf_store vf_store
#define wf_set1 vf_set1
#define wf_add vf_add
#define wf_fma vf_fma

KV_INLINE d16 d16_zero(void) { return (d16){_mm512_setzero_si512(), _mm512_setzero_si512()}; }
KV_INLINE d16 d16_load(const uint8_t *line)
{
    __m512i w = _mm512_loadu_si512(line);
    return (d16){_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srli_epi16(w, 8)};
}
KV_INLINE d16 d16_dot(d16 s, d16 w, const int16_t *x)
{
    return (d16){_mm512_dpwssd_epi32(s.a, w.a, kv_quad((const int8_t *)x)),
                 _mm512_dpwssd_epi32(s.b, w.b, kv_quad((const int8_t *)(x + 2)))};
}
KV_INLINE wf d16_float(d16 s) { return _mm512_cvtepi32_ps(_mm512_add_epi32(s.a, s.b)); }
/* n floats, a multiple of 32, times `by` as 16-bit integers. Of four inputs the even ones come first. */
KV_INLINE void d16_round(const float *w, int64_t n, vf by, int16_t *x)
{
    for (int64_t i = 0; i < n; i += 16) {
        __m512i codes = _mm512_shuffle_epi32(_mm512_cvtps_epi32(vf_mul(vf_load(w + i), by)), 0xd8);
        _mm256_storeu_si256((__m256i *)(x + i), _mm512_cvtsepi32_epi16(codes));
    }
}
