/* Blocks of 32: (code - 16) * d, codes 0 ... 31.
 *
 * Raw: d (float16), 32 high bits, 16 bytes of low nibbles, byte j those of columns j and 16 + j. Packed: eight lines
 * [16 rows][4], line l the codes of columns 4l..4l+3, in five: the first five have theirs in the low bits, and the
 * three high bits of those hold the others, each from its lowest bit on: line 5 in line 0 and the two highest of line 1,
 * line 6 likewise in lines 2 and 3, line 7 in line 4 and what is left of lines 1 and 3. */
#include "weights/blocks.h"

enum { RAW = 22, HEAD = 64, CODES = 320 };

#ifndef KV_LEVEL

static void quantize(const float *x, uint8_t *raw)
{
    float extreme = 0;
    for (int i = 0; i < KV_BLOCK; i++)
        if (fabsf(x[i]) > fabsf(extreme))
            extreme = x[i];
    const float d = extreme / -16, inverse = d ? 1 / d : 0;
    kv_put_f16(raw, d);
    memset(raw + 2, 0, RAW - 2);
    for (int i = 0; i < KV_BLOCK; i++) {
        const float v = x[i] * inverse + 16.5f;
        const int code = v < 31 ? (int)v : 31;
        raw[2 + i / 8] |= (uint8_t)(code >> 4 << i % 8);
        raw[6 + i % 16] |= (uint8_t)((code & 15) << i / 16 * 4);
    }
}

/* Byte `at` of line l of eight. */
static void put_five(uint8_t *lines, int l, int64_t at, int code)
{
    if (l < 5) {
        lines[64 * l + at] |= (uint8_t)code;
    } else if (l < 7) {
        lines[64 * (2 * l - 10) + at] |= (uint8_t)(code << 5);
        lines[64 * (2 * l - 9) + at] |= (uint8_t)(code >> 3 << 6);
    } else {
        lines[64 * 4 + at] |= (uint8_t)(code << 5);
        lines[64 * 1 + at] |= (uint8_t)((code >> 3 & 1) << 5);
        lines[64 * 3 + at] |= (uint8_t)(code >> 4 << 5);
    }
}

static int get_five(const uint8_t *lines, int l, int64_t at)
{
    if (l < 5)
        return lines[64 * l + at] & 31;
    if (l < 7)
        return lines[64 * (2 * l - 10) + at] >> 5 | lines[64 * (2 * l - 9) + at] >> 6 << 3;
    return lines[64 * 4 + at] >> 5 | (lines[64 * 1 + at] >> 5 & 1) << 3 | (lines[64 * 3 + at] >> 5 & 1) << 4;
}

static void pack(const uint8_t *raw, int64_t r, uint8_t *head, uint8_t *codes)
{
    memcpy(head + 2 * r, raw, 2);
    for (int c = 0; c < KV_BLOCK; c++)
        put_five(codes, c / 4, 4 * r + c % 4,
                 (raw[6 + c % 16] >> c / 16 * 4 & 15) | (raw[2 + c / 8] >> c % 8 & 1) << 4);
}

static void unpack(const uint8_t *head, const uint8_t *codes, int64_t r, float *x)
{
    const float d = kv_get_f16(head + 2 * r);
    for (int c = 0; c < KV_BLOCK; c++)
        x[c] = (float)(get_five(codes, c / 4, 4 * r + c % 4) - 16) * d;
}

KV_BLOCK_ROWS(RAW, HEAD, CODES)

