/* Super-blocks of sixteen blocks of 16: (code - 32) * (d * s), codes 0 ... 63, s of the block in 8 bits with sign.
 *
 * Raw: 128 bytes of low nibbles, 64 bytes of high bit pairs, sixteen s, d (float16). Packed, 16 rows, in pairs of
 * super-blocks: 1 line d [2 super-blocks][16 rows], then for each 4 lines [16 rows][4], s + 128, and 64 lines in 48,
 * four to a block of 16, line l: [16 rows][4 columns]. */
#include "weights/supers.h"

enum { RAW = 210, PACKED = 256 + 3072 }; /* PACKED: without d */

/* Where the pair of super-blocks that has s starts in its panel. */
static inline int64_t pair_at(int64_t s) { return s / 2 * (64 + 2 * PACKED); }

static inline int64_t panel_bytes(int64_t cols)
{
    int64_t supers = cols / KV_SUPER;
    return (supers + 1) / 2 * 64 + supers * PACKED;
}

#ifndef KV_LEVEL

static int raw_code(const uint8_t *raw, int i)
{
    int half = i / 128, quarter = i % 128 / 32, c = i % 32;
    int low = raw[64 * half + quarter % 2 * 32 + c] >> quarter / 2 * 4 & 15;
    return low | (raw[128 + 32 * half + c] >> 2 * quarter & 3) << 4;
}

static void pack(const uint8_t *raw, int64_t r, uint8_t *d, uint8_t *to)
{
    memcpy(d + 2 * r, raw + 208, 2);
    for (int i = 0; i < 16; i++)
        to[64 * (i / 4) + 4 * r + i % 4] = raw[192 + i] ^ 0x80;
    for (int i = 0; i < KV_SUPER; i++)
        kv_put_six(to + 256 + i / 16 * 192, i % 16 / 4, 4 * r + i % 4, raw_code(raw, i));
}

