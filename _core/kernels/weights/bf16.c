/* bfloat16: [cols / 2] lines [16 rows][2 columns], so that a line widens to float32 by a shift or a mask. */
#include "kernels.h"

static inline int64_t panel_bytes(int64_t cols) { return 64 * ((cols + 1) / 2); }

#ifndef KV_LEVEL

#include <string.h>

#include "f16.h"

static void quantize_row(const float *x, int64_t cols, uint8_t *raw)
{
    for (int64_t c = 0; c < cols; c++) {
        uint16_t h = kv_float_bf16(x[c]);
        memcpy(raw + 2 * c, &h, 2);
    }
}

static void pack_row(const uint8_t *raw, int64_t cols, int64_t r, uint8_t *panel)
{
    for (int64_t c = 0; c < cols; c++)
        memcpy(panel + 64 * (c / 2) + 4 * r + 2 * (c % 2), raw + 2 * c, 2);
}

static void unpack_row(const uint8_t *panel, int64_t cols, int64_t r, float *x)
{
    for (int64_t c = 0; c < cols; c++) {
        uint16_t h;
        memcpy(&h, panel + 64 * (c / 2) + 4 * r + 2 * (c % 2), 2);
        x[c] = kv_bf16_float(h);
    }
}

const kv_weight kv_weight_bf16 = {
    .name = "bf16",
    .ggml_number = 30,
    .block = 1,
    .block_bytes = 2,
    .column_multiple = 1,
    .panel_bytes = panel_bytes,
    .quantize_row = quantize_row,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

#else

#include "weights/panels.h"

KV_INLINE void bf16_rows(const int rows, const uint16_t *panel, int64_t cols, const float *x, int64_t ld, float *out,
                         int64_t ld_out, int add)
{
    vf sum[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        sum[r] = add ? vf_load(out + r * ld_out) : vf_zero();
    for (int64_t k = 0; k + 1 < cols; k += 2) {
        vf even = vf_bf16_even(panel + 16 * k), odd = vf_bf16_odd(panel + 16 * k);
        KV_UNROLL
        for (int r = 0; r < rows; r++) {
            sum[r] = vf_fma(vf_set1(x[r * ld + k]), even, sum[r]);
            sum[r] = vf_fma(vf_set1(x[r * ld + k + 1]), odd, sum[r]);
        }
    }
    if (cols % 2) {
        vf even = vf_bf16_even(panel + 16 * (cols - 1));
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            sum[r] = vf_fma(vf_set1(x[r * ld + cols - 1]), even, sum[r]);
    }
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        vf_store(out + r * ld_out, sum[r]);
}

void KV_NAME(kv_matmul_bf16)(KV_MATMUL_ARGUMENTS)
{
    for (int64_t p = 0; p < n_panels; p++, panels += panel_bytes(cols), out += KV_PANEL) {
        const uint16_t *panel = (const uint16_t *)panels;
        int64_t t = 0;
        for (; t + KV_ROWS <= n_tokens; t += KV_ROWS)
            bf16_rows(KV_ROWS, panel, cols, in->f + t * in->ld, in->ld, out + t * ld_out, ld_out, add);
        for (; t < n_tokens; t++)
            bf16_rows(1, panel, cols, in->f + t * in->ld, in->ld, out + t * ld_out, ld_out, add);
    }
}

#endif
