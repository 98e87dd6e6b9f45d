/* NEON with the dot-product extension: four 128-bit registers to a vector of 16. */
#include <arm_neon.h>

#define KV_ROWS 4 /* 16 accumulators of the 32 registers */
#define KV_TOKENS 2 /* in two planes: as many accumulators */

typedef float32x4x4_t vf;
typedef uint8x16x4_t vw;
typedef int32x4x4_t d4;
typedef int32x4x4_t d8;

#define KV_EACH(type, expression)      \
    do {                               \
        type out_;                     \
        for (int i = 0; i < 4; i++)    \
            out_.val[i] = (expression); \
        return out_;                   \
    } while (0)

KV_INLINE vf vf_load(const float *p) { KV_EACH(vf, vld1q_f32(p + 4 * i)); }
KV_INLINE void vf_store(float *p, vf x) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.val[i]); }
KV_INLINE vf vf_set1(float x) { KV_EACH(vf, vdupq_n_f32(x)); }
KV_INLINE vf vf_zero(void) { return vf_set1(0); }
KV_INLINE vf vf_add(vf x, vf y) { KV_EACH(vf, vaddq_f32(x.val[i], y.val[i])); }
KV_INLINE vf vf_sub(vf x, vf y) { KV_EACH(vf, vsubq_f32(x.val[i], y.val[i])); }
KV_INLINE vf vf_mul(vf x, vf y) { KV_EACH(vf, vmulq_f32(x.val[i], y.val[i])); }
KV_INLINE vf vf_div(vf x, vf y) { KV_EACH(vf, vdivq_f32(x.val[i], y.val[i])); }
KV_INLINE vf vf_fma(vf x, vf y, vf z) { KV_EACH(vf, vfmaq_f32(z.val[i], x.val[i], y.val[i])); }
KV_INLINE vf vf_max(vf x, vf y) { KV_EACH(vf, vmaxq_f32(x.val[i], y.val[i])); }
KV_INLINE vf vf_min(vf x, vf y) { KV_EACH(vf, vminq_f32(x.val[i], y.val[i])); }
KV_INLINE vf vf_abs(vf x) { KV_EACH(vf, vabsq_f32(x.val[i])); }
KV_INLINE vf vf_round(vf x) { KV_EACH(vf, vrndnq_f32(x.val[i])); }
KV_INLINE vf vf_exp2i(vf n)
{
    KV_EACH(vf, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.val[i]), vdupq_n_s32(127)), 23)));
}
KV_INLINE float vf_sum(vf x)
{
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.val[0], x.val[1]), vaddq_f32(x.val[2], x.val[3])));
}
KV_INLINE float vf_top(vf x)
{
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.val[0], x.val[1]), vmaxq_f32(x.val[2], x.val[3])));
}

KV_INLINE vf vf_load_f16(const uint16_t *p)
{
    KV_EACH(vf, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
KV_INLINE void vf_store_f16(uint16_t *p, vf x)
{
    for (int i = 0; i < 4; i++)
        vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.val[i])));
}
KV_INLINE vf vf_bf16_even(const uint16_t *p)
{
    KV_EACH(vf, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)), 16)));
}
KV_INLINE vf vf_bf16_odd(const uint16_t *p)
{
    uint32x4_t high = vdupq_n_u32(0xffff0000);
    KV_EACH(vf, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)), high)));
}

KV_INLINE int32_t vf_store_i8(int8_t *p, vf x)
{
    int32x4_t a = vcvtnq_s32_f32(x.val[0]), b = vcvtnq_s32_f32(x.val[1]);
    int32x4_t c = vcvtnq_s32_f32(x.val[2]), d = vcvtnq_s32_f32(x.val[3]);
    int16x8_t low = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)), high = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
    return vaddvq_s32(vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d)));
}

#define KV_HAS_FOURS 1
KV_INLINE float32x4_t kv_top(vf x) { return vmaxq_f32(vmaxq_f32(x.val[0], x.val[1]), vmaxq_f32(x.val[2], x.val[3])); }
KV_INLINE float32x4_t kv_sum(vf x) { return vaddq_f32(vaddq_f32(x.val[0], x.val[1]), vaddq_f32(x.val[2], x.val[3])); }
KV_INLINE f4 vf_top4(const vf x[4])
{
    return (f4)vpmaxq_f32(vpmaxq_f32(kv_top(x[0]), kv_top(x[1])), vpmaxq_f32(kv_top(x[2]), kv_top(x[3])));
}
KV_INLINE f4 vf_sum4(const vf x[4])
{
    return (f4)vpaddq_f32(vpaddq_f32(kv_sum(x[0]), kv_sum(x[1])), vpaddq_f32(kv_sum(x[2]), kv_sum(x[3])));
}
KV_INLINE int8x16_t kv_codes(vf x)
{
    int16x8_t low = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.val[0])), vqmovn_s32(vcvtnq_s32_f32(x.val[1])));
    int16x8_t high = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.val[2])), vqmovn_s32(vcvtnq_s32_f32(x.val[3])));
    return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}
KV_INLINE void vf_store_codes(int8_t *p, vf x, vf y)
{
    vst1q_s8(p, kv_codes(x));
    vst1q_s8(p + 16, kv_codes(y));
}

