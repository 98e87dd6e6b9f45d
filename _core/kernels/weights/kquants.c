/* Matrix products of q4_k and q6_k, whose blocks of 32 or 16 channels share the scales of a super-block.
 * Products within a block are exact integers. */
#include "simd/dot.h"
#include "weights/kpack.h"
#include "weights/panels.h"

/* Four lines of six-bit numbers from three: their high bits are the fourth. */
KV_INLINE void six_bits(const uint8_t *p, vw line[4])
{
    vw a = vw_load(p), b = vw_load(p + 64), c = vw_load(p + 128);
    line[0] = vw_field(a, 0, 63);
    line[1] = vw_field(b, 0, 63);
    line[2] = vw_field(c, 0, 63);
    line[3] = vw_or(vw_or(vw_field(a, 6, 3), vw_field(b, 4, 12), 0), vw_field(c, 2, 48), 0);
}

/* Inputs of `rows` rows, tokens or planes of tokens, from a certain block on. */
typedef struct {
    const int8_t *q;
    const float *scale;
    const int32_t *sum, *offset;
    int64_t ld, blocks;
} some_inputs;

KV_INLINE some_inputs inputs_from(const kv_input *in, int64_t row)
{
    const int64_t blocks = in->blocks;
    return (some_inputs){in->q + row * blocks * KV_BLOCK, in->scale + row * blocks, in->sum + row * blocks,
                         in->offset + row * blocks * 2, blocks * KV_BLOCK, blocks};
}

/* A token's product from those of its planes, in steps of the first. */
KV_INLINE vf of_planes(const int planes, const vf *dot, int r)
{
    return planes == 2 ? vf_fma(dot[r + 1], vf_set1(1.0f / 256), dot[r]) : dot[r];
}

/* Scales of the eight blocks of a super-block, and minimums, negative. */
KV_INLINE void scales_q4_k(const uint8_t *p, vf *scale, vf *minimum)
{
    vf d = vf_load_f16((const uint16_t *)p), dmin = vf_sub(vf_zero(), vf_load_f16((const uint16_t *)p + 16));
    vw line[4];
    six_bits(p + 64, line);
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        kv_ahead(p + 64 * i);
        scale[i] = vf_mul(d, vw_code(line[0], i, 0, 63));
        scale[4 + i] = vf_mul(d, vw_code(line[1], i, 0, 63));
        minimum[i] = vf_mul(dmin, vw_code(line[2], i, 0, 63));
        minimum[4 + i] = vf_mul(dmin, vw_code(line[3], i, 0, 63));
    }
}

KV_INLINE void super_q4_k(const int rows, const int planes, const uint8_t *p, int64_t s, const some_inputs *in, vf *sum)
{
    vf scale[8], minimum[8], dot[KV_ROWS];
    scales_q4_k(p + s * Q4_K_PACKED, scale, minimum);
    p += s * Q4_K_PACKED + 256;
    KV_NO_UNROLL
    for (int i = 0; i < 8; i++, p += 256) {
        const int64_t b = 8 * s + i;
        dot_codes(4, 4, rows, p, in->q + b * KV_BLOCK, in->ld, in->sum + b, in->blocks, dot);
        KV_UNROLL
        for (int r = 0; r < rows; r += planes) {
            float d = in->scale[r * in->blocks + b], x = (float)in->sum[r * in->blocks + b];
            if (planes == 2)
                x += (float)in->sum[(r + 1) * in->blocks + b] * (1.0f / 256);
            vf v = vf_mul(of_planes(planes, dot, r), vf_set1(d));
            sum[r] = vf_fma(minimum[i], vf_set1(d * x), sum[r]);
            sum[r] = vf_fma(v, scale[i], sum[r]);
        }
    }
}

/* One token in two planes, put together as integers (dot_two). */
KV_INLINE vf token_q4_k(const uint8_t *p, int64_t s, const some_inputs *in, vf sum)
{
    vf products = vf_zero(), minimums = vf_zero();
    vw line[4];
    p += s * Q4_K_PACKED;
    const uint16_t *d = (const uint16_t *)p;
    six_bits(p + 64, line);
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        kv_ahead(p + 64 * i);
    p += 256;
    KV_NO_UNROLL
    for (int half = 0; half < 2; half++)
        KV_UNROLL
        for (int i = 0; i < 4; i++, p += 256) {
            const int64_t b = 8 * s + 4 * half + i;
            const int8_t *x = in->q + b * KV_BLOCK;
            const int32_t codes = 256 * in->sum[b] + in->sum[in->blocks + b];
            const float step = in->scale[in->blocks + b];
            vf dot = dot_two(4, p, x, x + in->ld, codes);
            minimums = vf_fma(vw_code(line[2 + half], i, 0, 63), vf_set1(step * (float)codes), minimums);
            products = vf_fma(dot, vf_mul(vw_code(line[half], i, 0, 63), vf_set1(step)), products);
        }
    sum = vf_fma(products, vf_load_f16(d), sum);
    return vf_sub(sum, vf_mul(minimums, vf_load_f16(d + 16)));
}

