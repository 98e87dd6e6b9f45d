// Products of one token's activations with matrices.
//
// matvec(matrix, norm, x, out, add, scale, softcap, split, next, next_bytes)
//   out (+)= matrix norm(x), with biases, times scale, capped
// matvec_gated(gate, up, norm, x, activation, out, split, next, next_bytes)
//   out = activation(gate norm(x)) * (up norm(x)); activation(up norm(x)) if gate has no segments
//   grid any, block 512, of which a multiprocessor has room for one. Of outputs only rows that are there are written.
//   split: warps that share a panel, a power of two up to 16; a block's groups take panels a grid apart.
//   Shared memory: 72 bytes for each 32 channels of the input, rounded up to 16, where a segment takes int8, and 128
//   bytes for each 32 where one takes floats.
//   next: memory that a later kernel reads first, which is fetched into the L2 cache; 0: not known.
#include "products.cuh"

// Has a block's share of what the next kernel reads first fetched into the L2 cache.
DEVICE void fetch_next(const uint8_t *next, int64_t bytes)
{
#ifndef KVRUN_HOST
    if (!next)
        return;
    const int64_t share = (bytes / gridDim.x + 127) / 128 * 128, from = blockIdx.x * share;
    const int64_t to = from + share < bytes ? from + share : bytes;
    for (int64_t at = from + 32 * threadIdx.x; at < to; at += 32 * blockDim.x)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(next + at));
#endif
}

// Whether segments of a type that takes int8, or of one that takes floats, are there.
DEVICE bool any_type(const Matrix &m, bool codes)
{
#ifdef KV_WEIGHT_TYPES
    return KV_WEIGHT_TYPES & (codes ? ~FLOAT_TYPES : FLOAT_TYPES);
#else
    bool any = false;
    for (int k = 0; k < m.n_segments; k++)
        any |= takes_codes(m.segments[k].type) == codes;
    return any;
#endif
}

// Sums of a panel's rows by the warps of a group: [buffer][matrix][warp][row].
typedef float Sums[2][2][MATVEC_WARPS][PANEL];

// The total of row lane % 16 of a group of warps.
DEVICE float total_of(const float (*sums)[PANEL], int warps, int lane)
{
    float total = 0;
    KV_UNROLL
    for (int w = 0; w < MATVEC_WARPS; w += 2)
        total += w + lane / PANEL < warps ? sums[w + lane / PANEL][lane % PANEL] : 0.f;
    return total + __shfl_xor_sync(0xffffffffu, total, 16);
}

// put(output, before(output), product of the first matrix, of the second) of every output; if n_matrices is 1 both are
// of the second. Groups of `split` warps take a panel each, first of one matrix and then of the other.
template <class P, class B>
DEVICE void products(const Matrix &first, const Matrix &second, int n_matrices, const Norm &norm, const float *x,
                     int split, const uint8_t *next, int64_t next_bytes, B before, P put)
{
    SHARED(shared);
    __shared__ Sums sums;
    const int cols = second.cols, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, shift = __ffs(split) - 1;
    const int group = warp >> shift, groups = MATVEC_WARPS >> shift, leader = group << shift;
    const int thread = threadIdx.x - leader * WARP, threads = split * WARP, stride = gridDim.x * groups;
    int panel = blockIdx.x + group * gridDim.x;
    Units units;
    const bool two = n_matrices == 2;
    Part part = two ? part_of(first, panel) : part_of(second, panel);
    load_first(units, part, cols, thread, threads);
    let_next_start();
    const bool codes = any_type(second, true) || (two && any_type(first, true));
    const Input in = input_in(shared, cols, codes);
    prepare(in, norm, x, cols, any_type(second, false) || (two && any_type(first, false)), codes, &sums[1][0][0][0]);
    __syncthreads();
    float bias = 0;
    KV_NO_UNROLL
    for (int turn = 0, at = 0; blockIdx.x + turn * stride < second.panels;) {
        const bool last = at + 1 == n_matrices, leads = last && warp == leader + (turn & (split - 1));
        const bool there = lane < PANEL && lane < part.rows;
        const int type = part.type, output = PANEL * panel + lane;
        const float other_bias = bias;
        bias = there && part.bias ? part.bias[lane] : 0;
        float sum[4];
        multiply(units, part, in, cols, thread, threads, sum);
        const float prior = leads && there ? before(output) : 0;
        if (last)
            panel += stride;
        part = last && two ? part_of(first, panel) : part_of(second, panel);
        load_first(units, part, cols, thread, threads);
        put_sums(sum, type, lane, sums[turn % 2][at][warp]);
        if (!last) {
            at = 1;
            continue;
        }
        if (blockIdx.x + (turn + 1) * stride >= second.panels)
            fetch_next(next, next_bytes);
        __syncthreads();
        if (leads) {
            const float y = total_of(sums[turn % 2][at] + leader, split, lane) + bias;
            const float x = two ? total_of(sums[turn % 2][0] + leader, split, lane) + other_bias : y;
            if (there)
                put(output, prior, x, y);
        }
        at = 0;
        turn++;
    }
}

extern "C" __global__ void __launch_bounds__(MATVEC_THREADS, 1) matvec(
    const __grid_constant__ Matrix m, const __grid_constant__ Norm norm, const float *x, float *out, int add,
    float scale, float softcap, int split, const uint8_t *next, int64_t next_bytes)
{
    products(m, m, 1, norm, x, split, next, next_bytes, [&](int i) { return add ? out[i] : 0.f; },
             [&](int i, float prior, float y, float) {
                 y *= scale;
                 if (softcap > 0)
                     y = softcap * tanhf(y / softcap);
                 out[i] = prior + y;
             });
}

extern "C" __global__ void __launch_bounds__(MATVEC_THREADS, 1) matvec_gated(
    const __grid_constant__ Matrix gate, const __grid_constant__ Matrix up, const __grid_constant__ Norm norm,
    const float *x, int activation, float *out, int split, const uint8_t *next, int64_t next_bytes)
{
    const bool gated = gate.n_segments;
    products(gate, up, gated ? 2 : 1, norm, x, split, next, next_bytes, [&](int) { return 0.f; },
             [&](int i, float, float y, float z) { out[i] = activated(activation, y) * (gated ? z : 1); });
}
