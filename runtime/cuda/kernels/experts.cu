// Mixture of experts (as _core/experts.pyx): a router's scores choose a few experts for each token, and
// shares for them.
//
// One token, after the router's scores:
//   choose           grid (1)
//   experts_gated    grid (panels of up, used)       out [used][width of up] = activation(gate x) * (up x), x normed
//   experts_down     grid (panels of down)           out (+)= sum of share * (down in)
// A chunk, its normed input as float16 with row scales:
//   route            grid (n)                        scores, in float32
//   choose           grid (n)
//   sort_slots       grid (1)                        slots, which are pairs of a token and a choice, by expert
//   experts_matmul   grid (panels / 4, tiles)        for gate, for up, and (by_slot) for down
//   experts_add      grid (n)                        x += residual_scale * norm(sum of share * slot_out)
//
// Experts have no biases, and their matrices one segment each; `const Matrix *` is a table of all experts in the
// device's memory. Only the weights of chosen experts are read.
#include "rows.cuh"
#include "unpack.cuh"

enum { ROUTE_THREADS = 256, CHOOSE_THREADS = WARP, SORT_THREADS = 256, EXPERT_THREADS = 128, ADD_THREADS = 512 };
enum { TILE_SLOTS = 64, TILE_PANELS = 4, TILE_COLUMNS = 64 };

DEVICE int padded_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of a panel times x [cols, and zeros up to a multiple of 32], by all threads of a block; thread r < 16 gets row
// r. x, scratch [16 * warps]: shared; scratch is free again on return.
DEVICE float panel_product(const Matrix &m, int panel, const float *x, float *scratch)
{
    float sums[4] = {0, 0, 0, 0};
    unpack(m.segments[0], m.cols, panel, 0, padded_to(m.cols, 64), threadIdx.x, blockDim.x,
           [&](int i, int column, float4 w) {
               float4 v = *(const float4 *)(x + column);
               sums[i] += w.x * v.x + w.y * v.y + (w.z * v.z + w.w * v.w);
           });
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        KV_UNROLL
        for (int by = 4; by < WARP; by *= 2)
            sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], by);
        if (lane < 4)
            scratch[PANEL * warp + 4 * lane + i] = sums[i];
    }
    __syncthreads();
    float sum = 0;
    if (threadIdx.x < PANEL)
        for (int i = 0; i < (int)blockDim.x / WARP; i++)
            sum += scratch[PANEL * i + threadIdx.x];
    __syncthreads();
    return sum;
}

// The normed row in shared memory, with zeros up to a multiple of 32.
DEVICE void put_normed(const Norm &norm, const float *x, int cols, float *to, float *scratch)
{
    auto row = read_row<4>(cols, [&](int i) { return four_at(x, i, cols); });
    Normal normal = normal_of(norm, row, scratch);
    row.each([&](int i, float4 v) { *(float4 *)(to + i) = normed(norm, normal, i, cols, v); });
    __syncthreads();
    for (int i = cols + threadIdx.x; i < padded_to(cols, BLOCK); i += blockDim.x)
        to[i] = 0;
    __syncthreads();
}

// Shared memory: the input, padded to a multiple of 32. scores [n][ld_scores]
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS)
    route(Matrix router, Norm norm, const float *x, int64_t ld, float *scores, int64_t ld_scores)
{
    SHARED(space);
    __shared__ float scratch[PANEL * ROUTE_THREADS / WARP];
    float *input = (float *)space;
    put_normed(norm, x + blockIdx.x * ld, router.cols, input, scratch);
    for (int panel = 0; panel < router.panels; panel++) {
        float sum = panel_product(router, panel, input, scratch);
        if (threadIdx.x < PANEL)
            scores[blockIdx.x * ld_scores + PANEL * panel + threadIdx.x] = sum;
    }
}

// Whether (score, index) comes before (other, other_index) in the order of choices.
DEVICE bool before(float score, int index, float other, int other_index)
{
    return score > other || (score == other && index < other_index);
}

