// One token's embedding and angles; norms of heads.
//
// begin_step(step, ids, embed, positions, embedding_scale, hidden, x, ropes, any, cache_n_slots, sink_rows, cos, sin,
//            sink_cos, sink_sin)
//   grid at least 2, block 256
// norm_heads(qkv, ld, k_offset, q_norm, k_norm, n_heads, n_kv_heads, head_dim, eps, all)
//   grid (n_heads + n_kv_heads, n), or with all (2, n); block of whole warps, at most 256
#include "rows.cuh"
#include "unpack.cuh"
#include "cache.cuh"

enum { STEP_THREADS = 256 };

extern "C" __global__ void __launch_bounds__(STEP_THREADS) begin_step(
    const Step *step, const int *ids, Matrix embed, Matrix positions, float embedding_scale, int hidden, float *x,
    Ropes ropes, CacheLayout any, int64_t cache_n_slots, int sink_rows, float *cosines, float *sines,
    float *sink_cosines, float *sink_sines)
{
    let_next_start();
    wait_for_previous();
    if (blockIdx.x) {
        angles(step, ropes, any, cache_n_slots, sink_rows, cosines, sines, sink_cosines, sink_sines,
               (int64_t)(blockIdx.x - 1) * blockDim.x + threadIdx.x, (int64_t)(gridDim.x - 1) * blockDim.x);
        return;
    }
    unpack_row(embed.segments[0], hidden, ids[0], [&](int column, float4 v) {
        KV_UNROLL
        for (int c = 0; c < 4; c++)
            if (column + c < hidden)
                x[column + c] = of_four(v, c) * embedding_scale;
    });
    if (!positions.n_segments)
        return;
    __syncthreads();
    unpack_row(positions.segments[0], hidden, (int)step->first, [&](int column, float4 v) {
        KV_UNROLL
        for (int c = 0; c < 4; c++)
            if (column + c < hidden)
                x[column + c] += of_four(v, c);
    });
}

// Queries and keys of a token in place, each head by itself or all at once.
extern "C" __global__ void __launch_bounds__(STEP_THREADS) norm_heads(
    float *qkv, int64_t ld, int k_offset, const float *q_norm, const float *k_norm, int n_heads, int n_kv_heads,
    int head_dim, float eps, int all)
{
    __shared__ float scratch[256 / WARP];
    const int queries = all ? 1 : n_heads, j = blockIdx.x;
    const int size = head_dim * (all ? j < queries ? n_heads : n_kv_heads : 1);
    float *at = qkv + blockIdx.y * ld + (j < queries ? j * size : k_offset + (j - queries) * size);
    const float *weight = j < queries ? q_norm : k_norm;
    float squares = 0;
    let_next_start();
    wait_for_previous();
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        squares += at[i] * at[i];
    const float factor = 1 / sqrtf(block_sum(squares, scratch) / size + eps);
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        at[i] = at[i] * factor * weight[i];
}
