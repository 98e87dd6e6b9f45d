/* Element-wise kernels: norms, quantisation of inputs, rotation, activations, soft cap. */
#include "simd/simd.h"

static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out)
{
    vf squares = vf_zero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        vf v = vf_load(x + i);
        squares = vf_fma(v, v, squares);
    }
    vf tail = vf_load_part(x + i, n - i);
    float mean = vf_sum(vf_fma(tail, tail, squares)) / (float)n;
    vf scale = vf_set1(1.0f / sqrtf(mean + eps));
    for (i = 0; i + 16 <= n; i += 16)
        vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), scale), vf_load(weight + i)));
    if (i < n)
        vf_store_part(out + i, vf_mul(vf_mul(tail, scale), vf_load_part(weight + i, n - i)), n - i);
}

static void layer_norm(const float *x, const float *weight, const float *bias, int64_t n, float eps, float *out)
{
    vf sums = vf_zero(), squares = vf_zero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        sums = vf_add(sums, vf_load(x + i));
    sums = vf_add(sums, vf_load_part(x + i, n - i));
    const float average = vf_sum(sums) / (float)n;
    vf mean = vf_set1(average), scale;
    for (i = 0; i + 16 <= n; i += 16) {
        vf v = vf_sub(vf_load(x + i), mean);
        squares = vf_fma(v, v, squares);
    }
    float rest = 0;
    for (int64_t j = i; j < n; j++) {
        float v = x[j] - average;
        rest += v * v;
    }
    scale = vf_set1(1.0f / sqrtf((vf_sum(squares) + rest) / (float)n + eps));
    for (i = 0; i + 16 <= n; i += 16)
        vf_store(out + i, vf_fma(vf_mul(vf_sub(vf_load(x + i), mean), scale), vf_load(weight + i), vf_load(bias + i)));
    if (i < n) {
        vf v = vf_mul(vf_sub(vf_load_part(x + i, n - i), mean), scale);
        vf_store_part(out + i, vf_fma(v, vf_load_part(weight + i, n - i), vf_load_part(bias + i, n - i)), n - i);
    }
}

/* In 256ths; within +-127, since a code of -128 has no negative in int8. */
KV_INLINE vf rounded_away(vf x)
{
    vf rest = vf_mul(vf_sub(x, vf_round(x)), vf_set1(256));
    return vf_max(vf_min(rest, vf_set1(127)), vf_set1(-127));
}

/* Codes of a block of 32, their sum, and what 6-bit codes start from. */
KV_INLINE void put_codes(vf low, vf high, int8_t *q, int32_t *sum, int32_t *offset)
{
    int32_t first = vf_store_i8(q, low), second = vf_store_i8(q + 16, high);
    *sum = first + second;
    if (offset) {
        offset[0] = -32 * first;
        offset[1] = -32 * second;
    }
}

/* step: codes from a block to the next one; second: from its first plane to its second. */
KV_INLINE void quantize(const float *x, int64_t n, int64_t planes, int64_t step, int64_t second, int8_t *q,
                        float *scale, int32_t *sum, int32_t *offset)
{
    const int64_t blocks = (n + KV_BLOCK - 1) / KV_BLOCK;
    for (int64_t b = 0; b < blocks; b++, q += step) {
        const float *block = x + b * KV_BLOCK;
        int64_t left = n - b * KV_BLOCK;
        vf low, high;
        if (left >= KV_BLOCK) {
            low = vf_load(block);
            high = vf_load(block + 16);
        } else {
            low = vf_load_part(block, left < 16 ? left : 16);
            high = vf_load_part(block + 16, left < 16 ? 0 : left - 16);
        }
        float largest = vf_top(vf_max(vf_abs(low), vf_abs(high)));
        vf inverse = vf_set1(largest > 0 ? 127 / largest : 0);
        low = vf_mul(low, inverse);
        high = vf_mul(high, inverse);
        scale[b] = largest / 127;
        put_codes(low, high, q, sum + b, offset ? offset + 2 * b : NULL);
        if (planes == 2) {
            low = rounded_away(low);
            high = rounded_away(high);
            scale[blocks + b] = scale[b] / 256;
            put_codes(low, high, q + second, sum + blocks + b, offset ? offset + 2 * (blocks + b) : NULL);
        }
    }
}