// scores [n][ld], chosen and share [n][used]: the largest of the softmax of all scores. Blocks of one warp.
extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose(const float *scores, int64_t ld, int n_experts, int used, int normalize, int *chosen, float *share)
{
    const int lane = threadIdx.x;
    float top = -INFINITY, total = 0, kept = 0, last = INFINITY;
    int last_index = -1;
    scores += blockIdx.x * ld;
    chosen += blockIdx.x * (int64_t)used;
    share += blockIdx.x * (int64_t)used;
    let_next_start();
    wait_for_previous();
    for (int e = lane; e < n_experts; e += WARP)
        top = fmaxf(top, scores[e]);
    top = warp_max(top);
    for (int e = lane; e < n_experts; e += WARP)
        total += expf(scores[e] - top);
    total = warp_sum(total);
    for (int j = 0; j < used; j++) {
        float best = -1;
        int index = n_experts;
        for (int e = lane; e < n_experts; e += WARP) {
            float score = expf(scores[e] - top);
            if (before(last, last_index, score, e) && before(score, e, best, index))
                best = score, index = e;
        }
        for (int by = WARP / 2; by > 0; by /= 2) {
            float other = __shfl_xor_sync(0xffffffffu, best, by);
            int other_index = __shfl_xor_sync(0xffffffffu, index, by);
            if (before(other, other_index, best, index))
                best = other, index = other_index;
        }
        last = best, last_index = index;
        kept += best;
        if (lane == 0) {
            chosen[j] = index < n_experts ? index : 0; // scores that are not numbers choose nobody
            share[j] = best;
        }
    }
    __syncwarp();
    if (normalize && total == total)
        total = kept;
    for (int j = lane; j < used; j += WARP)
        share[j] /= total;
}

// One token
// -------------------------------------------------------------------------------------------------------------------

// Shared memory: the input, padded to a multiple of 32.
extern "C" __global__ void __launch_bounds__(EXPERT_THREADS)
    experts_gated(const Matrix *gate, const Matrix *up, Norm norm, const float *x, const int *chosen, int activation,
                  float *out)
{
    SHARED(space);
    __shared__ float scratch[PANEL * EXPERT_THREADS / WARP];
    float *input = (float *)space;
    let_next_start();
    wait_for_previous();
    const int expert = chosen[blockIdx.y], panel = blockIdx.x;
    put_normed(norm, x, up[expert].cols, input, scratch);
    float g = panel_product(gate[expert], panel, input, scratch), u = panel_product(up[expert], panel, input, scratch);
    if (threadIdx.x < PANEL)
        out[(int64_t)blockIdx.y * up[expert].width + PANEL * panel + threadIdx.x] = activated(activation, g) * u;
}

// in [used][ld_in]. Shared memory: a row of it, padded to a multiple of 32.
extern "C" __global__ void __launch_bounds__(EXPERT_THREADS)
    experts_down(const Matrix *down, const float *in, int64_t ld_in, const int *chosen, const float *share, int used,
                 float *out, int add)
{
    SHARED(space);
    __shared__ float scratch[PANEL * EXPERT_THREADS / WARP];
    float *input = (float *)space, sum = 0;
    const int row = PANEL * blockIdx.x + threadIdx.x;
    let_next_start();
    wait_for_previous();
    for (int j = 0; j < used; j++) {
        const Matrix &m = down[chosen[j]];
        for (int i = threadIdx.x; i < padded_to(m.cols, BLOCK); i += blockDim.x)
            input[i] = i < m.cols ? in[j * ld_in + i] * share[j] : 0;
        __syncthreads();
        sum += panel_product(m, blockIdx.x, input, scratch);
    }
    if (threadIdx.x < PANEL && row < down[chosen[0]].segments[0].rows)
        out[row] = add ? out[row] + sum : sum;
}

// A chunk
// ---------------------------------------------------------------------------------------------------------------------

// Slots of one expert come one after the other, and tiles have up to 64 of them.
struct Slots {
    int *choice;                           // [slots] the place in `chosen` of each slot
    int *of;                               // [slots] and back
    int *n_tiles, *expert, *first, *count; // [tiles] of each tile
};

