// Rows of floats, one to a block of threads: norms, activations, conversion to float16 with a scale.
#pragma once
#include "common.cuh"

// What turns a row into its normed one: (x - mean) * factor * weight + bias.
struct Normal {
    float mean, factor;
};

// value(i): element i of the row; called by the thread that has it, twice for a layer norm.
template <class F> DEVICE Normal normal_of(const Norm &norm, int n, float *scratch, F value)
{
    Normal out = {0, 1};
    if (!norm.weight)
        return out;
    float sum = 0;
    if (norm.layer_norm) {
        for (int i = threadIdx.x; i < n; i += blockDim.x)
            sum += value(i);
        out.mean = block_sum(sum, scratch) / n;
        sum = 0;
    }
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x = value(i) - out.mean;
        sum += x * x;
    }
    out.factor = 1 / sqrtf(block_sum(sum, scratch) / n + norm.eps);
    return out;
}

DEVICE float normed(const Norm &norm, const Normal &normal, int i, float x)
{
    if (!norm.weight)
        return x;
    x = (x - normal.mean) * normal.factor * norm.weight[i];
    return norm.layer_norm ? x + norm.bias[i] : x;
}

DEVICE float activated(int activation, float x)
{
    if (activation == ACTIVATION_SILU)
        return x / (1 + expf(-x));
    if (activation == ACTIVATION_GELU)
        return 0.5f * x * erfcf(-0.707106781f * x);
    float u = x * (0.797884561f + 0.0356774081f * x * x);
    return x / (1 + expf(-2 * u));
}

// The power of two that brings a row whose largest element is `top` to at most 2^15; 1 for what has none.
DEVICE float row_scale_of(float top)
{
    if (!(top > 0 && top < INFINITY))
        return 1;
    int exponent = (int)(__float_as_uint(top) >> 23) - 14;
    return __uint_as_float((uint32_t)(exponent < 1 ? 1 : exponent) << 23);
}

DEVICE float inverse_of_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

// A row as float16: out = value / *row_scale.
template <class F> DEVICE void row_to_half(int n, uint16_t *out, float *row_scale, float *scratch, F value)
{
    float top = 0;
    bool broken = false; // fmaxf passes over what is not a number
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x = value(i);
        top = fmaxf(top, fabsf(x));
        broken |= x != x;
    }
    float scale = row_scale_of(block_max(broken ? INFINITY : top, scratch)), inverse = inverse_of_power(scale);
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        out[i] = float_to_half(value(i) * inverse);
    if (threadIdx.x == 0)
        *row_scale = scale;
}

// x += scale * norm(value)
template <class F> DEVICE void add_row(const Norm &norm, int n, float scale, float *x, float *scratch, F value)
{
    Normal normal = normal_of(norm, n, scratch, value);
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        x[i] += scale * normed(norm, normal, i, value(i));
}

// Bias of output i of a matrix.
DEVICE float bias_of(const Matrix &m, int i)
{
    for (int k = 0; k < m.n_segments; k++) {
        const Segment &s = m.segments[k];
        if (s.bias && i >= s.offset && i < s.offset + s.rows)
            return s.bias[i - s.offset];
    }
    return 0;
}