/* Scales of the sixteen blocks of a super-block, stored plus 128. */
KV_INLINE void scales_q6_k(vf d, const uint8_t *p, vf *scale)
{
    vf less = vf_mul(d, vf_set1(-128));
    KV_UNROLL
    for (int l = 0; l < 4; l++) {
        vw line = vw_load(p + 64 * l);
        kv_ahead(p + 64 * l);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            scale[4 * l + i] = vf_fma(vw_code(line, i, 0, 255), d, less);
    }
}

KV_INLINE void super_q6_k(const int rows, const int planes, const uint8_t *p, int64_t s, const some_inputs *in, vf *sum)
{
    vf scale[16], dot[KV_ROWS], v[KV_ROWS];
    p += kv_q6_k_pair(s);
    vf d = vf_load_f16((const uint16_t *)p + s % 2 * 16);
    p += 64 + s % 2 * Q6_K_PACKED;
    scales_q6_k(d, p, scale);
    p += 256;
    KV_NO_UNROLL
    for (int i = 0; i < 8; i++) {
        const int64_t b = 8 * s + i;
        KV_UNROLL
        for (int half = 0; half < 2; half++, p += 192) {
            vw line[4];
            six_bits(p, line);
            kv_ahead(p), kv_ahead(p + 64), kv_ahead(p + 128);
            KV_UNROLL
            for (int r = 0; r < rows; r++) {
                const int8_t *x = in->q + r * in->ld + b * KV_BLOCK + 16 * half;
                d6 n = d6_start(in->offset[(r * in->blocks + b) * 2 + half]);
                dot[r] = d6_float(d6_dot(d6_dot(n, line[0], line[1], x), line[2], line[3], x + 8));
            }
            KV_UNROLL
            for (int r = 0; r < rows; r += planes) {
                vf whole = of_planes(planes, dot, r);
                v[r] = half ? vf_fma(whole, scale[2 * i + 1], v[r]) : vf_mul(whole, scale[2 * i]);
            }
        }
        KV_UNROLL
        for (int r = 0; r < rows; r += planes)
            sum[r] = vf_fma(v[r], vf_set1(in->scale[r * in->blocks + b]), sum[r]);
    }
}

KV_INLINE vf token_q6_k(const uint8_t *p, int64_t s, const some_inputs *in, vf sum)
{
    vf scale[16];
    p += kv_q6_k_pair(s);
    vf d = vf_load_f16((const uint16_t *)p + s % 2 * 16);
    p += 64 + s % 2 * Q6_K_PACKED;
    scales_q6_k(d, p, scale);
    p += 256;
    const int8_t *x = in->q + s * KV_SUPER;
    const int32_t *offset = in->offset + 16 * s;
    KV_NO_UNROLL
    for (int i = 0; i < 16; i++, p += 192, x += 16) {
        vw line[4];
        six_bits(p, line);
        kv_ahead(p), kv_ahead(p + 64), kv_ahead(p + 128);
        d6 a = d6_start(0), b = d6_start(256 * offset[i] + offset[2 * in->blocks + i]);
        a = d6_dot(d6_dot(a, line[0], line[1], x), line[2], line[3], x + 8);
        b = d6_dot(d6_dot(b, line[0], line[1], x + in->ld), line[2], line[3], x + in->ld + 8);
        vf step = vf_mul(scale[i], vf_set1(in->scale[in->blocks + 8 * s + i / 2]));
        sum = vf_fma(d6_two(a, b), step, sum);
    }
    return sum;
}

KV_INLINE void super_token(const int type, const uint8_t *panel, const kv_input *in, int64_t token, float *out, int add)
{
    const some_inputs some = inputs_from(in, 2 * token);
    vf sum = add ? vf_load(out) : vf_zero();
    for (int64_t s = 0; s < in->blocks / 8; s++)
        sum = type == KV_Q4_K ? token_q4_k(panel, s, &some, sum) : token_q6_k(panel, s, &some, sum);
    vf_store(out, sum);
}

/* One panel for `rows` rows of the input. */
KV_INLINE void super_rows(const int type, const int rows, const int planes, const uint8_t *panel, const kv_input *in,
                          int64_t first, float *out, int64_t ld_out, int add)
{
    const some_inputs some = inputs_from(in, first);
    vf sum[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows; r += planes)
        sum[r] = add ? vf_load(out + r / planes * ld_out) : vf_zero();
    for (int64_t s = 0; s < in->blocks / 8; s++)
        if (type == KV_Q4_K)
            super_q4_k(rows, planes, panel, s, &some, sum);
        else
            super_q6_k(rows, planes, panel, s, &some, sum);
    KV_UNROLL
    for (int r = 0; r < rows; r += planes)
        vf_store(out + r / planes * ld_out, sum[r]);
}

KV_MATMUL(q4_k, KV_Q4_K, kv_super_panel_bytes(KV_Q4_K, in->blocks / 8), super_rows, super_token)
KV_MATMUL(q6_k, KV_Q6_K, kv_super_panel_bytes(KV_Q6_K, in->blocks / 8), super_rows, super_token)

void KV_NAME(kv_fill_kquants)(kv_kernels *table);
void KV_NAME(kv_fill_kquants)(kv_kernels *table)
{
    table->matmul[KV_Q4_K] = matmul_q4_k;
    table->matmul[KV_Q6_K] = matmul_q6_k;
}