DEVICE Slots slots_in(int *memory, int n_slots, int n_experts)
{
    int most = n_slots / TILE_SLOTS + n_experts;
    int *tiles = memory + 2 * (int64_t)n_slots + 1;
    return {memory, memory + n_slots, tiles - 1, tiles, tiles + most, tiles + 2 * most};
}

// slots: int [2 * n * used + 1 + 3 * tiles], tiles = n * used / 64 + n_experts. Shared memory: int [2 * n_experts + 1].
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    sort_slots(const int *chosen, int n, int used, int n_experts, int *slots)
{
    SHARED(space);
    int *first = (int *)space, *next = first + n_experts + 1; // expert e has slots [first[e], first[e + 1])
    const int n_slots = n * used;
    Slots s = slots_in(slots, n_slots, n_experts);
    for (int e = threadIdx.x; e <= n_experts; e += blockDim.x)
        first[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_slots; i += blockDim.x)
        atomicAdd(&first[chosen[i] + 1], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        int n_tiles = 0;
        for (int e = 0; e < n_experts; e++) {
            int count = first[e + 1];
            next[e] = first[e];
            for (int i = 0; i < count; i += TILE_SLOTS, n_tiles++) {
                s.expert[n_tiles] = e;
                s.first[n_tiles] = first[e] + i;
                s.count[n_tiles] = count - i < TILE_SLOTS ? count - i : TILE_SLOTS;
            }
            first[e + 1] += first[e];
        }
        *s.n_tiles = n_tiles;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_slots; i += blockDim.x) {
        int slot = atomicAdd(&next[chosen[i]], 1);
        s.choice[slot] = i;
        s.of[i] = slot;
    }
}

enum { TILE_STRIDE = TILE_COLUMNS + 8 }; // halves of a row of a tile

// x [rows of the tile][TILE_COLUMNS] from channel `column` on; zeros where there are none. row: of each slot, -1 for
// none.
DEVICE void gather(const uint16_t *x, const int *row, int column, int cols, uint16_t *tile)
{
    if (cols % 8 == 0) {
        for (int at = threadIdx.x; at < TILE_SLOTS * TILE_COLUMNS / 8; at += EXPERT_THREADS) {
            int slot = at / (TILE_COLUMNS / 8), c = at % (TILE_COLUMNS / 8) * 8;
            bool there = row[slot] >= 0 && column + c < cols;
            *(uint4 *)(tile + slot * TILE_STRIDE + c) =
                there ? *(const uint4 *)(x + row[slot] * (int64_t)cols + column + c) : make_uint4(0, 0, 0, 0);
        }
    } else {
        for (int at = threadIdx.x; at < TILE_SLOTS * TILE_COLUMNS; at += EXPERT_THREADS) {
            int slot = at / TILE_COLUMNS, c = at % TILE_COLUMNS;
            bool there = row[slot] >= 0 && column + c < cols;
            tile[slot * TILE_STRIDE + c] = there ? x[row[slot] * (int64_t)cols + column + c] : 0;
        }
    }
}

DEVICE uint32_t pair_at(const uint16_t *tile, int row, int column)
{
    return *(const uint32_t *)(tile + row * TILE_STRIDE + column);
}

// sums [16 rows][64 slots] of a warp += weights [16][TILE_COLUMNS] times x [slots][TILE_COLUMNS], spread as PTX has it.
DEVICE void multiply(const uint16_t *weights, const uint16_t *x, int count, float (*sums)[4])
{
    const int g = threadIdx.x % WARP / 4, pair = threadIdx.x % 4 * 2;
    KV_UNROLL
    for (int k = 0; k < TILE_COLUMNS; k += 16) {
        uint32_t a0 = pair_at(weights, g, k + pair), a1 = pair_at(weights, g + 8, k + pair);
        uint32_t a2 = pair_at(weights, g, k + 8 + pair), a3 = pair_at(weights, g + 8, k + 8 + pair);
        KV_UNROLL
        for (int j = 0; j < TILE_SLOTS / 8; j++)
            if (8 * j < count)
                mma_m16n8k16(sums[j], a0, a1, a2, a3, pair_at(x, 8 * j + g, k + pair),
                             pair_at(x, 8 * j + g, k + 8 + pair));
    }
}