static void quantize_input(const float *x, int64_t n, int64_t planes, int8_t *q, float *scale, int32_t *sum,
                           int32_t *offset)
{
    quantize(x, n, planes, planes * KV_BLOCK, KV_BLOCK, q, scale, sum, offset);
}

/* The same with codes [planes][blocks * 32]. */
void KV_NAME(kv_quantize_planes)(const float *x, int64_t n, int64_t planes, int8_t *q, float *scale, int32_t *sum,
                                 int32_t *offset);
void KV_NAME(kv_quantize_planes)(const float *x, int64_t n, int64_t planes, int8_t *q, float *scale, int32_t *sum,
                                 int32_t *offset)
{
    quantize(x, n, planes, KV_BLOCK, (n + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK, q, scale, sum, offset);
}

static void rope(const float *x, const float *cos, const float *sin, int64_t head_dim, float scale, float *out)
{
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i] * scale, b = x[i + half] * scale;
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
}

KV_INLINE f4 f4_load(const float *p) { f4 x; memcpy(&x, p, sizeof x); return x; }

/* The first two steps of the transform, on four numbers in a register: sums and differences of neighbours. */
KV_INLINE f4 hadamard_4(f4 x)
{
    x = __builtin_shufflevector(x, x, 1, 0, 3, 2) + x * (f4){1, -1, 1, -1};
    return __builtin_shufflevector(x, x, 2, 3, 0, 1) + x * (f4){1, 1, -1, -1};
}

/* size: a power of two, at least 4 */
static void hadamard_block(float *x, int64_t size)
{
    float norm = 1 / sqrtf((float)size);
    for (int64_t i = 0; i < size; i += 4)
        f4_store(x + i, hadamard_4(f4_load(x + i)) * norm);
    for (int64_t step = 4; step < size; step *= 2)
        for (int64_t i = 0; i < size; i += 2 * step)
            for (int64_t j = i; j < i + step; j += 4) {
                f4 a = f4_load(x + j), b = f4_load(x + j + step);
                f4_store(x + j, a + b);
                f4_store(x + j + step, a - b);
            }
}

static void hadamard(float *x, int64_t n)
{
    while (n > 0) {
        int64_t size = 1;
        while (2 * size <= n)
            size *= 2;
        if (size >= 4)
            hadamard_block(x, size);
        if (size == 2) {
            float a = x[0] * 0.70710678f, b = x[1] * 0.70710678f;
            x[0] = a + b;
            x[1] = a - b;
        }
        x += size;
        n -= size;
    }
}

KV_INLINE vf silu(vf x)
{
    return vf_div(x, vf_add(vf_set1(1), vf_exp(vf_sub(vf_zero(), x))));
}

/* x times the standard normal distribution's integral to x. The tail, half of erfc(|x| / sqrt 2), is exp(-x^2 / 2)
 * times a polynomial in t = 1 / (1 + |x| / sqrt 8), fitted for the least relative error: 4e-8 before rounding. */
KV_INLINE vf gelu(vf x)
{
    vf t = vf_div(vf_set1(1), vf_fma(vf_abs(x), vf_set1(0.353553391f), vf_set1(1)));
    vf p = vf_fma(t, vf_set1(-0.0588894114f), vf_set1(0.283695817f));
    p = vf_fma(p, t, vf_set1(-0.485371917f));
    p = vf_fma(p, t, vf_set1(0.275965720f));
    p = vf_fma(p, t, vf_set1(-0.0251698010f));
    p = vf_fma(p, t, vf_set1(0.202066764f));
    p = vf_fma(p, t, vf_set1(0.243261725f));
    p = vf_fma(p, t, vf_set1(0.282353401f));
    p = vf_fma(p, t, vf_set1(0.282087684f));
    vf tail = vf_mul(vf_mul(p, vf_mul(t, vf_set1(0.5f))), vf_exp(vf_mul(vf_mul(x, x), vf_set1(-0.5f))));
    return vf_mul(x, vf_pick(x, vf_zero(), vf_sub(vf_set1(1), tail), tail));
}

