/* Packing of weights into the interleaved layout of kernels.h, GGML's reference quantisation, and row look-up.
 * Portable: this file is compiled once, without instruction-set flags and without contraction to FMA, so that the
 * values are the same everywhere. */
#include <math.h>
#include <string.h>

#include "f16.h"
#include "kernels.h"
#include "weights/kpack.h"

/* GGML's block layouts: fp16 scale, fp16 minimum for q4_1, then codes (nibble j: low channel j, high channel j+16). */
enum { Q8_0_BYTES = 34, Q4_1_BYTES = 20, Q4_0_BYTES = 18 };

static int block_bytes(int type)
{
    return type == KV_Q8_0 ? Q8_0_BYTES : type == KV_Q4_1 ? Q4_1_BYTES : Q4_0_BYTES;
}

static int block_code_bytes(int type) { return type == KV_Q8_0 ? 512 : 256; } /* packed, 16 rows x 32 channels */
static int pair_head_bytes(int type) { return type == KV_Q4_1 ? 128 : 64; }
static int64_t n_blocks(int64_t cols) { return (cols + KV_BLOCK - 1) / KV_BLOCK; }

int64_t kv_raw_row_bytes(int type, int64_t cols)
{
    if (type == KV_F32)
        return 4 * cols;
    if (type == KV_F16 || type == KV_BF16)
        return 2 * cols;
    if (kv_is_super(type))
        return cols / KV_SUPER * (type == KV_Q4_K ? Q4_K_BYTES : Q6_K_BYTES);
    return n_blocks(cols) * block_bytes(type);
}

static int64_t panel_bytes(int type, int64_t cols)
{
    if (type == KV_F32)
        return 64 * cols;
    if (type == KV_F16 || type == KV_BF16)
        return 64 * ((cols + 1) / 2);
    if (kv_is_super(type))
        return kv_super_panel_bytes(type, cols / KV_SUPER);
    int64_t blocks = n_blocks(cols);
    return (blocks + 1) / 2 * pair_head_bytes(type) + blocks * block_code_bytes(type);
}

int64_t kv_packed_bytes(int type, int64_t rows, int64_t cols)
{
    return (rows + KV_PANEL - 1) / KV_PANEL * panel_bytes(type, cols);
}

static void put_f16(uint8_t *p, float f) { uint16_t h = kv_float_f16(f); memcpy(p, &h, 2); }
static float get_f16(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return kv_f16_float(h); }

static void quantize_q8_0(const float *x, uint8_t *raw)
{
    float largest = 0;
    for (int i = 0; i < KV_BLOCK; i++)
        largest = fmaxf(largest, fabsf(x[i]));
    float d = largest / 127, inverse = d ? 1 / d : 0;
    put_f16(raw, d);
    for (int i = 0; i < KV_BLOCK; i++)
        raw[2 + i] = (uint8_t)(fabsf(x[i] * inverse) <= 127.5f ? (int)roundf(x[i] * inverse) : 0); /* 0 for NaN */
}

static int nibble(float v) { return v < 15 ? (int)v : 15; }

static void put_nibbles(uint8_t *codes, const float *x, float inverse, float offset, float low)
{
    for (int i = 0; i < KV_BLOCK / 2; i++)
        codes[i] = (uint8_t)(nibble((x[i] - low) * inverse + offset)
                             | nibble((x[i + 16] - low) * inverse + offset) << 4);
}

static void quantize_q4_0(const float *x, uint8_t *raw)
{
    float extreme = 0;
    for (int i = 0; i < KV_BLOCK; i++)
        if (fabsf(x[i]) > fabsf(extreme))
            extreme = x[i];
    float d = extreme / -8, inverse = d ? 1 / d : 0;
    put_f16(raw, d);
    put_nibbles(raw + 2, x, inverse, 8.5f, 0);
}

