/* Blocks of 32: (code - 8) * d, codes 0 ... 15. */
#include "weights/blocks.h"

enum { RAW = 18, HEAD = 64, CODES = 256 }; /* raw: d, nibbles */

#ifndef KV_LEVEL

static void quantize(const float *x, uint8_t *raw)
{
    float extreme = 0;
    for (int i = 0; i < KV_BLOCK; i++)
        if (fabsf(x[i]) > fabsf(extreme))
            extreme = x[i];
    float d = extreme / -8, inverse = d ? 1 / d : 0;
    kv_put_f16(raw, d);
    kv_quantize_nibbles(x, inverse, 8.5f, 0, raw + 2);
}

static void pack(const uint8_t *raw, int64_t r, uint8_t *head, uint8_t *codes)
{
    memcpy(head + 2 * r, raw, 2);
    kv_pack_nibbles(raw + 2, r, codes);
}

static void unpack(const uint8_t *head, const uint8_t *codes, int64_t r, float *x)
{
    const float d = kv_get_f16(head + 2 * r);
    for (int c = 0; c < KV_BLOCK; c++)
        x[c] = (float)(kv_get_nibble(codes, r, c) - 8) * d;
}

KV_BLOCK_ROWS(RAW, HEAD, CODES)

const kv_weight kv_weight_q4_0 = {
    .name = "q4_0",
    .ggml_number = 2,
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

KV_BLOCK_MATMUL(q4_0, HEAD, CODES, {.bits = 4, .offset = 8})

#endif
