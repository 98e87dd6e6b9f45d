// Rows of floats, one to a block of threads: norms, activations, conversion to float16 with a scale. Threads take four
// elements at a time and keep the first of them in registers from pass to pass.
#pragma once
#include "common.cuh"

#ifdef KVRUN_HOST
#define MEMBER inline
#else
#define MEMBER __device__ __forceinline__
#endif

DEVICE float of_four(const float4 &x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
DEVICE bool is_aligned(const void *p, int bytes) { return !((uint64_t)p % bytes); }

template <class F> DEVICE float4 map_four(F f) { return make_float4(f(0), f(1), f(2), f(3)); }

// Elements [i, i + 4) of a row of n; 0 beyond it.
DEVICE float4 four_at(const float *row, int i, int n)
{
    if (i + 4 <= n && is_aligned(row + i, 16))
        return *(const float4 *)(row + i);
    return map_four([&](int c) { return i + c < n ? row[i + c] : 0; });
}

// What a thread keeps of a row: KEPT fours. value(i): elements [i, i + 4); anything beyond the row.
template <int KEPT, class F> struct Row {
    float4 kept[KEPT];
    int n;
    F value;

    // use(i, elements from i on) for each four of this thread.
    template <class G> MEMBER void each(G use) const
    {
        KV_UNROLL
        for (int k = 0; k < KEPT; k++) {
            int i = 4 * (threadIdx.x + k * blockDim.x);
            if (i < n)
                use(i, kept[k]);
        }
        for (int i = 4 * (threadIdx.x + KEPT * blockDim.x); i < n; i += 4 * blockDim.x)
            use(i, value(i));
    }

    // The sum over the row of f(element).
    template <class G> MEMBER float sum(float *scratch, G f) const
    {
        float total = 0;
        each([&](int i, float4 x) {
            KV_UNROLL
            for (int c = 0; c < 4; c++)
                total += i + c < n ? f(of_four(x, c)) : 0;
        });
        return block_sum(total, scratch);
    }
};

template <int KEPT, class F> DEVICE Row<KEPT, F> read_row(int n, F value)
{
    Row<KEPT, F> row = {{}, n, value};
    KV_UNROLL
    for (int k = 0; k < KEPT; k++) {
        int i = 4 * (threadIdx.x + k * blockDim.x);
        if (i < n)
            row.kept[k] = value(i);
    }
    return row;
}

// What turns a row into its normed one: (x - mean) * factor * weight + bias.
struct Normal {
    float mean, factor;
};

template <class R> DEVICE Normal normal_of(const Norm &norm, const R &row, float *scratch)
{
    Normal out = {0, 1};
    if (!norm.weight)
        return out;
    if (norm.layer_norm)
        out.mean = row.sum(scratch, [](float x) { return x; }) / row.n;
    float squares = row.sum(scratch, [&](float x) { return (x - out.mean) * (x - out.mean); });
    out.factor = 1 / sqrtf(squares / row.n + norm.eps);
    return out;
}

DEVICE float4 normed(const Norm &norm, const Normal &normal, int i, int n, float4 x)
{
    if (!norm.weight)
        return x;
    float4 weight = four_at(norm.weight, i, n), bias = make_float4(0, 0, 0, 0);
    if (norm.layer_norm)
        bias = four_at(norm.bias, i, n);
    return map_four(
        [&](int c) { return (of_four(x, c) - normal.mean) * normal.factor * of_four(weight, c) + of_four(bias, c); });
}

DEVICE float activated(int activation, float x)
{
    if (activation == KV_SILU)
        return x / (1 + expf(-x));
    if (activation == KV_GELU)
        return 0.5f * x * erfcf(-0.707106781f * x);
    float u = x * (0.797884561f + 0.0356774081f * x * x);
    return x / (1 + expf(-2 * u));
}

// The scale of a row whose largest element is `top`: 1 where float16 has room for it and is fine enough, or where it
// has no largest element; or the power of two that brings it to at most 2^15.
DEVICE float row_scale_of(float top)
{
    if (!(top > 0 && top < INFINITY) || (top >= 0.125f && top < 32768))
        return 1;
    int exponent = (int)(__float_as_uint(top) >> 23) - 14;
    return __uint_as_float((uint32_t)(exponent < 1 ? 1 : exponent) << 23);
}

DEVICE float inverse_of_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

DEVICE uint2 four_halves(float4 x)
{
    return make_uint2(float_to_half(x.x) | (uint32_t)float_to_half(x.y) << 16,
                      float_to_half(x.z) | (uint32_t)float_to_half(x.w) << 16);
}

// change(i, elements) of a row as float16: out * *row_scale.
template <class R, class F>
DEVICE void row_to_half(const R &row, uint16_t *out, float *row_scale, float *scratch, F change)
{
    float top = 0;
    row.each([&](int i, float4 x) {
        float4 y = change(i, x);
        KV_UNROLL
        for (int c = 0; c < 4; c++) {
            float size = i + c < row.n ? fabsf(of_four(y, c)) : 0;
            top = size <= top ? top : size == size ? size : INFINITY; // fmaxf would pass over what is not a number
        }
    });
    float scale = row_scale_of(block_max(top, scratch)), inverse = inverse_of_power(scale);
    row.each([&](int i, float4 x) {
        float4 y = change(i, x);
        y = map_four([&](int c) { return of_four(y, c) * inverse; });
        if (i + 4 <= row.n && is_aligned(out + i, 8)) {
            *(uint2 *)(out + i) = four_halves(y);
        } else {
            for (int c = 0; c < 4 && i + c < row.n; c++)
                out[i + c] = float_to_half(of_four(y, c));
        }
    });
    if (threadIdx.x == 0)
        *row_scale = scale;
}

// x += scale * norm(row)
template <class R> DEVICE void add_row(const Norm &norm, const R &row, float scale, float *x, float *scratch)
{
    Normal normal = normal_of(norm, row, scratch);
    row.each([&](int i, float4 v) {
        float4 before = four_at(x, i, row.n), y = normed(norm, normal, i, row.n, v);
        y = map_four([&](int c) { return of_four(before, c) + scale * of_four(y, c); });
        if (i + 4 <= row.n && is_aligned(x + i, 16)) {
            *(float4 *)(x + i) = y;
        } else {
            for (int c = 0; c < 4 && i + c < row.n; c++)
                x[i + c] = of_four(y, c);
        }
    });
}

DEVICE bool has_bias(const Matrix &m)
{
    bool any = false;
    for (int k = 0; k < m.n_segments; k++)
        any |= m.segments[k].bias != 0;
    return any;
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

// Outputs [i, i + 4) of a matrix, of n, out of a row of its products; biased: has_bias(m).
DEVICE float4 outputs_at(const Matrix &m, bool biased, const float *products, float scale, int i, int n)
{
    float4 x = four_at(products, i, n);
    x = map_four([&](int c) { return of_four(x, c) * scale; });
    return biased ? map_four([&](int c) { return of_four(x, c) + bias_of(m, i + c); }) : x;
}