static void unpack(const uint8_t *d, const uint8_t *from, int64_t r, float *x)
{
    for (int block = 0; block < 16; block++) {
        float scale = kv_get_f16(d + 2 * r) * (float)(from[64 * (block / 4) + 4 * r + block % 4] - 128);
        for (int c = 0; c < 16; c++)
            *x++ = scale * (float)(kv_get_six(from + 256 + block * 192, c / 4, 4 * r + c % 4) - 32);
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

static void quantize(const float *values, uint8_t *raw)
{
    f4 x[4][16], scale[4];
    for (int i = 0; i < KV_SUPER; i++)
        x[i / 64][i % 16][i / 16 % 4] = values[i];
    for (int part = 0; part < 4; part++)
        scale[part] = fit_scale(x[part]);
    memset(raw, 0, RAW);
    kv_put_f16(raw + 208, largest_of(scale, 4) / -128);
    const float d = kv_get_f16(raw + 208);
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

static void quantize_row(const float *x, int64_t cols, uint8_t *raw)
{
    for (int64_t s = 0; s < cols / KV_SUPER; s++)
        quantize(x + s * KV_SUPER, raw + s * RAW);
}

static void pack_row(const uint8_t *raw, int64_t cols, int64_t r, uint8_t *panel)
{
    for (int64_t s = 0; s < cols / KV_SUPER; s++) {
        uint8_t *pair = panel + pair_at(s);
        pack(raw + s * RAW, r, pair + s % 2 * 32, pair + 64 + s % 2 * PACKED);
    }
}

static void unpack_row(const uint8_t *panel, int64_t cols, int64_t r, float *x)
{
    for (int64_t s = 0; s < cols / KV_SUPER; s++) {
        const uint8_t *pair = panel + pair_at(s);
        unpack(pair + s % 2 * 32, pair + 64 + s % 2 * PACKED, r, x + s * KV_SUPER);
    }
}

const kv_weight kv_weight_q6_k = {
    .name = "q6_k",
    .ggml_number = 14,
    .block = KV_SUPER,
    .block_bytes = RAW,
    .column_multiple = KV_SUPER,
    .takes_int8 = 1,
    .wants_offset = 1,
    .panel_bytes = panel_bytes,
    .quantize_row = quantize_row,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

#else

/* Scales of the sixteen blocks of a super-block, stored plus 128. */
KV_INLINE void scales_q6_k(vf d, const uint8_t *p, vf *scale)
{
    vf less = vf_mul(d, vf_set1(-128));
    KV_UNROLL
    for (int l = 0; l < 4; l++) {
        vw line = vw_load(p + 64 * l);
        kv_ahead(p + 64 * l);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            scale[4 * l + i] = vf_fma(vw_code(line, i, 0, 255), d, less);
    }
}

KV_INLINE void super_q6_k(const int rows, const uint8_t *p, int64_t s, const some_inputs *in, vf *sum)
{
    vf scale[16], dot[KV_ROWS], v[KV_ROWS];
    p += pair_at(s);
    vf d = vf_load_f16((const uint16_t *)p + s % 2 * 16);
    p += 64 + s % 2 * PACKED;
    scales_q6_k(d, p, scale);
    p += 256;
    KV_NO_UNROLL
    for (int i = 0; i < 8; i++) {
        const int64_t b = 8 * s + i;
        KV_UNROLL
        for (int half = 0; half < 2; half++, p += 192) {
            vw line[4];
            six_bits(p, line);
            kv_ahead(p), kv_ahead(p + 64), kv_ahead(p + 128);
            KV_UNROLL
            for (int r = 0; r < rows; r++) {
                const int8_t *x = in->q + r * in->ld + b * KV_BLOCK + 16 * half;
                d6 n = d6_start(in->offset[(r * in->blocks + b) * 2 + half]);
                dot[r] = d6_float(d6_dot(d6_dot(n, line[0], line[1], x), line[2], line[3], x + 8));
            }
            KV_UNROLL
            for (int r = 0; r < rows; r++)
                v[r] = half ? vf_fma(dot[r], scale[2 * i + 1], v[r]) : vf_mul(dot[r], scale[2 * i]);
        }
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            sum[r] = vf_fma(v[r], vf_set1(in->scale[r * in->blocks + b]), sum[r]);
    }
}

/* Tokens in two planes, put together as integers. */
KV_INLINE void tokens_of_super(const int tokens, const uint8_t *p, int64_t s, const some_inputs *in, vf *sum)
{
    vf scale[16];
    p += pair_at(s);
    vf d = vf_load_f16((const uint16_t *)p + s % 2 * 16);
    p += 64 + s % 2 * PACKED;
    scales_q6_k(d, p, scale);
    p += 256;
    const int8_t *x = in->q + 2 * s * KV_SUPER;
    int32_t start[KV_TOKENS][16];
    float step[KV_TOKENS][8];
    KV_UNROLL
    for (int t = 0; t < tokens; t++) {
        const int64_t at = 2 * t * in->blocks + 8 * s, second = at + in->blocks;
        for (int i = 0; i < 16; i++)
            start[t][i] = 256 * in->offset[2 * at + i] + in->offset[2 * second + i];
        for (int i = 0; i < 8; i++)
            step[t][i] = in->scale[second + i];
    }
    KV_NO_UNROLL
    for (int i = 0; i < 16; i++, p += 192) {
        const int8_t *row[KV_TOKENS];
        vw line[4];
        d6 a[KV_TOKENS], b[KV_TOKENS];
        rows_from(tokens, x + i / 2 * 2 * KV_BLOCK + i % 2 * 16, 2 * in->ld, row);
        six_bits(p, line);
        kv_ahead(p), kv_ahead(p + 64), kv_ahead(p + 128);
        KV_UNROLL
        for (int t = 0; t < tokens; t++) {
            a[t] = d6_start(0);
            b[t] = d6_start(start[t][i]);
        }
        KV_UNROLL
        for (int l = 0; l < 4; l += 2)
            KV_UNROLL
            for (int t = 0; t < tokens; t++) {
                a[t] = d6_dot(a[t], line[l], line[l + 1], row[t] + 4 * l);
                b[t] = d6_dot(b[t], line[l], line[l + 1], row[t] + KV_BLOCK + 4 * l);
            }
        KV_UNROLL
        for (int t = 0; t < tokens; t++)
            sum[t] = vf_fma(d6_two(a[t], b[t]), vf_mul(scale[i], vf_set1(step[t][i / 2])), sum[t]);
    }
}

KV_SUPER_MATMUL(q6_k, panel_bytes(cols), super_q6_k, tokens_of_super)

#endif
