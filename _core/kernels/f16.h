/* Portable conversions between float32 and the two 16-bit formats, round to nearest even. */
#ifndef KVRUN_F16_H
#define KVRUN_F16_H

#include <stdint.h>
#include <string.h>

static inline float kv_bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t kv_float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float kv_f16_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 31)
        return kv_bits_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent)
        return kv_bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float subnormal = (float)mantissa * 0x1p-24f;
    return kv_bits_float(sign | kv_float_bits(subnormal));
}

static inline uint16_t kv_float_f16(float f)
{
    uint32_t u = kv_float_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a >= 0x7f800000)
        return (uint16_t)(sign | 0x7c00 | (a > 0x7f800000 ? 0x200 | (a >> 13 & 0x3ff) : 0));
    if (a >= 0x477ff000) /* rounds to 2^16: infinity */
        return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000) { /* subnormal: adding 1/2 puts the rounded mantissa in the low bits */
        uint32_t r = kv_float_bits(kv_bits_float(a) + 0.5f) - 0x3f000000;
        return (uint16_t)(sign | r);
    }
    a += 0xc8000fff + (a >> 13 & 1);
    return (uint16_t)(sign | a >> 13);
}

static inline void kv_put_f16(uint8_t *p, float f) { uint16_t h = kv_float_f16(f); memcpy(p, &h, 2); }
static inline float kv_get_f16(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return kv_f16_float(h); }

static inline float kv_bf16_float(uint16_t h) { return kv_bits_float((uint32_t)h << 16); }

static inline uint16_t kv_float_bf16(float f)
{
    uint32_t u = kv_float_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#endif
