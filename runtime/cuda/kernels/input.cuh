// The input of a product: normed, as floats, and (for block types) as int8 in blocks of 32, in two planes of which the
// second has steps 256 times finer: 16 bits in all, as kv_input of kernels.h has it. In shared memory; each block of
// threads makes its own.
#pragma once
#include "rows.cuh"

#ifdef KVRUN_HOST
#define KV_NO_UNROLL
#else
#define KV_NO_UNROLL _Pragma("unroll 1")
#endif

// floats: [cols, padded with zeros to 32]. codes [4][blocks]: of line l of a block, channels from 4 l and from 16 + 4 l
// on of the first plane, then of the second. sums [blocks]: the step of the second plane, and 256 times the sum of the
// codes of the first plane plus that of the second.
struct Input {
    float *floats;
    uint4 *codes;
    uint2 *sums;
    int blocks;
};

DEVICE bool takes_codes(int type) { return type >= WEIGHT_Q8_0; }
DEVICE int n_blocks(int cols) { return (cols + BLOCK - 1) / BLOCK; }

DEVICE Input input_in(uint4 *shared, int cols, bool codes)
{
    Input in = {0, shared, 0, n_blocks(cols)};
    in.sums = (uint2 *)(shared + 4 * in.blocks);
    in.floats = (float *)(codes ? in.sums + (in.blocks + 1) / 2 * 2 : (uint2 *)shared);
    return in;
}

DEVICE uint32_t four_bytes(float4 x)
{
    return ((uint32_t)(int)x.x & 255) | ((uint32_t)(int)x.y & 255) << 8 | ((uint32_t)(int)x.z & 255) << 16
           | (uint32_t)(int)x.w << 24;
}

// In 256ths; within +-127.
DEVICE float rounded_away(float x) { return fminf(fmaxf((x - rintf(x)) * 256, -127.f), 127.f); }

// Codes of a block of 32 by eight lanes: channels i to i + 3 of this one are x. A whole warp calls it.
DEVICE void put_codes(const Input &in, int i, float4 x)
{
    float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
    KV_UNROLL
    for (int bit = 1; bit < 8; bit *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
    const float inverse = largest > 0 ? 127 / largest : 0;
    x = map_four([&](int c) { return of_four(x, c) * inverse; });
    const uint32_t first = four_bytes(map_four([&](int c) { return rintf(of_four(x, c)); }));
    const uint32_t second = four_bytes(map_four([&](int c) { return rintf(rounded_away(of_four(x, c))); }));
    int sum = 256 * dp4a(first, 0x01010101u, 0) + dp4a(second, 0x01010101u, 0);
    KV_UNROLL
    for (int bit = 1; bit < 8; bit *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    const int block = i / BLOCK, word = i % BLOCK / 4;
    if (block >= in.blocks)
        return;
    uint32_t *at = (uint32_t *)(in.codes + word % 4 * in.blocks + block) + word / 4;
    at[0] = first;
    at[2] = second;
    if (word == 0)
        in.sums[block] = make_uint2(__float_as_uint(largest * (1 / (127 * 256.f))), (uint32_t)sum);
}

// Elements [i, i + 4) of a row of n, which is aligned to 16 bytes; 0 beyond it.
DEVICE float4 four_of(const float *row, int i, int n)
{
    if (i + 4 <= n)
        return *(const float4 *)(row + i);
    return map_four([&](int c) { return i + c < n ? row[i + c] : 0.f; });
}

DEVICE float sum_of(float4 x) { return x.x + x.y + (x.z + x.w); }

// The sum of (x - mean)^2 of those of four elements that are among n; of x if linear.
DEVICE float part_of_sum(float4 x, int i, int n, float mean, bool linear)
{
    return sum_of(map_four([&](int c) {
        const float v = i + c < n ? of_four(x, c) - mean : 0;
        return linear ? v : v * v;
    }));
}

// Rows are read by all threads of a block, four elements each at a time, two times ahead.
struct Reader {
    const float *row;
    int n, step;
    float4 now, next;
};

DEVICE Reader read(const float *row, int n)
{
    Reader r = {row, n, 4 * (int)blockDim.x};
    r.now = four_of(row, 4 * threadIdx.x, n);
    r.next = four_of(row, 4 * threadIdx.x + r.step, n);
    return r;
}

// Goes on from element i of `now`.
DEVICE void advance(Reader &r, int i)
{
    r.now = r.next;
    r.next = four_of(r.row, i + 2 * r.step, r.n);
}

DEVICE float row_sum_of(const Reader &r, float mean, bool linear, float *scratch)
{
    const int i = 4 * threadIdx.x;
    float sum = part_of_sum(r.now, i, r.n, mean, linear) + part_of_sum(r.next, i + r.step, r.n, mean, linear);
    KV_NO_UNROLL
    for (int j = i + 2 * r.step; j < r.n; j += r.step)
        sum += part_of_sum(four_of(r.row, j, r.n), j, r.n, mean, linear);
    return block_sum(sum, scratch);
}

// x may be what the kernel before writes. scratch: a float for each warp. The caller waits for all threads before it
// reads the input.
DEVICE void prepare(const Input &in, const Norm &norm, const float *x, int cols, bool floats, bool codes,
                    float *scratch)
{
    const bool normed = norm.weight, centred = normed && norm.layer_norm;
    Reader weight = {};
    float mean = 0, factor = 1;
    if (normed)
        weight = read(norm.weight, cols);
    wait_for_previous();
    Reader values = read(x, cols);
    if (centred)
        mean = row_sum_of(values, 0, true, scratch) / cols;
    if (normed)
        factor = 1 / sqrtf(row_sum_of(values, mean, false, scratch) / cols + norm.eps);
    KV_NO_UNROLL
    for (int i = 4 * threadIdx.x; i - 4 * (int)(threadIdx.x % WARP) < BLOCK * in.blocks; i += values.step) {
        float4 v = values.now, w = weight.now;
        advance(values, i);
        if (normed) {
            advance(weight, i);
            v = map_four([&](int c) { return (of_four(v, c) - mean) * factor * of_four(w, c); });
        }
        if (centred) {
            const float4 bias = four_of(norm.bias, i, cols);
            v = map_four([&](int c) { return of_four(v, c) + of_four(bias, c); });
        }
        if (floats && i < BLOCK * in.blocks)
            *(float4 *)(in.floats + i) = v;
        if (codes)
            put_codes(in, i, v);
    }
}
