/* Super-blocks of eight blocks of 32: code * (d * s) - e * m, codes 0 ... 15, s and m of the block in 6 bits.
 *
 * Raw: d and e (float16), 12 bytes with eight s and eight m, 128 bytes of nibbles. Packed, 16 rows: 1 line d and e;
 * 4 lines in three [16 rows][4], s of blocks 0-3 and 4-7, m of the same; 32 lines, codes of each block as in q4_0. */
#include "weights/supers.h"

enum { RAW = 144, PACKED = 64 + 192 + 2048 };

static inline int64_t panel_bytes(int64_t cols) { return cols / KV_SUPER * PACKED; }

#ifndef KV_LEVEL

/* Scale and minimum i of a raw super-block: the first four of each in six bits of a byte of their own, of the last
 * four the low four bits in a nibble and the others above those. */
static int raw_scale(const uint8_t *s, int i) { return i < 4 ? s[i] & 63 : (s[i + 4] & 15) | s[i - 4] >> 6 << 4; }
static int raw_minimum(const uint8_t *s, int i) { return i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | s[i] >> 6 << 4; }

static void pack(const uint8_t *raw, int64_t r, uint8_t *to)
{
    memcpy(to + 2 * r, raw, 2);
    memcpy(to + 32 + 2 * r, raw + 2, 2);
    for (int i = 0; i < 8; i++) {
        kv_put_six(to + 64, i / 4, 4 * r + i % 4, raw_scale(raw + 4, i));
        kv_put_six(to + 64, 2 + i / 4, 4 * r + i % 4, raw_minimum(raw + 4, i));
    }
    for (int i = 0; i < KV_SUPER; i++) {
        int block = i / 32, c = i % 32, code = raw[16 + block / 2 * 32 + c] >> block % 2 * 4 & 15;
        to[256 + block * 256 + c % 16 / 4 * 64 + 4 * r + c % 4] |= (uint8_t)(code << c / 16 * 4);
    }
}

