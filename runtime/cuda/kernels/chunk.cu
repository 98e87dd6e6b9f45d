// A chunk of tokens, but for its attention and its matrix products, which cuBLAS does on float16: out [n][ld] float32
// from inputs whose rows are divided by powers of two (row scales), so that nothing overflows.
//
//   embed_chunk        grid (n)                          x = embeddings
//   norm_to_half       grid (n)                          out, row_scale = norm of x
//   dequantize         grid (ceil(cols / 512), panels)   part of a matrix, one segment, as float16 [16 panels][cols]
//   scale_bias         grid (ceil(width / 1024), n)      products: row scales, biases
//   activate_to_half   grid (n)                          out, out_scale = activation(gate) * up, of raw products
//   add_chunk          grid (n)                          x += residual_scale * norm(products)
//   logits_chunk       grid (ceil(ld / 1024), n)         scale and soft cap
//
// Blocks of 256 threads; of up to 512 where each takes a row.
#include "rows.cuh"
#include "unpack.cuh"

enum { CHUNK_THREADS = 256, ROW_THREADS = 512, DEQUANTIZE_COLUMNS = 512, OUTPUTS_OF_BLOCK = 1024 };

extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)
    embed_chunk(const Step *step, const int *ids, Matrix embed, Matrix positions, float embedding_scale, int hidden,
                float *x, int64_t ld)
{
    int t = blockIdx.x;
    x += t * ld;
    unpack_row(embed.segments[0], hidden, ids[t], [&](int column, float4 v) {
        float values[4] = {v.x, v.y, v.z, v.w};
        for (int c = 0; c < 4 && column + c < hidden; c++)
            x[column + c] = values[c] * embedding_scale;
    });
    if (!positions.n_segments)
        return;
    __syncthreads();
    unpack_row(positions.segments[0], hidden, (int)(step->first + t), [&](int column, float4 v) {
        float values[4] = {v.x, v.y, v.z, v.w};
        for (int c = 0; c < 4 && column + c < hidden; c++)
            x[column + c] += values[c];
    });
}

// x [n][ld], out [n][cols]
extern "C" __global__ void __launch_bounds__(ROW_THREADS, 2)
    norm_to_half(Norm norm, const float *x, int64_t ld, int cols, uint16_t *out, float *row_scale)
{
    __shared__ float scratch[ROW_THREADS / WARP];
    x += blockIdx.x * ld;
    auto row = read_row<4>(cols, [&](int i) { return four_at(x, i, cols); });
    Normal normal = normal_of(norm, row, scratch);
    row_to_half(row, out + blockIdx.x * (int64_t)cols, row_scale + blockIdx.x, scratch,
                [&](int i, float4 v) { return normed(norm, normal, i, cols, v); });
}

// Through shared memory, so that both what is read and what is written is contiguous.
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS) dequantize(Matrix part, uint16_t *out)
{
    enum { STRIDE = DEQUANTIZE_COLUMNS / 4 + 2 }; // of a row of the tile, in fours
    __shared__ uint4 space[PANEL * STRIDE / 2];
    uint2 *tile = (uint2 *)space;
    const int first = blockIdx.x * DEQUANTIZE_COLUMNS, panel = blockIdx.y, cols = part.cols, quad = threadIdx.x % 4;
    const int count = cols - first < DEQUANTIZE_COLUMNS ? cols - first : DEQUANTIZE_COLUMNS;
    unpack(part.segments[0], cols, panel, first, DEQUANTIZE_COLUMNS, threadIdx.x, CHUNK_THREADS,
           [&](int i, int column, float4 v) { tile[(4 * quad + i) * STRIDE + (column - first) / 4] = four_halves(v); });
    __syncthreads();
    out += (int64_t)PANEL * panel * cols + first;
    if (cols % 8 == 0) {
        KV_UNROLL
        for (int at = threadIdx.x; at < PANEL * DEQUANTIZE_COLUMNS / 8; at += CHUNK_THREADS) {
            int row = at / (DEQUANTIZE_COLUMNS / 8), piece = at % (DEQUANTIZE_COLUMNS / 8);
            if (8 * piece < count)
                *(uint4 *)(out + row * (int64_t)cols + 8 * piece) = *(const uint4 *)(tile + row * STRIDE + 2 * piece);
        }
    } else {
        for (int at = threadIdx.x; at < PANEL * DEQUANTIZE_COLUMNS; at += CHUNK_THREADS) {
            int row = at / DEQUANTIZE_COLUMNS, column = at % DEQUANTIZE_COLUMNS;
            if (column < count)
                out[row * (int64_t)cols + column] = ((const uint16_t *)(tile + row * STRIDE))[column];
        }
    }
}

