/* Blocks of 32: code * d, codes -128 ... 127, packed plus 128 in lines [16 rows][4 columns]. */
#include "weights/blocks.h"

enum { RAW = 34, HEAD = 64, CODES = 512 }; /* raw: d, codes */

#ifndef KV_LEVEL

static void quantize(const float *x, uint8_t *raw)
{
    float largest = 0;
    for (int i = 0; i < KV_BLOCK; i++)
        largest = fmaxf(largest, fabsf(x[i]));
    float d = largest / 127, inverse = d ? 1 / d : 0;
    kv_put_f16(raw, d);
    for (int i = 0; i < KV_BLOCK; i++)
        raw[2 + i] = (uint8_t)(fabsf(x[i] * inverse) <= 127.5f ? (int)roundf(x[i] * inverse) : 0); /* 0 for NaN */
}

static void pack(const uint8_t *raw, int64_t r, uint8_t *head, uint8_t *codes)
{
    memcpy(head + 2 * r, raw, 2);
    for (int c = 0; c < KV_BLOCK; c++)
        codes[c / 4 * 64 + r * 4 + c % 4] = raw[2 + c] ^ 0x80;
}

static void unpack(const uint8_t *head, const uint8_t *codes, int64_t r, float *x)
{
    const float d = kv_get_f16(head + 2 * r);
    for (int c = 0; c < KV_BLOCK; c++)
        x[c] = (float)(codes[c / 4 * 64 + r * 4 + c % 4] - 128) * d;
}

KV_BLOCK_ROWS(RAW, HEAD, CODES)

const kv_weight kv_weight_q8_0 = {
    .name = "q8_0",
    .ggml_number = 8,
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

KV_BLOCK_MATMUL(q8_0, HEAD, CODES, {.bits = 8})

#endif
