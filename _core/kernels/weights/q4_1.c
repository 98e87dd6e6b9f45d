/* Blocks of 32: code * d + m, codes 0 ... 15. */
#include "weights/blocks.h"

enum { RAW = 20, HEAD = 128, CODES = 256 }; /* raw: d, m, nibbles */

#ifndef KV_LEVEL

static void quantize(const float *x, uint8_t *raw)
{
    float low = x[0], high = x[0];
    for (int i = 1; i < KV_BLOCK; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    float d = (high - low) / 15, inverse = d ? 1 / d : 0;
    kv_put_f16(raw, d);
    kv_put_f16(raw + 2, low);
    kv_quantize_nibbles(x, inverse, 0.5f, low, raw + 4);
}

static void pack(const uint8_t *raw, int64_t r, uint8_t *head, uint8_t *codes)
{
    memcpy(head + 2 * r, raw, 2);
    memcpy(head + 64 + 2 * r, raw + 2, 2);
    kv_pack_nibbles(raw + 4, r, codes);
}

static void unpack(const uint8_t *head, const uint8_t *codes, int64_t r, float *x)
{
    const float d = kv_get_f16(head + 2 * r), m = kv_get_f16(head + 64 + 2 * r);
    for (int c = 0; c < KV_BLOCK; c++)
        x[c] = (float)kv_get_nibble(codes, r, c) * d + m;
}

KV_BLOCK_ROWS(RAW, HEAD, CODES)

const kv_weight kv_weight_q4_1 = {
    .name = "q4_1",
    .ggml_number = 3,
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

KV_BLOCK_MATMUL(q4_1, HEAD, CODES, {.bits = 4, .minimum = 1})

#endif