static void quantize_q4_1(const float *x, uint8_t *raw)
{
    float low = x[0], high = x[0];
    for (int i = 1; i < KV_BLOCK; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    float d = (high - low) / 15, inverse = d ? 1 / d : 0;
    put_f16(raw, d);
    put_f16(raw + 2, low);
    put_nibbles(raw + 4, x, inverse, 0.5f, low);
}

static void quantize_blocks(int type, const float *x, int64_t cols, uint8_t *raw)
{
    for (int64_t b = 0; b < n_blocks(cols); b++, raw += block_bytes(type)) {
        float block[KV_BLOCK] = {0};
        int64_t n = cols - b * KV_BLOCK < KV_BLOCK ? cols - b * KV_BLOCK : KV_BLOCK;
        memcpy(block, x + b * KV_BLOCK, (size_t)n * sizeof(float));
        if (type == KV_Q8_0)
            quantize_q8_0(block, raw);
        else if (type == KV_Q4_1)
            quantize_q4_1(block, raw);
        else
            quantize_q4_0(block, raw);
    }
}

void kv_quantize_row(int type, const float *x, int64_t cols, uint8_t *raw)
{
    if (type == KV_F32) {
        memcpy(raw, x, (size_t)cols * 4);
    } else if (type == KV_F16 || type == KV_BF16) {
        for (int64_t i = 0; i < cols; i++) {
            uint16_t h = type == KV_F16 ? kv_float_f16(x[i]) : kv_float_bf16(x[i]);
            memcpy(raw + 2 * i, &h, 2);
        }
    } else if (kv_is_super(type)) {
        kv_quantize_super_row(type, x, cols / KV_SUPER, raw);
    } else {
        quantize_blocks(type, x, cols, raw);
    }
}

/* Where the parts of block b of a panel lie. */
typedef struct { int64_t scale, minimum, codes; } block_at;

static block_at locate(int type, int64_t b)
{
    int64_t head = pair_head_bytes(type), code = block_code_bytes(type);
    int64_t pair = b / 2 * (head + 2 * code), half = b % 2;
    return (block_at){pair + half * 32, pair + 64 + half * 32, pair + head + half * code};
}

/* Byte of a block's codes that holds channel c of row r; for 4-bit types *high says which nibble. */
static int64_t code_at(int type, int64_t r, int c, int *high)
{
    if (type == KV_Q8_0) {
        *high = 0;
        return c / 4 * 64 + r * 4 + c % 4;
    }
    *high = c >= 16;
    return c % 16 / 4 * 64 + r * 4 + c % 4;
}

static void pack_block(int type, const uint8_t *raw, int64_t b, int64_t r, uint8_t *panel)
{
    block_at at = locate(type, b);
    int head = type == KV_Q4_1 ? 4 : 2, high;
    memcpy(panel + at.scale + 2 * r, raw, 2);
    if (type == KV_Q4_1)
        memcpy(panel + at.minimum + 2 * r, raw + 2, 2);
    for (int c = 0; c < KV_BLOCK; c++) {
        uint8_t *to = panel + at.codes + code_at(type, r, c, &high);
        if (type == KV_Q8_0)
            *to = raw[head + c] ^ 0x80;
        else if (high)
            *to |= raw[head + c - 16] & 0xf0;
        else
            *to |= raw[head + c] & 0x0f;
    }
}

/* Rows [0, rows) of one panel, rows <= 16, from raw rows one after the other. */
void kv_pack_panel(int type, const uint8_t *raw, int64_t rows, int64_t cols, uint8_t *panel)
{
    int64_t ld = kv_raw_row_bytes(type, cols);
    memset(panel, 0, (size_t)panel_bytes(type, cols));
    for (int64_t r = 0; r < rows; r++, raw += ld) {
        if (type == KV_F32)
            for (int64_t c = 0; c < cols; c++)
                memcpy(panel + 64 * c + 4 * r, raw + 4 * c, 4);
        else if (type == KV_F16)
            for (int64_t c = 0; c < cols; c++)
                memcpy(panel + 32 * c + 2 * r, raw + 2 * c, 2);
        else if (type == KV_BF16)
            for (int64_t c = 0; c < cols; c++)
                memcpy(panel + 64 * (c / 2) + 4 * r + 2 * (c % 2), raw + 2 * c, 2);
        else if (kv_is_super(type))
            kv_pack_super_row(type, raw, cols / KV_SUPER, r, panel);
        else
            for (int64_t b = 0; b < n_blocks(cols); b++)
                pack_block(type, raw + b * block_bytes(type), b, r, panel);
    }
}

static void unpack_block(int type, const uint8_t *panel, int64_t b, int64_t r, int64_t n, float *x)
{
    block_at at = locate(type, b);
    float d = get_f16(panel + at.scale + 2 * r), m = 0;
    if (type == KV_Q4_1)
        m = get_f16(panel + at.minimum + 2 * r);
    for (int c = 0; c < n; c++) {
        int high, code = panel[at.codes + code_at(type, r, c, &high)];
        if (type == KV_Q8_0)
            x[c] = (float)(code - 128) * d;
        else if (type == KV_Q4_1)
            x[c] = (float)(high ? code >> 4 : code & 15) * d + m;
        else
            x[c] = (float)((high ? code >> 4 : code & 15) - 8) * d;
    }
}

void kv_unpack_row(int type, const uint8_t *packed, int64_t cols, int64_t row, float *x)
{
    const uint8_t *panel = packed + row / KV_PANEL * panel_bytes(type, cols);
    int64_t r = row % KV_PANEL;
    if (type == KV_F32)
        for (int64_t c = 0; c < cols; c++)
            memcpy(x + c, panel + 64 * c + 4 * r, 4);
    else if (type == KV_F16)
        for (int64_t c = 0; c < cols; c++)
            x[c] = get_f16(panel + 32 * c + 2 * r);
    else if (type == KV_BF16)
        for (int64_t c = 0; c < cols; c++) {
            uint16_t h;
            memcpy(&h, panel + 64 * (c / 2) + 4 * r + 2 * (c % 2), 2);
            x[c] = kv_bf16_float(h);
        }
    else if (kv_is_super(type))
        kv_unpack_super_row(type, panel, cols / KV_SUPER, r, x);
    else
        for (int64_t b = 0; b < n_blocks(cols); b++)
            unpack_block(type, panel, b, r, cols - b * KV_BLOCK < KV_BLOCK ? cols - b * KV_BLOCK : KV_BLOCK,
                         x + b * KV_BLOCK);
}
