// What goes into a cache: angles, append, commit.
//
// step_angles(step, ropes, any, cache_n_slots, sink_rows, cos, sin, sink_cos, sink_sin)
//   grid any
// append(step, layout, k, v, ld, cos, sin, staged_windows, staged_tiles, max_tiles)
//   grid (1 + tiles, n_kv_heads, 2), block 256
// commit(step, layout, staged_windows, staged_tiles, max_tiles)
//   grid (2 max_tiles, n_kv_heads), block any
//
// One token is appended without staging (max_tiles 0): what a tile that it packs replaces is not seen any more.
#include "common.cuh"
#include "cache.cuh"

enum { APPEND_THREADS = 256 };

extern "C" __global__ void step_angles(
    const Step *step, Ropes ropes, CacheLayout any, int64_t cache_n_slots, int sink_rows, float *cosines, float *sines,
    float *sink_cosines, float *sink_sines)
{
    angles(step, ropes, any, cache_n_slots, sink_rows, cosines, sines, sink_cosines, sink_sines,
           (int64_t)blockIdx.x * blockDim.x + threadIdx.x, (int64_t)gridDim.x * blockDim.x);
}

DEVICE void store(uint8_t *tile, int format, int64_t at, float x)
{
    if (format == KV_FORMAT_F32)
        ((float *)tile)[at] = x;
    else
        ((uint16_t *)tile)[at] = float_to_half(x);
}

// Keys of the chunk's tokens [from, to), which are lanes `lane` and up of a window tile, after RoPE.
DEVICE void put_keys(const CacheLayout &c, uint8_t *tile, int lane, const float *k, int64_t ld, const float *cosines,
                     const float *sines, int64_t from, int64_t to)
{
    int half = c.head_dim / 2, tokens = (int)(to - from);
    for (int at = threadIdx.x; at < tokens * half; at += APPEND_THREADS) {
        // neighbours of many tokens lie side by side in the tile, of few in the input
        int t = tokens < 8 ? at / half : at % tokens, i = tokens < 8 ? at % half : at / tokens;
        const float *x = k + (from + t) * ld;
        float cosine = cosines[(from + t) * half + i], sine = sines[(from + t) * half + i], a = x[i], b = x[i + half];
        store(tile, c.wk_format, (int64_t)i * TILE + lane + t, sub(mul(a, cosine), mul(b, sine)));
        store(tile, c.wk_format, (int64_t)(i + half) * TILE + lane + t, add(mul(b, cosine), mul(a, sine)));
    }
}

// One value of the head in `row` (shared, of this warp), transformed if the format wants it.
DEVICE void read_value(const CacheLayout &c, const float *v, float *row, int lane)
{
    for (int i = lane; i < c.head_dim; i += 32)
        row[i] = v[i];
    __syncwarp();
    if (is_quantised(c.v_format))
        hadamard(row, c.head_dim, lane);
}

DEVICE void put_values(const CacheLayout &c, uint8_t *tile, int first_lane, const float *v, int64_t ld, int64_t from,
                       int64_t to, float *rows)
{
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *row = rows + warp * MAX_HEAD_DIM;
    for (int64_t t = from + warp; t < to; t += APPEND_THREADS / 32) {
        read_value(c, v + t * ld, row, lane);
        int64_t at = (first_lane + t - from) * c.head_pad;
        for (int i = lane; i < c.head_pad; i += 32)
            store(tile, c.wv_format, at + i, i < c.head_dim ? row[i] : 0.f);
        __syncwarp();
    }
}

// Rows of f16, `ld` apart, to a tile: row r of group g (of 64 numbers, `width` in all) has its range at params + g *
// params_of_group. The codes come in panels of 16 `lanes`: K: lanes are a row's numbers, inputs the rows; V: the
// reverse.
DEVICE void pack_rows(int bits, const uint16_t *x, int rows, int n_rows, int ld, int width, bool values, uint8_t *tile,
                      uint8_t *codes)
{
    int lane = threadIdx.x % ROW_LANES, groups = values ? n_groups(width) : 1;
    int pad = values ? ld : rows, stride = values ? ld : TILE; // of codes, from input to input
    uint16_t *params = (uint16_t *)(tile + TILE * pad * bits / 8);
    for (int at = threadIdx.x / ROW_LANES; at < rows * groups; at += APPEND_THREADS / ROW_LANES) {
        int row = at % rows, group = at / rows, n = width - GROUP * group;
        float numbers[ROW_EACH];
        uint8_t found[ROW_EACH];
        uint16_t scale, minimum;
        n = n < GROUP ? n : GROUP;
        const uint16_t *from = x + (int64_t)row * ld + GROUP * group;
        KV_UNROLL
        for (int i = 0; i < ROW_EACH; i++) {
            int number = ROW_EACH * lane + i;
            numbers[i] = row < n_rows ? half_to_float(from[number < n ? number : 0]) : 0.f;
        }
        pack_row(bits, numbers, lane, n, found, &scale, &minimum);
        int first = GROUP * group + ROW_EACH * lane;
        KV_UNROLL
        for (int i = 0; i < ROW_EACH; i++)
            if (first + i < stride)
                codes[row * stride + first + i] = found[i];
        if (lane == 0) {
            params[2 * group * rows + row] = scale;
            params[2 * group * rows + rows + row] = minimum;
        }
    }
    __syncthreads();
    int depth = values ? TILE : pad, panel = depth * LANES * bits / 8, block = CODE_BLOCK * LANES * bits / 8;
    for (int at = 4 * threadIdx.x; at < TILE * pad * bits / 8; at += 4 * APPEND_THREADS) {
        int in_panel = at % panel, input = in_panel / block * CODE_BLOCK, in_block = in_panel % block;
        const uint8_t *of_lane = codes + input * stride + at / panel * LANES + in_block % 64 / 4;
        *(uint32_t *)(tile + at) = code_word(bits, of_lane, stride, block_lines(bits, depth, input), in_block / 64);
    }
}