KV_INLINE f4 i8_sum4(const int8_t *q, const int n)
{
    int32x4_t sum[4];
    for (int j = 0; j < 4; j++, q += n) {
        sum[j] = vdupq_n_s32(0);
        for (int i = 0; i < n; i += 16)
            sum[j] = vdotq_s32(sum[j], vld1q_s8(q + i), vdupq_n_s8(1));
    }
    return (f4)vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(sum[0], sum[1]), vpaddq_s32(sum[2], sum[3])));
}

/* Tiles */
KV_INLINE vf vf_pick(vf a, vf b, vf x, vf y)
{
    KV_EACH(vf, vbslq_f32(vcgtq_f32(a.val[i], b.val[i]), x.val[i], y.val[i]));
}
KV_INLINE uint8x16_t kv_pack(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d)
{
    uint32x4_t low = vsliq_n_u32(vcvtnq_u32_f32(a), vcvtnq_u32_f32(b), 8);
    uint32x4_t high = vsliq_n_u32(vcvtnq_u32_f32(c), vcvtnq_u32_f32(d), 8);
    return vreinterpretq_u8_u32(vsliq_n_u32(low, high, 16));
}
KV_INLINE vw vw_pack(vf a, vf b, vf c, vf d) { KV_EACH(vw, kv_pack(a.val[i], b.val[i], c.val[i], d.val[i])); }
KV_INLINE vw vw_or(vw x, vw y, const int shift)
{
    KV_EACH(vw, vorrq_u8(x.val[i], vshlq_u8(y.val[i], vdupq_n_s8((int8_t)shift))));
}
KV_INLINE void vw_store(uint8_t *p, vw x) { for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, x.val[i]); }
KV_INLINE uint8x16_t kv_fill(float32x4_t x)
{
    uint32x4_t low = vandq_u32(vreinterpretq_u32_s32(vcvtnq_s32_f32(x)), vdupq_n_u32(255));
    return vreinterpretq_u8_u32(vmulq_n_u32(low, 0x01010101));
}
KV_INLINE vw vw_fill(vf x) { KV_EACH(vw, kv_fill(x.val[i])); }
KV_INLINE vw vw_count(vw n, vw x, vw than)
{
    KV_EACH(vw, vsubq_u8(n.val[i], vcgtq_s8(vreinterpretq_s8_u8(x.val[i]), vreinterpretq_s8_u8(than.val[i]))));
}
typedef int32x4x4_t vs;
KV_INLINE vs vs_zero(void) { KV_EACH(vs, vdupq_n_s32(0)); }
KV_INLINE vs vs_dot(vs s, vw n, vw x)
{
    KV_EACH(vs, vdotq_s32(s.val[i], vreinterpretq_s8_u8(n.val[i]), vreinterpretq_s8_u8(x.val[i])));
}
KV_INLINE vf vs_float(vs s) { KV_EACH(vf, vcvtq_f32_s32(s.val[i])); }

KV_INLINE vw vw_load(const uint8_t *p) { KV_EACH(vw, vld1q_u8(p + 16 * i)); }
KV_INLINE vw vw_field(vw w, const int shift, const int mask)
{
    KV_EACH(vw, vandq_u8(vshlq_u8(w.val[i], vdupq_n_s8((int8_t)-shift)), vdupq_n_u8((uint8_t)mask)));
}

KV_INLINE vf vw_code(vw w, const int input, const int shift, const int mask)
{
    int32x4_t right = vdupq_n_s32(-(8 * input + shift));
    KV_EACH(vf, vcvtq_f32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(w.val[i]), right), vdupq_n_u32((uint32_t)mask))));
}

KV_INLINE int8x16_t kv_quad(const int8_t *x)
{
    int32_t q;
    memcpy(&q, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(q));
}

KV_INLINE d4 d4_zero(void) { KV_EACH(d4, vdupq_n_s32(0)); }
KV_INLINE d4 d4_dot(d4 s, vw w, const int8_t *x)
{
    int8x16_t q = kv_quad(x);
    KV_EACH(d4, vdotq_s32(s.val[i], vreinterpretq_s8_u8(w.val[i]), q));
}
KV_INLINE vf d4_float(d4 s) { KV_EACH(vf, vcvtq_f32_s32(s.val[i])); }
KV_INLINE vf d4_two(d4 a, d4 b) { KV_EACH(vf, vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(a.val[i], 8), b.val[i]))); }

typedef d4 d6;
KV_INLINE d6 d6_start(int32_t s) { KV_EACH(d6, vdupq_n_s32(s)); }
KV_INLINE d6 d6_dot(d6 s, vw w, vw v, const int8_t *x) { return d4_dot(d4_dot(s, w, x), v, x + 4); }
KV_INLINE vf d6_float(d6 s) { return d4_float(s); }
KV_INLINE vf d6_two(d6 a, d6 b) { return d4_two(a, b); }

KV_INLINE d8 d8_zero(void) { return d4_zero(); }
KV_INLINE d8 d8_dot(d8 s, vw w, const int8_t *x) /* the stored byte without its offset is the signed code */
{
    int8x16_t q = kv_quad(x);
    KV_EACH(d8, vdotq_s32(s.val[i], vreinterpretq_s8_u8(veorq_u8(w.val[i], vdupq_n_u8(0x80))), q));
}
KV_INLINE vf d8_float(d8 s, int32_t sum) { (void)sum; return d4_float(s); }
KV_INLINE vf d8_two(d8 a, d8 b, int32_t offset) { (void)offset; return d4_two(a, b); }