// out [n][ld], products of m
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)
    scale_bias(Matrix m, const float *row_scale, float *out, int64_t ld)
{
    const float scale = row_scale[blockIdx.y];
    const bool biased = has_bias(m);
    const int i = blockIdx.x * OUTPUTS_OF_BLOCK + 4 * threadIdx.x;
    if (i >= m.width || (scale == 1 && !biased))
        return;
    out += blockIdx.y * ld;
    float4 x = outputs_at(m, biased, out, scale, i, m.width);
    KV_UNROLL
    for (int c = 0; c < 4; c++)
        out[i + c] = of_four(x, c);
}

// gate_out, up_out [n][ld]: products of gate and up; out [n][rows of up]. Without a gate: activation(up). row_scale 0:
// they are scaled already. out_scale may be row_scale.
extern "C" __global__ void __launch_bounds__(ROW_THREADS, 2)
    activate_to_half(Matrix gate, Matrix up, int activation, const float *gate_out, const float *up_out, int64_t ld,
                     const float *row_scale, uint16_t *out, float *out_scale)
{
    __shared__ float scratch[ROW_THREADS / WARP];
    const int cols = up.segments[0].rows;
    const float scale = row_scale ? row_scale[blockIdx.x] : 1;
    const bool gate_biased = has_bias(gate), up_biased = has_bias(up);
    gate_out += blockIdx.x * ld;
    up_out += blockIdx.x * ld;
    auto row = read_row<6>(cols, [&](int i) {
        float4 y = outputs_at(up, up_biased, up_out, scale, i, cols);
        if (!gate.n_segments)
            return map_four([&](int c) { return activated(activation, of_four(y, c)); });
        float4 x = outputs_at(gate, gate_biased, gate_out, scale, i, cols);
        return map_four([&](int c) { return activated(activation, of_four(x, c)) * of_four(y, c); });
    });
    row_to_half(row, out + blockIdx.x * (int64_t)cols, out_scale + blockIdx.x, scratch,
                [](int, float4 v) { return v; });
}

// branch [n][ld_branch]: products of m, or with row_scale 0 and no segments in m what is added as it is; x [n][ld].
extern "C" __global__ void __launch_bounds__(ROW_THREADS, 2)
    add_chunk(Matrix m, Norm norm, const float *row_scale, const float *branch, int64_t ld_branch, int hidden,
              float residual_scale, float *x, int64_t ld)
{
    __shared__ float scratch[ROW_THREADS / WARP];
    let_next_start();
    wait_for_previous();
    const float scale = row_scale ? row_scale[blockIdx.x] : 1;
    const bool biased = has_bias(m);
    branch += blockIdx.x * ld_branch;
    auto row = read_row<4>(hidden, [&](int i) { return outputs_at(m, biased, branch, scale, i, hidden); });
    add_row(norm, row, residual_scale, x + blockIdx.x * ld, scratch);
}

// logits [n][ld]; softcap 0: none
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)
    logits_chunk(const float *row_scale, float scale, float softcap, float *logits, int64_t ld)
{
    scale *= row_scale[blockIdx.y];
    logits += blockIdx.y * ld;
    for (int i = threadIdx.x; i < OUTPUTS_OF_BLOCK; i += blockDim.x) {
        int64_t at = (int64_t)blockIdx.x * OUTPUTS_OF_BLOCK + i;
        if (at < ld) {
            float x = logits[at] * scale;
            logits[at] = softcap > 0 ? softcap * tanhf(x / softcap) : x;
        }
    }
}
