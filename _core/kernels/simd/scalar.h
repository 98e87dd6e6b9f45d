/* The portable level: plain C, the reference for the others. */
#include "f16.h"

#define KV_ROWS 4 /* inputs handled together in matrix products */
#define KV_TOKENS 2 /* in two planes */

typedef struct { float v[16]; } vf;
typedef struct { uint8_t v[64]; } vw;
typedef struct { int32_t v[16]; } d4;
typedef d4 d8;

#define KV_EACH(type, expression)          \
    do {                                   \
        type out_;                         \
        for (int i = 0; i < 16; i++)       \
            out_.v[i] = (expression);      \
        return out_;                       \
    } while (0)

KV_INLINE vf vf_load(const float *p) { vf r; memcpy(r.v, p, 64); return r; }
KV_INLINE void vf_store(float *p, vf a) { memcpy(p, a.v, 64); }
KV_INLINE vf vf_set1(float x) { KV_EACH(vf, x); }
KV_INLINE vf vf_zero(void) { return vf_set1(0); }
KV_INLINE vf vf_add(vf a, vf b) { KV_EACH(vf, a.v[i] + b.v[i]); }
KV_INLINE vf vf_sub(vf a, vf b) { KV_EACH(vf, a.v[i] - b.v[i]); }
KV_INLINE vf vf_mul(vf a, vf b) { KV_EACH(vf, a.v[i] * b.v[i]); }
KV_INLINE vf vf_div(vf a, vf b) { KV_EACH(vf, a.v[i] / b.v[i]); }
KV_INLINE vf vf_fma(vf a, vf b, vf c) { KV_EACH(vf, a.v[i] * b.v[i] + c.v[i]); }
KV_INLINE vf vf_max(vf a, vf b) { KV_EACH(vf, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
KV_INLINE vf vf_min(vf a, vf b) { KV_EACH(vf, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
KV_INLINE vf vf_abs(vf a) { KV_EACH(vf, fabsf(a.v[i])); }
KV_INLINE vf vf_round(vf a) { KV_EACH(vf, rintf(a.v[i])); }
KV_INLINE vf vf_exp2i(vf n) { KV_EACH(vf, kv_bits_float((uint32_t)((int32_t)n.v[i] + 127) << 23)); }
KV_INLINE float vf_sum(vf a) { float s = 0; for (int i = 0; i < 16; i++) s += a.v[i]; return s; }
KV_INLINE float vf_top(vf a) { float m = a.v[0]; for (int i = 1; i < 16; i++) if (a.v[i] > m) m = a.v[i]; return m; }

KV_INLINE vf vf_load_f16(const uint16_t *p) { KV_EACH(vf, kv_f16_float(p[i])); }
KV_INLINE void vf_store_f16(uint16_t *p, vf a) { for (int i = 0; i < 16; i++) p[i] = kv_float_f16(a.v[i]); }
KV_INLINE vf vf_bf16_even(const uint16_t *p) { KV_EACH(vf, kv_bf16_float(p[2 * i])); }
KV_INLINE vf vf_bf16_odd(const uint16_t *p) { KV_EACH(vf, kv_bf16_float(p[2 * i + 1])); }

/* int8 codes round(x * scale) of 16 lanes; their sum is returned. */
KV_INLINE int32_t vf_store_i8(int8_t *p, vf x)
{
    int32_t sum = 0;
    for (int i = 0; i < 16; i++)
        sum += p[i] = (int8_t)rintf(x.v[i]);
    return sum;
}

KV_INLINE void vf_store_codes(int8_t *p, vf x, vf y)
{
    for (int i = 0; i < 16; i++) {
        p[i] = (int8_t)rintf(x.v[i]);
        p[16 + i] = (int8_t)rintf(y.v[i]);
    }
}

/* Tiles */
KV_INLINE vf vf_pick(vf a, vf b, vf x, vf y) { KV_EACH(vf, a.v[i] > b.v[i] ? x.v[i] : y.v[i]); }
KV_INLINE vw vw_pack(vf a, vf b, vf c, vf d)
{
    vw r;
    for (int i = 0; i < 16; i++) {
        r.v[4 * i] = (uint8_t)rintf(a.v[i]);
        r.v[4 * i + 1] = (uint8_t)rintf(b.v[i]);
        r.v[4 * i + 2] = (uint8_t)rintf(c.v[i]);
        r.v[4 * i + 3] = (uint8_t)rintf(d.v[i]);
    }
    return r;
}
KV_INLINE vw vw_or(vw x, vw y, const int shift)
{
    for (int i = 0; i < 64; i++)
        x.v[i] = (uint8_t)(x.v[i] | y.v[i] << shift);
    return x;
}
KV_INLINE void vw_store(uint8_t *p, vw x) { memcpy(p, x.v, 64); }
KV_INLINE vw vw_fill(vf x)
{
    vw r;
    for (int i = 0; i < 64; i++)
        r.v[i] = (uint8_t)(int8_t)rintf(x.v[i / 4]);
    return r;
}
KV_INLINE vw vw_count(vw n, vw x, vw than)
{
    for (int i = 0; i < 64; i++)
        n.v[i] = (uint8_t)(n.v[i] + ((int8_t)x.v[i] > (int8_t)than.v[i]));
    return n;
}
typedef struct { int32_t v[16]; } vs;
KV_INLINE vs vs_zero(void) { KV_EACH(vs, 0); }
KV_INLINE vs vs_dot(vs s, vw n, vw x)
{
    for (int i = 0; i < 64; i++)
        s.v[i / 4] += n.v[i] * (int8_t)x.v[i];
    return s;
}
KV_INLINE vf vs_float(vs s) { KV_EACH(vf, (float)s.v[i]); }

KV_INLINE vw vw_load(const uint8_t *p) { vw r; memcpy(r.v, p, 64); return r; }
KV_INLINE vw vw_field(vw a, const int shift, const int mask)
{
    for (int i = 0; i < 64; i++)
        a.v[i] = a.v[i] >> shift & mask;
    return a;
}

KV_INLINE vf vw_code(vw a, const int input, const int shift, const int mask)
{
    KV_EACH(vf, (float)(a.v[4 * i + input] >> shift & mask));
}

KV_INLINE d4 d4_zero(void) { KV_EACH(d4, 0); }
KV_INLINE d4 d4_dot(d4 a, vw w, const int8_t *x)
{
    for (int i = 0; i < 16; i++)
        for (int c = 0; c < 4; c++)
            a.v[i] += w.v[4 * i + c] * x[c];
    return a;
}
KV_INLINE vf d4_float(d4 a) { KV_EACH(vf, (float)a.v[i]); }
KV_INLINE vf d4_two(d4 a, d4 b) { KV_EACH(vf, (float)(256 * a.v[i] + b.v[i])); }

typedef d4 d6;
KV_INLINE d6 d6_start(int32_t s) { KV_EACH(d6, s); }
KV_INLINE d6 d6_dot(d6 a, vw w, vw v, const int8_t *x) { return d4_dot(d4_dot(a, w, x), v, x + 4); }
KV_INLINE vf d6_float(d6 a) { return d4_float(a); }
KV_INLINE vf d6_two(d6 a, d6 b) { return d4_two(a, b); }

KV_INLINE d8 d8_zero(void) { return d4_zero(); }
KV_INLINE d8 d8_dot(d8 a, vw w, const int8_t *x) { return d4_dot(a, w, x); }
KV_INLINE vf d8_float(d8 a, int32_t sum) { KV_EACH(vf, (float)(a.v[i] - 128 * sum)); }
KV_INLINE vf d8_two(d8 a, d8 b, int32_t offset) { KV_EACH(vf, (float)(256 * a.v[i] + b.v[i] - offset)); }