const kv_weight kv_weight_q5_0 = {
    .name = "q5_0",
    .ggml_number = 6,
    .block = KV_BLOCK,
    .block_bytes = RAW,
    .column_multiple = 1,
    .takes_int8 = 1,
    .panel_bytes = panel_bytes,
    .quantize_row = quantize_row,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

#else

/* Eight lines of five-bit numbers from five. */
KV_INLINE void five_bits(const uint8_t *p, vw line[8])
{
    vw stored[5];
    KV_UNROLL
    for (int l = 0; l < 5; l++) {
        stored[l] = vw_load(p + 64 * l);
        kv_ahead(p + 64 * l);
        line[l] = vw_field(stored[l], 0, 31);
    }
    line[5] = vw_or(vw_field(stored[0], 5, 7), vw_field(stored[1], 3, 24), 0);
    line[6] = vw_or(vw_field(stored[2], 5, 7), vw_field(stored[3], 3, 24), 0);
    line[7] = vw_or(vw_or(vw_field(stored[4], 5, 7), vw_field(stored[1], 2, 8), 0), vw_field(stored[3], 1, 16), 0);
}

KV_INLINE void rows_q5_0(const int rows, const uint8_t *panel, const kv_input *in, int64_t first, float *out,
                         int64_t ld_out, int add)
{
    const int64_t blocks = in->blocks, ld = blocks * KV_BLOCK;
    const int8_t *x = in->q + first * ld;
    const float *x_scale = in->scale + first * blocks;
    const int32_t *x_sum = in->sum + first * blocks;
    vf sum[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        sum[r] = add ? vf_load(out + r * ld_out) : vf_zero();
    for (int64_t b = 0; b < blocks; b++, x += KV_BLOCK) {
        const uint8_t *pair = panel + b / 2 * (HEAD + 2 * CODES);
        const vf scale = vf_load_f16((const uint16_t *)pair + b % 2 * 16);
        vw line[8];
        d6 dot[KV_ROWS];
        five_bits(pair + HEAD + b % 2 * CODES, line);
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            dot[r] = d6_start(-16 * x_sum[r * blocks + b]);
        KV_UNROLL
        for (int l = 0; l < 8; l += 2)
            KV_UNROLL
            for (int r = 0; r < rows; r++)
                dot[r] = d6_dot(dot[r], line[l], line[l + 1], x + r * ld + 4 * l);
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            sum[r] = vf_fma(vf_mul(d6_float(dot[r]), vf_set1(x_scale[r * blocks + b])), scale, sum[r]);
    }
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        vf_store(out + r * ld_out, sum[r]);
}

/* Tokens in two planes, put together as integers. */
KV_INLINE void tokens_q5_0(const int tokens, const uint8_t *panel, const kv_input *in, int64_t first, float *out,
                           int64_t ld_out, int add)
{
    const int64_t blocks = in->blocks, ld = 2 * blocks * KV_BLOCK;
    const int8_t *x = in->q + first * ld;
    const float *step = in->scale + (2 * first + 1) * blocks;
    const int32_t *x_sum = in->sum + 2 * first * blocks;
    vf sum[KV_TOKENS];
    KV_UNROLL
    for (int t = 0; t < tokens; t++)
        sum[t] = add ? vf_load(out + t * ld_out) : vf_zero();
    for (int64_t b = 0; b < blocks; b++, x += 2 * KV_BLOCK) {
        const uint8_t *pair = panel + b / 2 * (HEAD + 2 * CODES);
        const vf scale = vf_load_f16((const uint16_t *)pair + b % 2 * 16);
        const int8_t *row[KV_TOKENS];
        vw line[8];
        d6 one[KV_TOKENS], two[KV_TOKENS];
        rows_from(tokens, x, ld, row);
        KV_UNROLL
        for (int t = 0; t < tokens; t++) {
            one[t] = d6_start(0);
            two[t] = d6_start(-16 * (256 * x_sum[2 * t * blocks + b] + x_sum[(2 * t + 1) * blocks + b]));
        }
        five_bits(pair + HEAD + b % 2 * CODES, line);
        KV_UNROLL
        for (int l = 0; l < 8; l += 2)
            KV_UNROLL
            for (int t = 0; t < tokens; t++) {
                one[t] = d6_dot(one[t], line[l], line[l + 1], row[t] + 4 * l);
                two[t] = d6_dot(two[t], line[l], line[l + 1], row[t] + KV_BLOCK + 4 * l);
            }
        KV_UNROLL
        for (int t = 0; t < tokens; t++)
            sum[t] = vf_fma(d6_two(one[t], two[t]), vf_mul(scale, vf_set1(step[2 * t * blocks + b])), sum[t]);
    }
    KV_UNROLL
    for (int t = 0; t < tokens; t++)
        vf_store(out + t * ld_out, sum[t]);
}

KV_MATMUL(q5_0, kv_block_panel_bytes(HEAD, CODES, cols), rows_q5_0, tokens_q5_0)

#endif
