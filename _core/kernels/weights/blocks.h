/* Types with blocks of 32 columns. Blocks of a panel come in pairs: the float16 scales of both [2][16 rows], with q4_1
 * their minimums likewise, then the codes of each.
 *
 * Like every file of a type, this is compiled without KV_LEVEL for what is portable, and once for each level. */
#ifndef KVRUN_BLOCKS_H
#define KVRUN_BLOCKS_H

#include "kernels.h"

/* Of a panel whose pairs begin with `head` bytes, and whose blocks have `codes` bytes. */
static inline int64_t kv_block_panel_bytes(int64_t head, int64_t codes, int64_t cols)
{
    int64_t blocks = (cols + KV_BLOCK - 1) / KV_BLOCK;
    return (blocks + 1) / 2 * head + blocks * codes;
}

#ifndef KV_LEVEL

#include <math.h>

#include "f16.h"

static inline int64_t kv_part_of_block(int64_t cols, int64_t b)
{
    return cols - b * KV_BLOCK < KV_BLOCK ? cols - b * KV_BLOCK : KV_BLOCK;
}

/* Defines panel_bytes, quantize_row, pack_row and unpack_row, as a row of the table has them, of a type whose raw
 * blocks have RAW bytes, from
 *   quantize(x, raw)              one block of 32 numbers
 *   pack(raw, r, head, codes)     row r of a panel; head: where the float16 numbers of the block's 16 rows are
 *   unpack(head, codes, r, x) */
