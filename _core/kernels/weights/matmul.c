/* Weights times a chunk of inputs. Panels outside, inputs inside: a panel is read from memory once for all tokens,
 * and KV_ROWS tokens share each load and each unpacking of its lines. */
#include "simd/dot.h"
#include "simd/gemm.h"
#include "weights/panels.h"

static void matmul_f32(const uint8_t *panels, int64_t n_panels, int64_t cols, const kv_input *in, int64_t n_tokens,
                       float *out, int64_t ld_out, int add)
{
    for (int64_t p = 0; p < n_panels; p++, panels += 64 * cols)
        gemm_f32(n_tokens, in->f, in->ld, (const float *)panels, 16, cols, 16, out + 16 * p, ld_out, add);
}

static void matmul_f16(const uint8_t *panels, int64_t n_panels, int64_t cols, const kv_input *in, int64_t n_tokens,
                       float *out, int64_t ld_out, int add)
{
    for (int64_t p = 0; p < n_panels; p++, panels += 64 * ((cols + 1) / 2))
        gemm_f16(n_tokens, in->f, in->ld, (const uint16_t *)panels, 16, cols, 16, out + 16 * p, ld_out, add);
}

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

static void matmul_bf16(const uint8_t *panels, int64_t n_panels, int64_t cols, const kv_input *in, int64_t n_tokens,
                        float *out, int64_t ld_out, int add)
{
    for (int64_t p = 0; p < n_panels; p++, panels += 64 * ((cols + 1) / 2), out += 16) {
        const uint16_t *panel = (const uint16_t *)panels;
        int64_t t = 0;
        for (; t + KV_ROWS <= n_tokens; t += KV_ROWS)
            bf16_rows(KV_ROWS, panel, cols, in->f + t * in->ld, in->ld, out + t * ld_out, ld_out, add);
        for (; t < n_tokens; t++)
            bf16_rows(1, panel, cols, in->f + t * in->ld, in->ld, out + t * ld_out, ld_out, add);
    }
}

/* One panel of a block type for `rows` rows of the input: tokens, or planes of tokens. The value of a code is d * (code - offset) + m, so
 * sum over a block of w x = d_w (d_x dot - offset d_x sum_x) + m d_x sum_x, with dot and sum_x exact integers. */
KV_INLINE void block_rows(const int type, const int rows, const int planes, const uint8_t *panel, const kv_input *in,
                          int64_t first, float *out, int64_t ld_out, int add)
{
    const int64_t blocks = in->blocks, ld = blocks * KV_BLOCK;
    const int8_t *x = in->q + first * ld;
    const float *x_scale = in->scale + first * blocks;
    const int32_t *x_sum = in->sum + first * blocks;
    const int head = type == KV_Q4_1 ? 128 : 64, code_bytes = type == KV_Q8_0 ? 512 : 256;
    vf sum[KV_ROWS], dot[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        sum[r] = add && r % planes == 0 ? vf_load(out + r / planes * ld_out) : vf_zero();
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *pair = panel + b / 2 * (head + 2 * code_bytes), *codes = pair + head + b % 2 * code_bytes;
        vf scale = vf_load_f16((const uint16_t *)pair + b % 2 * 16);
        dot_codes(type == KV_Q8_0 ? 8 : 4, type == KV_Q8_0 ? 8 : 4, rows, codes, x + b * KV_BLOCK, ld, x_sum + b, blocks, dot);
        KV_UNROLL
        for (int r = 0; r < rows; r++) {
            float d = x_scale[r * blocks + b], s = d * (float)x_sum[r * blocks + b];
            vf v = vf_mul(dot[r], vf_set1(d));
            if (type == KV_Q4_0)
                v = vf_sub(v, vf_set1(8 * s));
            if (type == KV_Q4_1)
                sum[r] = vf_fma(vf_load_f16((const uint16_t *)pair + 32 + b % 2 * 16), vf_set1(s), sum[r]);
            sum[r] = vf_fma(v, scale, sum[r]);
        }
    }
    KV_UNROLL
    for (int r = 0; r < rows; r += planes)
        vf_store(out + r / planes * ld_out, planes == 2 ? vf_add(sum[r], sum[r + 1]) : sum[r]);
}

/* One panel for one token in two planes, which is what decoding takes: the second plane has steps of 1/256, so integers
 * are put together before they become floats. Everything in line: a block is too short for loops over its lines. */
KV_INLINE void block_token(const int type, const uint8_t *panel, const kv_input *in, int64_t token, float *out, int add)
{
    const int64_t blocks = in->blocks, second = blocks * KV_BLOCK;
    const int8_t *x = in->q + 2 * token * second;
    const float *x_scale = in->scale + (2 * token + 1) * blocks;
    const int32_t *x_sum = in->sum + 2 * token * blocks;
    const int head = type == KV_Q4_1 ? 128 : 64, bits = type == KV_Q8_0 ? 8 : 4, code_bytes = 64 * bits;
    vf sum = add ? vf_load(out) : vf_zero();
    for (int64_t pair = 0; pair < blocks; pair += 2, panel += head + 2 * code_bytes) {
        KV_UNROLL
        for (int i = 0; i < 2; i++, x += KV_BLOCK) {
            const int64_t b = pair + i;
            if (b == blocks)
                break;
            const int32_t codes = x_sum[b] * 256 + x_sum[blocks + b];
            const vf scale = vf_load_f16((const uint16_t *)panel + 16 * i);
            vf dot = dot_two(bits, panel + head + i * code_bytes, x, x + second, codes);
            if (type == KV_Q4_0)
                sum = vf_fma(scale, vf_set1(-8 * x_scale[b] * (float)codes), sum);
            if (type == KV_Q4_1)
                sum = vf_fma(vf_load_f16((const uint16_t *)panel + 32 + 16 * i), vf_set1(x_scale[b] * (float)codes), sum);
            sum = vf_fma(dot, vf_mul(scale, vf_set1(x_scale[b])), sum);
        }
    }
    vf_store(out, sum);
}

KV_INLINE int64_t block_bytes(const int type, int64_t blocks)
{
    return (blocks + 1) / 2 * (type == KV_Q4_1 ? 128 : 64) + blocks * (type == KV_Q8_0 ? 512 : 256);
}

KV_MATMUL(q8_0, KV_Q8_0, block_bytes(KV_Q8_0, in->blocks), block_rows, block_token)
KV_MATMUL(q4_1, KV_Q4_1, block_bytes(KV_Q4_1, in->blocks), block_rows, block_token)
KV_MATMUL(q4_0, KV_Q4_0, block_bytes(KV_Q4_0, in->blocks), block_rows, block_token)

void KV_NAME(kv_fill_matmul)(kv_kernels *table);
void KV_NAME(kv_fill_matmul)(kv_kernels *table)
{
    table->matmul[KV_F32] = matmul_f32;
    table->matmul[KV_F16] = matmul_f16;
    table->matmul[KV_BF16] = matmul_bf16;
    table->matmul[KV_Q8_0] = matmul_q8_0;
    table->matmul[KV_Q4_1] = matmul_q4_1;
    table->matmul[KV_Q4_0] = matmul_q4_0;
}
