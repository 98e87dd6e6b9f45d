// The input of a product: normed, as floats, and (for block types) as int8 in blocks of 32, in two planes of which the
// second has steps 256 times finer: 16 bits in all, as kv_input of kernels.h has it. In shared memory; each block of
// threads makes its own.
#pragma once
#include "rows.cuh"

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
        in.sums[block] = make_uint2(__float_as_uint(largest / 127 / 256), (uint32_t)sum);
}

// scratch: a float for each warp. The caller waits for all threads before it reads the input.
DEVICE void prepare(const Input &in, const Norm &norm, const float *x, int cols, bool floats, bool codes,
                    float *scratch)
{
    auto row = read_row<2>(cols, [&](int i) { return four_at(x, i, cols); });
    const Normal normal = normal_of(norm, row, scratch);
    for (int k = 0; 4 * (int)(threadIdx.x / WARP * WARP + k * blockDim.x) < BLOCK * in.blocks; k++) {
        const int i = 4 * (threadIdx.x + k * blockDim.x);
        float4 v = make_float4(0, 0, 0, 0);
        if (i < cols) {
            v = normed(norm, normal, i, cols, k == 0 ? row.kept[0] : k == 1 ? row.kept[1] : row.value(i));
            v = map_four([&](int c) { return i + c < cols ? of_four(v, c) : 0; });
        }
        if (floats && i < BLOCK * in.blocks)
            *(float4 *)(in.floats + i) = v;
        if (codes)
            put_codes(in, i, v);
    }
}
