/* Plain float32: [cols] lines [16 rows]. */
#include "kernels.h"

static inline int64_t panel_bytes(int64_t cols) { return 64 * cols; }

#ifndef KV_LEVEL

#include <string.h>

static void quantize_row(const float *x, int64_t cols, uint8_t *raw)
{
    memcpy(raw, x, (size_t)cols * 4);
}

static void pack_row(const uint8_t *raw, int64_t cols, int64_t r, uint8_t *panel)
{
    for (int64_t c = 0; c < cols; c++)
        memcpy(panel + 64 * c + 4 * r, raw + 4 * c, 4);
}

static void unpack_row(const uint8_t *panel, int64_t cols, int64_t r, float *x)
{
    for (int64_t c = 0; c < cols; c++)
        memcpy(x + c, panel + 64 * c + 4 * r, 4);
}

const kv_weight kv_weight_f32 = {
    .name = "f32",
    .ggml_number = 0,
    .block = 1,
    .block_bytes = 4,
    .column_multiple = 1,
    .panel_bytes = panel_bytes,
    .quantize_row = quantize_row,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

#else

#include "simd/gemm.h"
#include "weights/panels.h"

void KV_NAME(kv_matmul_f32)(KV_MATMUL_ARGUMENTS)
{
    for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes(cols))
        gemm_f32(n_tokens, in->f, in->ld, (const float *)panels, 16, cols, 16, out + 16 * p, ld_out, add);
}

#endif
