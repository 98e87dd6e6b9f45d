/* Packing and quantisation of the types with super-blocks of 256 channels, q4_k and q6_k, for pack.c. Portable, like
 * that file, and compiled like it.
 *
 * GGML's layouts of a super-block. q4_k: d and dmin (float16), 12 bytes with eight 6-bit scales and eight 6-bit
 * minimums of 32 channels each, 128 bytes of nibbles; value (d scale) code - (dmin minimum). q6_k: 128 bytes of low
 * nibbles, 64 bytes of high bit pairs, sixteen int8 scales of 16 channels each, d; value (d scale) (code - 32). */
#include <math.h>
#include <string.h>

#include "f16.h"
#include "kernels.h"
#include "weights/kpack.h"

static void put_f16(uint8_t *p, float f) { uint16_t h = kv_float_f16(f); memcpy(p, &h, 2); }
static float get_f16(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return kv_f16_float(h); }

/* Packed: six-bit numbers ------------------------------------------------------------------------------------------*/

/* Byte `at` of line l of four, of which only three are stored: their two high bits are the fourth. */
static void put_six(uint8_t *lines, int l, int64_t at, int value)
{
    if (l < 3)
        lines[64 * l + at] |= (uint8_t)value;
    else
        for (int i = 0; i < 3; i++)
            lines[64 * i + at] |= (uint8_t)((value >> 2 * i & 3) << 6);
}

static int get_six(const uint8_t *lines, int l, int64_t at)
{
    if (l < 3)
        return lines[64 * l + at] & 63;
    return lines[at] >> 6 | lines[64 + at] >> 6 << 2 | lines[128 + at] >> 6 << 4;
}

/* Packed and raw ---------------------------------------------------------------------------------------------------*/

/* Scale and minimum i of a raw q4_k super-block: the first four of each in six bits of a byte of their own, of the last
 * four the low four bits in a nibble and the others above those. */
static int raw_scale(const uint8_t *s, int i) { return i < 4 ? s[i] & 63 : (s[i + 4] & 15) | s[i - 4] >> 6 << 4; }
static int raw_minimum(const uint8_t *s, int i) { return i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | s[i] >> 6 << 4; }

static void pack_q4_k(const uint8_t *raw, int64_t r, uint8_t *to)
{
    memcpy(to + 2 * r, raw, 2);
    memcpy(to + 32 + 2 * r, raw + 2, 2);
    for (int i = 0; i < 8; i++) {
        put_six(to + 64, i / 4, 4 * r + i % 4, raw_scale(raw + 4, i));
        put_six(to + 64, 2 + i / 4, 4 * r + i % 4, raw_minimum(raw + 4, i));
    }
    for (int i = 0; i < KV_SUPER; i++) {
        int block = i / 32, c = i % 32, code = raw[16 + block / 2 * 32 + c] >> block % 2 * 4 & 15;
        to[256 + block * 256 + c % 16 / 4 * 64 + 4 * r + c % 4] |= (uint8_t)(code << c / 16 * 4);
    }
}

static void unpack_q4_k(const uint8_t *from, int64_t r, float *x)
{
    float d = get_f16(from + 2 * r), dmin = get_f16(from + 32 + 2 * r);
    for (int block = 0; block < 8; block++) {
        float scale = d * (float)get_six(from + 64, block / 4, 4 * r + block % 4);
        float minimum = dmin * (float)get_six(from + 64, 2 + block / 4, 4 * r + block % 4);
        for (int c = 0; c < 32; c++) {
            int code = from[256 + block * 256 + c % 16 / 4 * 64 + 4 * r + c % 4] >> c / 16 * 4 & 15;
            *x++ = scale * (float)code - minimum;
        }
    }
}

static int raw_code_6(const uint8_t *raw, int i)
{
    int half = i / 128, quarter = i % 128 / 32, c = i % 32;
    int low = raw[64 * half + quarter % 2 * 32 + c] >> quarter / 2 * 4 & 15;
    return low | (raw[128 + 32 * half + c] >> 2 * quarter & 3) << 4;
}

static void pack_q6_k(const uint8_t *raw, int64_t r, uint8_t *d, uint8_t *to)
{
    memcpy(d + 2 * r, raw + 208, 2);
    for (int i = 0; i < 16; i++)
        to[64 * (i / 4) + 4 * r + i % 4] = raw[192 + i] ^ 0x80;
    for (int i = 0; i < KV_SUPER; i++)
        put_six(to + 256 + i / 16 * 192, i % 16 / 4, 4 * r + i % 4, raw_code_6(raw, i));
}

static void unpack_q6_k(const uint8_t *d, const uint8_t *from, int64_t r, float *x)
{
    for (int block = 0; block < 16; block++) {
        float scale = get_f16(d + 2 * r) * (float)(from[64 * (block / 4) + 4 * r + block % 4] - 128);
        for (int c = 0; c < 16; c++)
            *x++ = scale * (float)(get_six(from + 256 + block * 192, c / 4, 4 * r + c % 4) - 32);
    }
}