static void unpack(const uint8_t *from, int64_t r, float *x)
{
    float d = kv_get_f16(from + 2 * r), dmin = kv_get_f16(from + 32 + 2 * r);
    for (int block = 0; block < 8; block++) {
        float scale = d * (float)kv_get_six(from + 64, block / 4, 4 * r + block % 4);
        float minimum = dmin * (float)kv_get_six(from + 64, 2 + block / 4, 4 * r + block % 4);
        for (int c = 0; c < 32; c++) {
            int code = from[256 + block * 256 + c % 16 / 4 * 64 + 4 * r + c % 4] >> c / 16 * 4 & 15;
            *x++ = scale * (float)code - minimum;
        }
    }
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

static void quantize(const float *values, uint8_t *raw)
{
    f4 x[2][32], scale[2], minimum[2];
    for (int i = 0; i < KV_SUPER; i++)
        x[i / 128][i % 32][i / 32 % 4] = values[i];
    for (int half = 0; half < 2; half++)
        fit_line(x[half], &scale[half], &minimum[half]);
    kv_put_f16(raw, largest_of(scale, 2) / 63);
    kv_put_f16(raw + 2, largest_of(minimum, 2) / 63);
    const float d = kv_get_f16(raw), dmin = kv_get_f16(raw + 2);
    memset(raw + 4, 0, RAW - 4);
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

static void quantize_row(const float *x, int64_t cols, uint8_t *raw)
{
    for (int64_t s = 0; s < cols / KV_SUPER; s++)
        quantize(x + s * KV_SUPER, raw + s * RAW);
}

static void pack_row(const uint8_t *raw, int64_t cols, int64_t r, uint8_t *panel)
{
    for (int64_t s = 0; s < cols / KV_SUPER; s++)
        pack(raw + s * RAW, r, panel + s * PACKED);
}

static void unpack_row(const uint8_t *panel, int64_t cols, int64_t r, float *x)
{
    for (int64_t s = 0; s < cols / KV_SUPER; s++)
        unpack(panel + s * PACKED, r, x + s * KV_SUPER);
}

const kv_weight kv_weight_q4_k = {
    .name = "q4_k",
    .ggml_number = 12,
    .block = KV_SUPER,
    .block_bytes = RAW,
    .column_multiple = KV_SUPER,
    .takes_int8 = 1,
    .panel_bytes = panel_bytes,
    .quantize_row = quantize_row,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

#else

/* Scales of the eight blocks of a super-block, and minimums, negative. */
KV_INLINE void scales_q4_k(const uint8_t *p, vf *scale, vf *minimum)
{
    vf d = vf_load_f16((const uint16_t *)p), dmin = vf_sub(vf_zero(), vf_load_f16((const uint16_t *)p + 16));
    vw line[4];
    six_bits(p + 64, line);
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        kv_ahead(p + 64 * i);
        scale[i] = vf_mul(d, vw_code(line[0], i, 0, 63));
        scale[4 + i] = vf_mul(d, vw_code(line[1], i, 0, 63));
        minimum[i] = vf_mul(dmin, vw_code(line[2], i, 0, 63));
        minimum[4 + i] = vf_mul(dmin, vw_code(line[3], i, 0, 63));
    }
}

KV_INLINE void super_q4_k(const int rows, const uint8_t *p, int64_t s, const some_inputs *in, vf *sum)
{
    vf scale[8], minimum[8], dot[KV_ROWS];
    scales_q4_k(p + s * PACKED, scale, minimum);
    p += s * PACKED + 256;
    KV_NO_UNROLL
    for (int i = 0; i < 8; i++, p += 256) {
        const int64_t b = 8 * s + i;
        dot_codes(4, 4, rows, p, in->q + b * KV_BLOCK, in->ld, in->sum + b, in->blocks, dot);
        KV_UNROLL
        for (int r = 0; r < rows; r++) {
            float d = in->scale[r * in->blocks + b], x = (float)in->sum[r * in->blocks + b];
            vf v = vf_mul(dot[r], vf_set1(d));
            sum[r] = vf_fma(minimum[i], vf_set1(d * x), sum[r]);
            sum[r] = vf_fma(v, scale[i], sum[r]);
        }
    }
}

/* Tokens in two planes, put together as integers (dot_two). */
KV_INLINE void tokens_of_super(const int tokens, const uint8_t *p, int64_t s, const some_inputs *in, vf *sum)
{
    vf products[KV_TOKENS], minimums[KV_TOKENS], dot[KV_TOKENS];
    vw line[4];
    p += s * PACKED;
    const uint16_t *d = (const uint16_t *)p;
    six_bits(p + 64, line);
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        kv_ahead(p + 64 * i);
    float x[KV_TOKENS][8]; /* sums of each block's inputs */
    KV_UNROLL
    for (int t = 0; t < tokens; t++) {
        const int64_t at = 2 * t * in->blocks + 8 * s, second = at + in->blocks;
        products[t] = minimums[t] = vf_zero();
        for (int i = 0; i < 8; i++)
            x[t][i] = in->scale[second + i] * (float)(256 * in->sum[at + i] + in->sum[second + i]);
    }
    const int8_t *q = in->q + 2 * s * KV_SUPER;
    const float *step = in->scale + in->blocks + 8 * s;
    p += 256;
    KV_NO_UNROLL
    for (int half = 0; half < 2; half++)
        KV_UNROLL
        for (int i = 0; i < 4; i++, p += 256, q += 2 * KV_BLOCK) {
            dot_two(4, tokens, p, q, 2 * in->ld, NULL, dot);
            const vf minimum = vw_code(line[2 + half], i, 0, 63), scale = vw_code(line[half], i, 0, 63);
            KV_UNROLL
            for (int t = 0; t < tokens; t++) {
                const float by = step[2 * t * in->blocks + 4 * half + i];
                minimums[t] = vf_fma(minimum, vf_set1(x[t][4 * half + i]), minimums[t]);
                products[t] = vf_fma(dot[t], vf_mul(scale, vf_set1(by)), products[t]);
            }
        }
    KV_UNROLL
    for (int t = 0; t < tokens; t++) {
        sum[t] = vf_fma(products[t], vf_load_f16(d), sum[t]);
        sum[t] = vf_sub(sum[t], vf_mul(minimums[t], vf_load_f16(d + 16)));
    }
}

KV_SUPER_MATMUL(q4_k, panel_bytes(cols), super_q4_k, tokens_of_super)

#endif