DEVICE void copy_bytes(uint8_t *to, const uint8_t *from, int64_t n)
{
    for (int64_t i = 16 * threadIdx.x; i < n; i += 16 * blockDim.x)
        *(uint4 *)(to + i) = *(const uint4 *)(from + i);
}

DEVICE void append_sinks(const Step *step, const CacheLayout &c, int head, const float *k, const float *v, int64_t ld,
                         float *rows)
{
    int64_t n = c.n_sinks - step->first;
    n = n < step->n ? n : step->n;
    if (n <= 0)
        return;
    if (blockIdx.z == 0) {
        for (int64_t at = threadIdx.x; at < n * c.head_dim; at += APPEND_THREADS) {
            int64_t t = at / c.head_dim, i = at % c.head_dim;
            sink_keys(c, head)[i * c.sink_lanes + step->first + t] = k[t * ld + i];
        }
        return;
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *row = rows + warp * MAX_HEAD_DIM;
    for (int64_t t = warp; t < n; t += APPEND_THREADS / 32) {
        read_value(c, v + t * ld, row, lane);
        for (int i = lane; i < c.head_dim; i += 32)
            sink_values(c, head)[(step->first + t) * c.head_pad + i] = row[i];
        __syncwarp();
    }
}

// Puts the chunk's tokens of one tile into its window copy and packs the tile if it leaves the window: keys in blocks
// with z 0, values in the others. Block x 0 keeps the sinks.
extern "C" __global__ void __launch_bounds__(APPEND_THREADS) append(
    const Step *step, CacheLayout c, const float *k, const float *v, int64_t ld, const float *cosines,
    const float *sines, uint8_t *staged_windows, uint8_t *staged_tiles, int64_t max_tiles)
{
    __shared__ uint4 scratch[MAX_HEAD_DIM * TILE / 16];
    int head = blockIdx.y;
    int64_t first = step->first, end = first + step->n, packed_after = tiles_packed(c, end);
    Staged s = {staged_windows, staged_tiles, max_tiles, tiles_packed(c, first)};
    k += head * c.head_dim;
    v += head * c.head_dim;
    let_next_start();
    if (blockIdx.x == 0) {
        wait_for_previous();
        append_sinks(step, c, head, k, v, ld, (float *)scratch);
        return;
    }
    int64_t tile = s.packed_before + blockIdx.x - 1, start = c.n_sinks + tile * TILE;
    if (tile > tile_of(c, end - 1))
        return;
    wait_for_previous();
    int64_t from = start > first ? start : first, to = start + TILE < end ? start + TILE : end;
    uint8_t *window = unpacked_tile(c, s, head, tile);
    bool pack = tile < packed_after && c.n_slots;
    if (blockIdx.z == 0) {
        if (from < to)
            put_keys(c, window, (int)(from - start), k, ld, cosines, sines, from - first, to - first);
        __syncthreads();
        if (!pack)
            return;
        uint8_t *packed = packed_tile(c, s, head, tile);
        if (is_quantised(c.k_format))
            pack_rows(bits_of(c.k_format), (const uint16_t *)window, c.head_pad, c.head_dim, TILE, TILE, false, packed,
                      (uint8_t *)scratch);
        else
            copy_bytes(packed, window, c.k_bytes);
    } else {
        window += c.window_k_bytes;
        if (from < to)
            put_values(c, window, (int)(from - start), v, ld, from - first, to - first, (float *)scratch);
        __syncthreads();
        if (!pack)
            return;
        uint8_t *packed = packed_tile(c, s, head, tile) + c.k_bytes;
        if (is_quantised(c.v_format))
            pack_rows(bits_of(c.v_format), (const uint16_t *)window, TILE, TILE, c.head_pad, c.head_dim, true, packed,
                      (uint8_t *)scratch);
        else
            copy_bytes(packed, window, c.v_bytes);
    }
}

// Moves what was staged into the ring and the window, once no query of the chunk needs what it replaces.
extern "C" __global__ void commit(const Step *step, CacheLayout c, uint8_t *staged_windows, uint8_t *staged_tiles,
                                  int64_t max_tiles)
{
    int head = blockIdx.y;
    int64_t end = step->first + step->n, packed_after = tiles_packed(c, end);
    Staged s = {staged_windows, staged_tiles, max_tiles, tiles_packed(c, step->first)};
    if (blockIdx.x < max_tiles) {
        int64_t tile = packed_after - c.n_slots;
        tile = (tile > s.packed_before ? tile : s.packed_before) + blockIdx.x;
        if (tile < packed_after)
            copy_bytes(ring_tile(c, head, tile), packed_tile(c, s, head, tile), c.k_bytes + c.v_bytes);
    } else {
        int64_t tile = s.packed_before + c.n_window_tiles;
        tile = (tile > packed_after ? tile : packed_after) + blockIdx.x - max_tiles;
        if (tile <= tile_of(c, end - 1))
            copy_bytes(window_tile(c, head, tile), unpacked_tile(c, s, head, tile),
                       c.window_k_bytes + c.window_v_bytes);
    }
}