#define KV_BLOCK_ROWS(RAW, HEAD, CODES)                                                                                \
    static int64_t panel_bytes(int64_t cols) { return kv_block_panel_bytes(HEAD, CODES, cols); }                       \
    static void quantize_row(const float *x, int64_t cols, uint8_t *raw)                                               \
    {                                                                                                                  \
        for (int64_t b = 0; b * KV_BLOCK < cols; b++) {                                                                \
            float block[KV_BLOCK] = {0};                                                                               \
            memcpy(block, x + b * KV_BLOCK, (size_t)kv_part_of_block(cols, b) * sizeof(float));                        \
            quantize(block, raw + b * (RAW));                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void pack_row(const uint8_t *raw, int64_t cols, int64_t r, uint8_t *panel)                                  \
    {                                                                                                                  \
        for (int64_t b = 0; b * KV_BLOCK < cols; b++) {                                                                \
            uint8_t *pair = panel + b / 2 * ((HEAD) + 2 * (CODES));                                                    \
            pack(raw + b * (RAW), r, pair + b % 2 * 32, pair + (HEAD) + b % 2 * (CODES));                              \
        }                                                                                                              \
    }                                                                                                                  \
    static void unpack_row(const uint8_t *panel, int64_t cols, int64_t r, float *x)                                    \
    {                                                                                                                  \
        for (int64_t b = 0; b * KV_BLOCK < cols; b++) {                                                                \
            const uint8_t *pair = panel + b / 2 * ((HEAD) + 2 * (CODES));                                              \
            float block[KV_BLOCK];                                                                                     \
            unpack(pair + b % 2 * 32, pair + (HEAD) + b % 2 * (CODES), r, block);                                      \
            memcpy(x + b * KV_BLOCK, block, (size_t)kv_part_of_block(cols, b) * sizeof(float));                        \
        }                                                                                                              \
    }

/* 4-bit codes, raw: nibble j has columns j and 16 + j. Packed, line l: [16 rows][4], columns 4l+c and 16 + 4l+c. */
static inline int kv_nibble(float v) { return v < 15 ? (int)v : 15; }

static inline void kv_quantize_nibbles(const float *x, float inverse, float offset, float low, uint8_t *codes)
{
    for (int i = 0; i < KV_BLOCK / 2; i++)
        codes[i] = (uint8_t)(kv_nibble((x[i] - low) * inverse + offset)
                             | kv_nibble((x[i + 16] - low) * inverse + offset) << 4);
}

static inline int64_t kv_nibble_at(int64_t r, int c) { return c % 16 / 4 * 64 + r * 4 + c % 4; }

static inline void kv_pack_nibbles(const uint8_t *raw, int64_t r, uint8_t *codes)
{
    for (int c = 0; c < KV_BLOCK / 2; c++)
        codes[kv_nibble_at(r, c)] = raw[c];
}

static inline int kv_get_nibble(const uint8_t *codes, int64_t r, int c)
{
    return codes[kv_nibble_at(r, c)] >> c / 16 * 4 & 15;
}

#else

#include "simd/dot.h"
#include "weights/panels.h"

/* A type whose value is d (code - offset), or d code + m with `minimum`: the code of 4 bits, or of 8, which counts from
 * -128 on. */
typedef struct {
    int bits, offset, minimum;
} block_codes;

/* One panel for `rows` tokens in one plane.
 * sum over a block of w x = d_w (d_x dot - offset d_x sum_x) + m d_x sum_x, with dot and sum_x exact integers. */
KV_INLINE void block_rows(const block_codes type, const int rows, const uint8_t *panel, const kv_input *in,
                          int64_t first, float *out, int64_t ld_out, int add)
{
    const int64_t blocks = in->blocks, ld = blocks * KV_BLOCK;
    const int8_t *x = in->q + first * ld;
    const float *x_scale = in->scale + first * blocks;
    const int32_t *x_sum = in->sum + first * blocks;
    const int head = type.minimum ? 128 : 64, code_bytes = 64 * type.bits;
    vf sum[KV_ROWS], dot[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        sum[r] = add ? vf_load(out + r * ld_out) : vf_zero();
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *pair = panel + b / 2 * (head + 2 * code_bytes), *codes = pair + head + b % 2 * code_bytes;
        vf scale = vf_load_f16((const uint16_t *)pair + b % 2 * 16);
        dot_codes(type.bits, type.bits, rows, codes, x + b * KV_BLOCK, ld, x_sum + b, blocks, dot);
        KV_UNROLL
        for (int r = 0; r < rows; r++) {
            float d = x_scale[r * blocks + b], s = d * (float)x_sum[r * blocks + b];
            vf v = vf_mul(dot[r], vf_set1(d));
            if (type.offset)
                v = vf_sub(v, vf_set1((float)type.offset * s));
            if (type.minimum)
                sum[r] = vf_fma(vf_load_f16((const uint16_t *)pair + 32 + b % 2 * 16), vf_set1(s), sum[r]);
            sum[r] = vf_fma(v, scale, sum[r]);
        }
    }
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        vf_store(out + r * ld_out, sum[r]);
}

enum { SOME = 16 }; /* blocks whose factors are prepared together, an even number */

/* What some blocks of tokens in two planes are multiplied with besides their codes: 128 times their sums, for dot_two;
 * and the sums in floats, times -offset. scale: of the first token's second plane. */
KV_INLINE void block_sums(const block_codes type, const int tokens, int64_t some, int64_t blocks, const int32_t *sum,
                          const float *scale, int32_t offset[][SOME], float whole[][SOME])
{
    KV_UNROLL
    for (int t = 0; t < tokens; t++)
        for (int64_t b = 0; b < some; b++) {
            const int32_t n = sum[2 * t * blocks + b] * 256 + sum[(2 * t + 1) * blocks + b];
            const float d = scale[2 * t * blocks + b];
            offset[t][b] = 128 * n;
            whole[t][b] = (type.offset ? (float)-type.offset * d : d) * (float)n;
        }
}

/* One panel for tokens in two planes, which is what decoding takes: the second plane has steps of 1/256, so integers
 * are put together before they become floats. What a token gets does not depend on how many there are. Everything in
 * line: a block is too short for loops over its lines. */
KV_INLINE void block_tokens(const block_codes type, const int tokens, const uint8_t *panel, const kv_input *in,
                            int64_t first, float *out, int64_t ld_out, int add)
{
    const int64_t blocks = in->blocks, ld = 2 * blocks * KV_BLOCK;
    const int8_t *x = in->q + first * ld;
    const float *x_scale = in->scale + (2 * first + 1) * blocks;
    const int32_t *x_sum = in->sum + 2 * first * blocks;
    const int head = type.minimum ? 128 : 64, code_bytes = 64 * type.bits;
    vf sum[KV_TOKENS], dot[KV_TOKENS];
    KV_UNROLL
    for (int t = 0; t < tokens; t++)
        sum[t] = add ? vf_load(out + t * ld_out) : vf_zero();
    for (int64_t from = 0; from < blocks; from += SOME, x += 2 * SOME * KV_BLOCK, x_scale += SOME, x_sum += SOME) {
        const int64_t some = blocks - from < SOME ? blocks - from : SOME;
        int32_t offsets[KV_TOKENS][SOME];
        float whole[KV_TOKENS][SOME];
        block_sums(type, tokens, some, blocks, x_sum, x_scale, offsets, whole);
        for (int64_t b = 0; b < some; panel += head + 2 * code_bytes)
            KV_UNROLL
            for (int i = 0; i < 2 && b < some; i++, b++) {
                const vf scale = vf_load_f16((const uint16_t *)panel + 16 * i);
                int32_t offset[KV_TOKENS];
                KV_UNROLL
                for (int t = 0; t < tokens; t++)
                    offset[t] = offsets[t][b];
                dot_two(type.bits, tokens, panel + head + i * code_bytes, x + 2 * b * KV_BLOCK, ld, offset, dot);
                KV_UNROLL
                for (int t = 0; t < tokens; t++) {
                    const vf by = vf_set1(whole[t][b]);
                    if (type.offset)
                        sum[t] = vf_fma(scale, by, sum[t]);
                    if (type.minimum)
                        sum[t] = vf_fma(vf_load_f16((const uint16_t *)panel + 32 + 16 * i), by, sum[t]);
                    sum[t] = vf_fma(dot[t], vf_mul(scale, vf_set1(x_scale[2 * t * blocks + b])), sum[t]);
                }
            }
    }
    KV_UNROLL
    for (int t = 0; t < tokens; t++)
        vf_store(out + t * ld_out, sum[t]);
}

/* The product of a type, given its block_codes in brackets. */
#define KV_BLOCK_MATMUL(NAME, HEAD, CODES, ...)                                                                        \
    KV_INLINE void rows_##NAME(const int rows, const uint8_t *panel, const kv_input *in, int64_t first, float *out,    \
                               int64_t ld_out, int add)                                                                \
    {                                                                                                                  \
        block_rows((block_codes)__VA_ARGS__, rows, panel, in, first, out, ld_out, add);                                \
    }                                                                                                                  \
    KV_INLINE void tokens_##NAME(const int tokens, const uint8_t *panel, const kv_input *in, int64_t first,            \
                                 float *out, int64_t ld_out, int add)                                                  \
    {                                                                                                                  \
        block_tokens((block_codes)__VA_ARGS__, tokens, panel, in, first, out, ld_out, add);                            \
    }                                                                                                                  \
    KV_MATMUL(NAME, kv_block_panel_bytes(HEAD, CODES, cols), rows_##NAME, tokens_##NAME)

#endif
#endif
