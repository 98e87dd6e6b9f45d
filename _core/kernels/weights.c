/* The table of weight types, and what conversion and row look-ups do with any of them. Portable, like the rows'
 * functions: compiled once, without instruction-set flags and without contraction to FMA, so that the values are the
 * same everywhere. */
#include <string.h>

#include "kernels.h"

#define KV_DECLARE_ROW(NAME, name) extern const kv_weight kv_weight_##name;
KV_EACH_WEIGHT_TYPE(KV_DECLARE_ROW)

#define KV_ROW(NAME, name) &kv_weight_##name,
static const kv_weight *const ROWS[KV_N_WEIGHT_TYPES] = {KV_EACH_WEIGHT_TYPE(KV_ROW)};

const kv_weight *kv_weight_of(int type) { return ROWS[type]; }

int64_t kv_raw_row_bytes(int type, int64_t cols)
{
    return (cols + ROWS[type]->block - 1) / ROWS[type]->block * ROWS[type]->block_bytes;
}

int64_t kv_packed_bytes(int type, int64_t rows, int64_t cols)
{
    return (rows + KV_PANEL - 1) / KV_PANEL * ROWS[type]->panel_bytes(cols);
}

void kv_quantize_row(int type, const float *x, int64_t cols, uint8_t *raw) { ROWS[type]->quantize_row(x, cols, raw); }

void kv_pack_panel(int type, const uint8_t *raw, int64_t rows, int64_t cols, uint8_t *panel)
{
    int64_t ld = kv_raw_row_bytes(type, cols);
    memset(panel, 0, (size_t)ROWS[type]->panel_bytes(cols));
    for (int64_t r = 0; r < rows; r++)
        ROWS[type]->pack_row(raw + r * ld, cols, r, panel);
}

void kv_unpack_row(int type, const uint8_t *packed, int64_t cols, int64_t row, float *x)
{
    const uint8_t *panel = packed + row / KV_PANEL * ROWS[type]->panel_bytes(cols);
    ROWS[type]->unpack_row(panel, cols, row % KV_PANEL, x);
}