void kv_pack_super_row(int type, const uint8_t *raw, int64_t supers, int64_t r, uint8_t *panel)
{
    for (int64_t s = 0; s < supers; s++) {
        uint8_t *pair = panel + kv_q6_k_pair(s);
        if (type == KV_Q4_K)
            pack_q4_k(raw + s * Q4_K_BYTES, r, panel + s * Q4_K_PACKED);
        else
            pack_q6_k(raw + s * Q6_K_BYTES, r, pair + s % 2 * 32, pair + 64 + s % 2 * Q6_K_PACKED);
    }
}

void kv_unpack_super_row(int type, const uint8_t *panel, int64_t supers, int64_t r, float *x)
{
    for (int64_t s = 0; s < supers; s++, x += KV_SUPER) {
        const uint8_t *pair = panel + kv_q6_k_pair(s);
        if (type == KV_Q4_K)
            unpack_q4_k(panel + s * Q4_K_PACKED, r, x);
        else
            unpack_q6_k(pair + s % 2 * 32, pair + 64 + s % 2 * Q6_K_PACKED, r, x);
    }
}

/* Quantisation: four blocks at a time, a lane each -----------------------------------------------------------------*/

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

static f4 pick(i4 mask, f4 a, f4 b) { return (f4)((mask & (i4)a) | (~mask & (i4)b)); }
static f4 larger(f4 a, f4 b) { return pick(a > b, a, b); }
static f4 smaller(f4 a, f4 b) { return pick(a < b, a, b); }
static f4 whole(f4 x) { return x + 12582912.0f - 12582912.0f; } /* to nearest, of less than 2^22 */
/* Codes of x: whole numbers from low to high; low for what is not a number. */
static f4 code(f4 x, float low, float high)
{
    return whole(smaller(larger(x, (f4){low, low, low, low}), (f4){high, high, high, high}));
}
static f4 inverse_of(f4 x) { return pick(x != 0.0f, 1.0f / x, (f4){0}); }

static float largest_of(const f4 *x, int n) /* by size, with its sign */
{
    float top = 0;
    for (int i = 0; i < 4 * n; i++)
        if (fabsf(x[i / 4][i % 4]) > fabsf(top))
            top = x[i / 4][i % 4];
    return top;
}

/* Scale and minimum (>= 0) of least squared error for x ~ scale code - minimum, codes 0..15: the codes that some scale
 * around range / 15 gives, and to these codes the best line. */
static void fit_line(const f4 *x, f4 *scale, f4 *minimum)
{
    f4 low = {0}, high = x[0], sum = {0}, best = {0};
    for (int i = 0; i < 32; i++) {
        low = smaller(low, x[i]);
        high = larger(high, x[i]);
    }
    f4 range = high - low, inverse = inverse_of(range);
    for (int i = 0; i < 32; i++)
        sum += x[i] - low;
    *scale = range / 15.0f;
    *minimum = -low;
    for (int step = 0; step <= 20; step++) {
        f4 by = (14 + 0.1f * (float)step) * inverse, n = {0}, nn = {0}, xn = {0};
        for (int i = 0; i < 32; i++) {
            f4 y = x[i] - low, c = code(y * by, 0, 15);
            n += c;
            nn += c * c;
            xn += y * c;
        }
        f4 d = 32.0f * nn - n * n, s = (32.0f * xn - sum * n) / d, b = (nn * sum - n * xn) / d;
        i4 above = b + low > 0.0f; /* then the best line without a minimum */
        b = pick(above, -low, b);
        s = pick(above, (xn - b * n) / nn, s);
        f4 error = s * (s * nn + 2.0f * (b * n - xn)) + b * (32.0f * b - 2.0f * sum); /* less that of all zeros */
        i4 better = (error < best) & (d > 0.0f) & (s > 0.0f);
        best = pick(better, error, best);
        *scale = pick(better, s, *scale);
        *minimum = pick(better, -low - b, *minimum);
    }
}

/* Of scales and minimums next to those given, in whole steps of d and dmin, the ones of least squared error. */
static void refine_line(const f4 *x, float d, float dmin, f4 *scale, f4 *minimum)
{
    f4 best = {INFINITY, INFINITY, INFINITY, INFINITY}, from_s = *scale, from_m = *minimum;
    for (int i = 0; i < 9; i++) {
        f4 s = code(from_s + (float)(i / 3 - 1), 0, 63), m = code(from_m + (float)(i % 3 - 1), 0, 63);
        f4 step = s * d, low = m * dmin, inverse = inverse_of(step), error = {0};
        for (int j = 0; j < 32; j++) {
            f4 e = step * code((x[j] + low) * inverse, 0, 15) - low - x[j];
            error += e * e;
        }
        i4 better = error < best;
        best = pick(better, error, best);
        *scale = pick(better, s, *scale);
        *minimum = pick(better, m, *minimum);
    }
}

