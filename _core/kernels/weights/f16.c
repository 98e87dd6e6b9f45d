/* float16: [cols, even][16 rows]. */
#include "kernels.h"

static inline int64_t panel_bytes(int64_t cols) { return 64 * ((cols + 1) / 2); }

#ifndef KV_LEVEL

#include "f16.h"

static void quantize_row(const float *x, int64_t cols, uint8_t *raw)
{
    for (int64_t c = 0; c < cols; c++)
        kv_put_f16(raw + 2 * c, x[c]);
}

static void pack_row(const uint8_t *raw, int64_t cols, int64_t r, uint8_t *panel)
{
    for (int64_t c = 0; c < cols; c++)
        memcpy(panel + 32 * c + 2 * r, raw + 2 * c, 2);
}

static void unpack_row(const uint8_t *panel, int64_t cols, int64_t r, float *x)
{
    for (int64_t c = 0; c < cols; c++)
        x[c] = kv_get_f16(panel + 32 * c + 2 * r);
}

const kv_weight kv_weight_f16 = {
    .name = "f16",
    .ggml_number = 1,
    .block = 1,
    .block_bytes = 2,
    .column_multiple = 1,
    .panel_bytes = panel_bytes,
    .quantize_row = quantize_row,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

#else

#include "simd/gemm.h"
#include "weights/panels.h"

void KV_NAME(kv_matmul_f16)(KV_MATMUL_ARGUMENTS)
{
    for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes(cols))
        gemm_f16(n_tokens, in->f, in->ld, (const uint16_t *)panels, 16, cols, 16, out + 16 * p, ld_out, add);
}

#endif