// out [n * used][ld] = each slot's expert's matrix times its input: that of its token in x [n][cols], or (by_slot) its
// own in x [n * used][cols], times the row scale. A warp has a panel.
extern "C" __global__ void __launch_bounds__(EXPERT_THREADS)
    experts_matmul(const Matrix *matrices, const int *slots, int n, int used, int n_experts, const uint16_t *x,
                   const float *row_scale, int by_slot, float *out, int64_t ld)
{
    __shared__ uint4 weight_space[TILE_PANELS * PANEL * TILE_STRIDE / 8], input_space[TILE_SLOTS * TILE_STRIDE / 8];
    __shared__ int row[TILE_SLOTS];
    const Slots s = slots_in((int *)slots, n * used, n_experts);
    const int tile = blockIdx.y, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (tile >= *s.n_tiles)
        return;
    const Matrix &m = matrices[s.expert[tile]];
    const Segment segment = m.segments[0];
    const int cols = m.cols, first = s.first[tile], count = s.count[tile], panel = TILE_PANELS * blockIdx.x + warp;
    uint16_t *weights = (uint16_t *)weight_space + warp * PANEL * TILE_STRIDE, *input = (uint16_t *)input_space;
    float sums[TILE_SLOTS / 8][4] = {};
    for (int i = threadIdx.x; i < TILE_SLOTS; i += EXPERT_THREADS)
        row[i] = i >= count ? -1 : by_slot ? first + i : s.choice[first + i] / used;
    for (int column = 0; column < cols; column += TILE_COLUMNS) {
        __syncthreads();
        gather(x, row, column, cols, input);
        if (panel < segment.panels) {
            for (int i = lane; column + TILE_COLUMNS > cols && i < PANEL * TILE_STRIDE; i += WARP)
                weights[i] = 0;
            __syncwarp();
            unpack(segment, cols, panel, column, TILE_COLUMNS, lane, WARP, [&](int i, int c, float4 v) {
                *(uint2 *)(weights + (lane % 4 * 4 + i) * TILE_STRIDE + c - column) = four_halves(v);
            });
        }
        __syncthreads();
        if (panel < segment.panels)
            multiply(weights, input, count, sums);
    }
    if (panel >= segment.panels)
        return;
    KV_UNROLL
    for (int j = 0; j < TILE_SLOTS / 8; j++)
        KV_UNROLL
    for (int i = 0; i < 4; i++) {
        int slot = 8 * j + lane % 4 * 2 + i % 2;
        if (slot < count)
            out[(first + slot) * ld + PANEL * panel + lane / 4 + i / 2 * 8] = sums[j][i] * row_scale[row[slot]];
    }
}

// slot_out [n * used][ld_slots], share [n][used], x [n][ld]
extern "C" __global__ void __launch_bounds__(ADD_THREADS, 2)
    experts_add(Norm norm, const int *slots, const float *share, int used, const float *slot_out, int64_t ld_slots,
                int hidden, float residual_scale, int n, int n_experts, float *x, int64_t ld)
{
    __shared__ float scratch[512 / WARP];
    const int first = blockIdx.x * used;
    const int *slot = slots_in((int *)slots, n * used, n_experts).of + first;
    auto row = read_row<4>(hidden, [&](int i) {
        float4 sum = make_float4(0, 0, 0, 0);
        for (int j = 0; j < used; j++) {
            float4 x = four_at(slot_out + slot[j] * ld_slots, i, hidden);
            sum = map_four([&](int c) { return of_four(sum, c) + share[first + j] * of_four(x, c); });
        }
        return sum;
    });
    add_row(norm, row, residual_scale, x + blockIdx.x * ld, scratch);
}
