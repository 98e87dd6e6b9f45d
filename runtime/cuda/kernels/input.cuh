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

enum { FLOAT_TYPES = 1 << KV_F32 | 1 << KV_F16 | 1 << KV_BF16 }; // sets of types: a bit for each
DEVICE bool takes_codes(int type) { return !(FLOAT_TYPES >> type & 1); }
DEVICE int n_blocks(int cols) { return (cols + BLOCK - 1) / BLOCK; }

DEVICE Input input_in(uint4 *shared, int cols, bool codes)
{
    Input in = {0, shared, 0, n_blocks(cols)};
    in.sums = (uint2 *)(shared + 4 * in.blocks);
    in.floats = (float *)(codes ? in.sums + (in.blocks + 1) / 2 * 2 : (uint2 *)shared);
    return in;
}

// Of a number within +-2^21: the nearest whole one is in the low bits of the sum with it.
#define WHOLE_BITS 12582912.f

DEVICE uint32_t low_bytes(float4 x)
{
    return __byte_perm(__byte_perm(__float_as_uint(x.x), __float_as_uint(x.y), 0x0040),
                       __byte_perm(__float_as_uint(x.z), __float_as_uint(x.w), 0x0040), 0x5410);
}

// 127 / x; 0 for 0.
DEVICE float inverse_step(float x)
{
#ifdef KVRUN_HOST
    return x > 0 ? 127 / x : 0;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return x > 0 ? 127 * y : 0;
#endif
}

// Codes of a block of 32 by eight lanes: channels i to i + 3 of this one are x. A whole warp calls it.
DEVICE void put_codes(const Input &in, int i, float4 x)
{
    float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
    KV_UNROLL
    for (int bit = 1; bit < 8; bit *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
    const float inverse = inverse_step(largest), most = 127 / 256.f;
    x = map_four([&](int c) { return of_four(x, c) * inverse; });
    const float4 whole = map_four([&](int c) { return of_four(x, c) + WHOLE_BITS; });
    const float4 rest = map_four([&](int c) { // in 256ths; within +-127
        return fminf(fmaxf(of_four(x, c) - (of_four(whole, c) - WHOLE_BITS), -most), most) * 256 + WHOLE_BITS;
    });
    const uint32_t first = low_bytes(whole), second = low_bytes(rest);
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

// Elements [i, i + 4) of a row of n, which is aligned to 16 bytes and whose memory ends so: what is beyond it is
// anything, or 0 if all are.
DEVICE float4 four_of(const float *row, int i, int n)
{
    return i < n ? *(const float4 *)(row + i) : make_float4(0, 0, 0, 0);
}

DEVICE void clear_beyond(float4 &x, int i, int n)
{
    if (i + 4 > n)
        x = map_four([&](int c) { return i + c < n ? of_four(x, c) : 0.f; });
}

enum { MATVEC_THREADS = 512, MATVEC_WARPS = MATVEC_THREADS / WARP, READ_STEP = 4 * MATVEC_THREADS };

// A row read by all threads of a block, four elements each at a time, two times ahead.
struct Reader {
    const float *row;
    int n;
    float4 now, next;
};

DEVICE Reader read(const float *row, int n)
{
    Reader r = {row, n};
    r.now = four_of(row, 4 * threadIdx.x, n);
    r.next = four_of(row, 4 * threadIdx.x + READ_STEP, n);
    return r;
}

// Goes on from element i of `now`.
DEVICE void advance(Reader &r, int i)
{
    r.now = r.next;
    r.next = four_of(r.row, i + 2 * READ_STEP, r.n);
}

// The sum over a row of what f makes of four elements. scratch: shared, a float for each warp, not used again.
template <class F> DEVICE float row_sum(const Reader &r, float *scratch, F f)
{
    float4 now = r.now, next = r.next;
    const int first = 4 * threadIdx.x;
    float sum = 0;
    KV_NO_UNROLL
    for (int i = first; i < r.n; i += READ_STEP) {
        float4 x = now;
        now = next;
        if (i + 2 * READ_STEP < r.n)
            next = *(const float4 *)(r.row + i + 2 * READ_STEP);
        sum += f(x, i);
    }
    const int lane = threadIdx.x % WARP;
    sum = warp_sum(sum);
    if (lane == 0)
        scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = scratch[lane % MATVEC_WARPS];
    KV_UNROLL
    for (int bit = 1; bit < MATVEC_WARPS; bit *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    return sum;
}

// x may be what the kernel before writes; rows are aligned to 16 bytes and may be read up to a multiple of them.
// scratch: two floats for each warp. The caller waits for all threads before it reads the input, or uses scratch.
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
        mean = row_sum(values, scratch, [&](float4 v, int i) {
                   clear_beyond(v, i, cols);
                   return v.x + v.y + (v.z + v.w);
               })
               / cols;
    if (normed)
        factor = 1 / sqrtf(row_sum(values, scratch + MATVEC_WARPS, [&](float4 v, int i) {
                               v = map_four([&](int c) { return of_four(v, c) - mean; });
                               clear_beyond(v, i, cols);
                               return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
                           }) / cols + norm.eps);
    const int end = BLOCK * in.blocks;
    KV_NO_UNROLL
    for (int i = 4 * threadIdx.x; (i & ~(4 * WARP - 1)) < end; i += READ_STEP) {
        float4 v = values.now;
        advance(values, i);
        if (normed) {
            const float4 w = weight.now;
            advance(weight, i);
            v = map_four([&](int c) { return (of_four(v, c) - mean) * factor * of_four(w, c); });
            if (centred) {
                const float4 bias = four_of(norm.bias, i, cols);
                v = map_four([&](int c) { return of_four(v, c) + of_four(bias, c); });
            }
        }
        clear_beyond(v, i, cols);
        if (floats && i < end)
            *(float4 *)(in.floats + i) = v;
        if (codes)
            put_codes(in, i, v);
    }
}