static void quantize_q4_k(const float *values, uint8_t *raw)
{
    f4 x[2][32], scale[2], minimum[2];
    for (int i = 0; i < KV_SUPER; i++)
        x[i / 128][i % 32][i / 32 % 4] = values[i];
    for (int half = 0; half < 2; half++)
        fit_line(x[half], &scale[half], &minimum[half]);
    put_f16(raw, largest_of(scale, 2) / 63);
    put_f16(raw + 2, largest_of(minimum, 2) / 63);
    const float d = get_f16(raw), dmin = get_f16(raw + 2);
    memset(raw + 4, 0, Q4_K_BYTES - 4);
    for (int half = 0; half < 2; half++) {
        f4 *s = &scale[half], *m = &minimum[half];
        *s = code(*s * (d > 0 ? 1 / d : 0), 0, 63);
        *m = code(*m * (dmin > 0 ? 1 / dmin : 0), 0, 63);
        refine_line(x[half], d, dmin, s, m);
        for (int lane = 0; lane < 4; lane++) {
            int i = 4 * half + lane, a = (int)(*s)[lane], b = (int)(*m)[lane];
            raw[4 + lane + (i < 4 ? 0 : 8)] |= (uint8_t)(i < 4 ? a : (a & 15) | (b & 15) << 4);
            raw[4 + lane + 4] |= (uint8_t)(i < 4 ? b : b >> 4 << 6);
            raw[4 + lane] |= (uint8_t)(i < 4 ? 0 : a >> 4 << 6);
        }
        f4 inverse = inverse_of(*s * d);
        for (int c = 0; c < 32; c++) {
            f4 q = code((x[half][c] + *m * dmin) * inverse, 0, 15);
            for (int lane = 0; lane < 4; lane++)
                raw[16 + (2 * half + lane / 2) * 32 + c] |= (uint8_t)((int)q[lane] << lane % 2 * 4);
        }
    }
}

/* Scale of least squared error for x ~ scale code, codes -32..31: the codes that some scale around extreme / -32 gives,
 * and to these the best scale. */
static f4 fit_scale(const f4 *x)
{
    f4 extreme = {0}, size = {0}, best = {0}, scale = {0};
    for (int i = 0; i < 16; i++) {
        i4 more = x[i] * x[i] > size;
        extreme = pick(more, x[i], extreme);
        size = pick(more, x[i] * x[i], size);
    }
    f4 inverse = inverse_of(extreme);
    for (int step = -9; step <= 9; step++) {
        f4 by = -(32 + 0.1f * (float)step) * inverse, nn = {0}, xn = {0};
        for (int i = 0; i < 16; i++) {
            f4 c = code(x[i] * by, -32, 31);
            nn += c * c;
            xn += x[i] * c;
        }
        f4 s = xn * inverse_of(nn);
        i4 better = s * xn > best; /* by how much the squared error is less */
        best = pick(better, s * xn, best);
        scale = pick(better, s, scale);
    }
    return scale;
}

static f4 refine_scale(const f4 *x, float d, f4 scale)
{
    f4 best = {INFINITY, INFINITY, INFINITY, INFINITY}, from = scale;
    for (int i = -1; i <= 1; i++) {
        f4 s = code(from + (float)i, -128, 127), step = s * d, inverse = inverse_of(step), error = {0};
        for (int j = 0; j < 16; j++) {
            f4 e = step * code(x[j] * inverse, -32, 31) - x[j];
            error += e * e;
        }
        i4 better = error < best;
        best = pick(better, error, best);
        scale = pick(better, s, scale);
    }
    return scale;
}

static void quantize_q6_k(const float *values, uint8_t *raw)
{
    f4 x[4][16], scale[4];
    for (int i = 0; i < KV_SUPER; i++)
        x[i / 64][i % 16][i / 16 % 4] = values[i];
    for (int part = 0; part < 4; part++)
        scale[part] = fit_scale(x[part]);
    memset(raw, 0, Q6_K_BYTES);
    put_f16(raw + 208, largest_of(scale, 4) / -128);
    const float d = get_f16(raw + 208);
    for (int part = 0; part < 4; part++) {
        f4 s = refine_scale(x[part], d, code(scale[part] * (d != 0 ? 1 / d : 0), -128, 127));
        f4 inverse = inverse_of(s * d);
        for (int lane = 0; lane < 4; lane++)
            raw[192 + 4 * part + lane] = (uint8_t)(int8_t)s[lane];
        for (int c = 0; c < 16; c++) {
            f4 q = code(x[part][c] * inverse, -32, 31) + 32.0f;
            for (int lane = 0; lane < 4; lane++) {
                int i = 64 * part + 16 * lane + c, quarter = i % 128 / 32, n = (int)q[lane];
                raw[64 * (i / 128) + quarter % 2 * 32 + i % 32] |= (uint8_t)((n & 15) << quarter / 2 * 4);
                raw[128 + 32 * (i / 128) + i % 32] |= (uint8_t)(n >> 4 << 2 * quarter);
            }
        }
    }
}

void kv_quantize_super_row(int type, const float *x, int64_t supers, uint8_t *raw)
{
    for (int64_t s = 0; s < supers; s++, x += KV_SUPER)
        if (type == KV_Q4_K)
            quantize_q4_k(x, raw + s * Q4_K_BYTES);
        else
            quantize_q6_k(x, raw + s * Q6_K_BYTES);
}