/* The approximation of Hendrycks and Gimpel 2016: (1 + tanh u) / 2 is 1 / (1 + e^-2u). */
KV_INLINE vf gelu_tanh(vf x)
{
    vf u = vf_mul(x, vf_fma(vf_mul(x, x), vf_set1(0.0356774081f), vf_set1(0.797884561f)));
    return vf_div(x, vf_add(vf_set1(1), vf_exp(vf_mul(u, vf_set1(-2)))));
}

/* out = NAME(x) * up, or NAME(x) if there is no up */
#define KV_ACTIVATION(NAME)                                                                                            \
    static void activate_##NAME(const float *x, const float *up, int64_t n, float *out)                                \
    {                                                                                                                  \
        int64_t i = 0;                                                                                                 \
        for (; i + 16 <= n; i += 16) {                                                                                 \
            vf v = NAME(vf_load(x + i));                                                                               \
            vf_store(out + i, up ? vf_mul(v, vf_load(up + i)) : v);                                                    \
        }                                                                                                              \
        if (i < n) {                                                                                                   \
            vf v = NAME(vf_load_part(x + i, n - i));                                                                   \
            vf_store_part(out + i, up ? vf_mul(v, vf_load_part(up + i, n - i)) : v, n - i);                            \
        }                                                                                                              \
    }
KV_ACTIVATION(silu)
KV_ACTIVATION(gelu)
KV_ACTIVATION(gelu_tanh)

/* tanh: near 0 an odd polynomial (relative error 2e-8 before rounding), where the exponential would cancel. */
KV_INLINE vf tanh_(vf x)
{
    vf z = vf_mul(x, x), size = vf_abs(x);
    vf p = vf_fma(z, vf_set1(-5.13862353e-3f), vf_set1(2.00919341e-2f));
    p = vf_fma(p, z, vf_set1(-5.35588525e-2f));
    p = vf_fma(p, z, vf_set1(1.33291110e-1f));
    p = vf_fma(p, z, vf_set1(-3.33331913e-1f));
    p = vf_fma(vf_mul(p, z), x, x);
    vf far = vf_sub(vf_set1(1), vf_div(vf_set1(2), vf_add(vf_exp(vf_add(size, size)), vf_set1(1))));
    far = vf_pick(x, vf_zero(), far, vf_sub(vf_zero(), far));
    return vf_pick(size, vf_set1(0.625f), far, p);
}

static void soft_cap(float *x, int64_t n, float cap)
{
    const vf top = vf_set1(cap), inverse = vf_set1(1 / cap);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        vf_store(x + i, vf_mul(tanh_(vf_mul(vf_load(x + i), inverse)), top));
    if (i < n)
        vf_store_part(x + i, vf_mul(tanh_(vf_mul(vf_load_part(x + i, n - i), inverse)), top), n - i);
}

void KV_NAME(kv_fill_vector)(kv_kernels *table);
void KV_NAME(kv_fill_vector)(kv_kernels *table)
{
    table->rms_norm = rms_norm;
    table->quantize = quantize_input;
    table->hadamard = hadamard;
    table->rope = rope;
    table->layer_norm = layer_norm;
    table->activate[KV_SILU] = activate_silu;
    table->activate[KV_GELU] = activate_gelu;
    table->activate[KV_GELU_TANH] = activate_gelu_tanh;
    table->soft_cap = soft_cap;
}
