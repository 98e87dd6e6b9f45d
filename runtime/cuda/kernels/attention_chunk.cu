// Attention of a chunk of tokens: blocked, causal, on tensor cores (FlashAttention-2, arXiv 2307.08691).
//
// attend_chunk(step, layout, q, ld, group, scale, softcap, cos, sin, sink_cos, sink_sin, staged_windows, staged_tiles,
//              max_tiles, out, ld_out)
//   grid (blocks, n_kv_heads * ceil(group / min(group, 64))), block 128; see attention.py for blocks and buffers
//
// A block has up to 64 rows: tokens that see the same tiles packed, times heads of a KV head; a warp 16 of them.
// Every tile is unpacked once for the block, to float16 as the cache lays it out: K [head_dim][64], V [64][head_dim].
#include "common.cuh"
#include "cache.cuh"
#include "attention.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS, ROWS = 64, WARP_ROWS = 16 };

DEVICE int q_pitch(const CacheLayout &c) { return 2 * head_pad_of(c) + 16; }
DEVICE int v_pitch(const CacheLayout &c) { return (head_pad_of(c) + 63) / 64 * 128; }
enum { K_PITCH = 2 * TILE };

// A piece of 8 halves in a row: eight rows below each other have it in different banks.
DEVICE int piece_at(int pitch, int row, int piece) { return row * pitch + ((piece ^ (row & 7)) << 4); }

// Queries [start, end) of the chunk, which see the same tiles packed.
struct QueryBlock {
    int64_t start, end, packed;
};

DEVICE bool find_block(const Step *step, const CacheLayout &c, int number, int tokens, QueryBlock *b)
{
    int64_t n = step->n, packed = tiles_packed(c, step->first + 1);
    int64_t change = c.n_sinks + c.window + TILE * (packed + 1) - step->first - 1; // the first token that sees one more
    int64_t run = change < n ? change : n, blocks = (run + tokens - 1) / tokens, start = 0;
    if (number >= blocks) { // runs of 64 tokens follow
        int64_t of_run = (TILE + tokens - 1) / tokens;
        start = run + (number - blocks) / of_run * TILE;
        number = (int)((number - blocks) % of_run);
        run = start + TILE < n ? start + TILE : n;
    }
    b->start = start + (int64_t)number * tokens;
    b->end = b->start + tokens < run ? b->start + tokens : run;
    if (b->start >= b->end)
        return false;
    b->packed = tiles_packed(c, step->first + b->start + 1);
    return true;
}

// Tiles as float16 in shared memory ---------------------------------------------------------------------------------

struct Shared {
    uint8_t *q, *k, *v;
};

DEVICE void zero_16(uint8_t *to) { *(uint4 *)to = make_uint4(0, 0, 0, 0); }

// [rows][pieces of 8] of a tile; rows from `real` on are zeros.
DEVICE void copy_tile(int format, const uint8_t *from, int rows, int real, int pieces, uint8_t *to, int pitch)
{
    for (int at = threadIdx.x; at < rows * pieces; at += THREADS) {
        const int row = at / pieces, piece = at % pieces;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < real && format == KV_FORMAT_F16) {
            x = ((const uint4 *)from)[at];
        } else if (row < real) {
            const float *f = (const float *)from + 8 * (int64_t)at;
            x.x = half2_pack(bounded(f[0]), bounded(f[1])), x.y = half2_pack(bounded(f[2]), bounded(f[3]));
            x.z = half2_pack(bounded(f[4]), bounded(f[5])), x.w = half2_pack(bounded(f[6]), bounded(f[7]));
        }
        *(uint4 *)(to + piece_at(pitch, row, piece)) = x;
    }
}

// Panels of 16 lanes, `depth` inputs deep: to[input][lane] = code * scale + minimum. params: float16 scales of the
// inputs, and minima `depth` later; another set of 2 depth for every `panels_of_set` panels. A thread has two lanes
// of a line at a time.
DEVICE void unpack_panels(int bits, const uint8_t *codes, int panels, int depth, const uint8_t *params,
                          int panels_of_set, uint8_t *to, int pitch)
{
    const int lines = depth * bits / 32, fields = 8 / bits; // of a panel
    for (int at = threadIdx.x; at < panels * lines * 8; at += THREADS) {
        const int g = at % 8, line = at / 8 % lines, panel = at / 8 / lines;
        const int block = line / bits * CODE_BLOCK, in_block = line % bits, of_block = block_lines(bits, depth, block);
        const uint2 words = *(const uint2 *)(codes + ((int64_t)panel * lines + line) * 64 + 8 * g);
        const uint8_t *set = params + panel / panels_of_set * 4 * depth;
        uint32_t byte[4];
        KV_UNROLL
        for (int i = 0; i < 4; i++) // the bytes i of both words, each twice
            byte[i] = permute(words.x, words.y, 0x4400 + 0x1111 * i);
        KV_UNROLL
        for (int f = 0; f < 4; f++) {
            if (f >= fields)
                break;
            const int input = block + 4 * (f * of_block + in_block);
            const uint2 scales = *(const uint2 *)(set + 2 * input);
            const uint2 minima = *(const uint2 *)(set + 2 * (depth + input));
            KV_UNROLL
            for (int i = 0; i < 4; i++) {
                const uint32_t mask = ((1u << bits) - 1) * 0x10001u, twice = i % 2 ? 0x3232 : 0x1010;
                const uint32_t scale = i < 2 ? scales.x : scales.y, minimum = i < 2 ? minima.x : minima.y;
                uint32_t x = (byte[i] >> f * bits & mask) | 0x64006400u; // 1024 + code
                x = half2_fma(half2_add(x, 0xe400e400u), permute(scale, 0, twice), permute(minimum, 0, twice));
                *(uint32_t *)(to + piece_at(pitch, input + i, 2 * panel + g / 4) + g % 4 * 4) = x;
            }
        }
    }
}

DEVICE void load_keys(const CacheLayout &c, const uint8_t *tile, bool packed, const Shared &s)
{
    const int format = k_format_of(c), pad = head_pad_of(c), bits = bits_of(format);
    if (packed && is_quantised(format))
        unpack_panels(bits, tile, TILE / LANES, pad, tile + TILE * pad * bits / 8, TILE / LANES, s.k, K_PITCH);
    else
        copy_tile(format == KV_FORMAT_F32 ? KV_FORMAT_F32 : KV_FORMAT_F16, tile, head_dim_of(c), head_dim_of(c),
                  TILE / 8, s.k, K_PITCH);
}

// Values of the first `tokens`; zeros for the others, which nobody has written.
DEVICE void load_values(const CacheLayout &c, const uint8_t *tile, bool packed, int tokens, const Shared &s)
{
    const int format = v_format_of(c), pad = head_pad_of(c), bits = bits_of(format);
    if (packed && is_quantised(format))
        unpack_panels(bits, tile, pad / LANES, TILE, tile + TILE * pad * bits / 8, GROUP / LANES, s.v, v_pitch(c));
    else
        copy_tile(format == KV_FORMAT_F32 ? KV_FORMAT_F32 : KV_FORMAT_F16, tile, TILE, tokens, pad / 8, s.v,
                  v_pitch(c));
}

// Sinks [start, start + tokens) in the place of a tile.
DEVICE void load_sinks(const CacheLayout &c, int head, int start, int tokens, const float *cosines, const float *sines,
                       int place, const Shared &s)
{
    const int half = head_dim_of(c) / 2;
    for (int at = threadIdx.x; at < half * tokens; at += THREADS) {
        const int i = at / tokens, token = at % tokens, in_piece = token % 8 * 2;
        const float2 turned = rotated_sink(c, sink_keys(c, head), cosines, sines, place, i, start + token);
        *(uint16_t *)(s.k + piece_at(K_PITCH, i, token / 8) + in_piece) = float_to_half(bounded(turned.x));
        *(uint16_t *)(s.k + piece_at(K_PITCH, i + half, token / 8) + in_piece) = float_to_half(bounded(turned.y));
    }
    copy_tile(KV_FORMAT_F32, (const uint8_t *)(sink_values(c, head) + (int64_t)start * head_pad_of(c)), TILE, tokens,
              head_pad_of(c) / 8, s.v, v_pitch(c));
}

// A warp's rows -----------------------------------------------------------------------------------------------------

// 16 rows; this thread has rows g and g + 8 (g = lane / 4), and of every 8 tokens or channels 2t and 2t + 1 (t = lane
// % 4).
struct Rows {
    int64_t position[2];
    float top[2], total[2];
    float acc[2 * MAX_STEPS][4];
};

// The right sides of two products: 16 rows from `row` on, 8 columns of `piece` and of the next.
DEVICE void right_sides(const uint8_t *from, int pitch, int row, int piece, int lane, uint32_t *b)
{
    load_transposed(b, from + piece_at(pitch, row + lane % 16, piece + lane / 16));
}

DEVICE void score_tile(const CacheLayout &c, const Shared &s, const uint32_t (*kept)[4], int warp, int lane,
                       float (*scores)[4])
{
    const int g = lane / 4, t = lane % 4;
    KV_UNROLL
    for (int j = 0; j < TILE / 8; j++)
        scores[j][0] = scores[j][1] = scores[j][2] = scores[j][3] = 0;
    KV_UNROLL
    for (int step = 0; step < MAX_STEPS; step++) {
        if (step >= head_pad_of(c) / 16)
            break;
        uint32_t a[4];
        if (MAX_PAD <= 128) {
            KV_UNROLL
            for (int i = 0; i < 4; i++)
                a[i] = kept[step < 8 ? step : 0][i];
        } else {
            const uint8_t *q = s.q + (WARP_ROWS * warp + g) * q_pitch(c) + 32 * step + 4 * t;
            a[0] = *(const uint32_t *)q, a[1] = *(const uint32_t *)(q + 8 * q_pitch(c));
            a[2] = *(const uint32_t *)(q + 16), a[3] = *(const uint32_t *)(q + 8 * q_pitch(c) + 16);
        }
        KV_UNROLL
        for (int j = 0; j < TILE / 8; j += 2) {
            uint32_t b[4];
            right_sides(s.k, K_PITCH, 16 * step, j, lane, b);
            multiply(scores[j], a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply(scores[j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// From scores to weights, 0 for tokens that a row does not see; start: position of the tile's first token, which has
// `tokens`.
DEVICE void weigh_tile(const CacheLayout &c, Rows &r, float (*scores)[4], int64_t start, int tokens, float softcap,
                       int lane)
{
    const int t = lane % 4;
    KV_UNROLL
    for (int h = 0; h < 2; h++) {
        const Seen seen = seen_by(c, r.position[h], start, tokens);
        float most = -INFINITY;
        KV_UNROLL
        for (int j = 0; j < TILE / 8; j++)
            KV_UNROLL
            for (int i = 0; i < 2; i++) {
                const int token = 8 * j + 2 * t + i;
                const float score = capped(scores[j][2 * h + i], softcap);
                scores[j][2 * h + i] = token >= seen.from && token < seen.to ? score : -INFINITY;
                most = higher(scores[j][2 * h + i], most);
            }
        most = higher(__shfl_xor_sync(0xffffffffu, most, 1), most);
        most = higher(__shfl_xor_sync(0xffffffffu, most, 2), most);
        const float top = higher(most, r.top[h]), base = top == -INFINITY ? 0.f : top - 8;
        const float shrink = top > r.top[h] ? power_of_2(r.top[h] - top) : 1.f;
        r.top[h] = top;
        r.total[h] *= shrink;
        KV_UNROLL
        for (int j = 0; j < 2 * MAX_STEPS; j++)
            r.acc[j][2 * h] *= shrink, r.acc[j][2 * h + 1] *= shrink;
        KV_UNROLL
        for (int j = 0; j < TILE / 8; j++)
            KV_UNROLL
            for (int i = 0; i < 2; i++) {
                scores[j][2 * h + i] = power_of_2(scores[j][2 * h + i] - base);
                r.total[h] += scores[j][2 * h + i];
            }
    }
}

DEVICE void add_tile(const CacheLayout &c, const Shared &s, const float (*p)[4], Rows &r, int lane)
{
    KV_UNROLL
    for (int step = 0; step < TILE / 16; step++) {
        const uint32_t a0 = half2_pack(p[2 * step][0], p[2 * step][1]), a1 = half2_pack(p[2 * step][2], p[2 * step][3]);
        const uint32_t a2 = half2_pack(p[2 * step + 1][0], p[2 * step + 1][1]);
        const uint32_t a3 = half2_pack(p[2 * step + 1][2], p[2 * step + 1][3]);
        KV_UNROLL
        for (int j = 0; j < 2 * MAX_STEPS; j += 2) {
            if (j >= head_pad_of(c) / 8)
                break;
            uint32_t b[4];
            right_sides(s.v, v_pitch(c), 16 * step, j, lane, b);
            multiply(r.acc[j], a0, a1, a2, a3, b[0], b[1]);
            multiply(r.acc[j + 1], a0, a1, a2, a3, b[2], b[3]);
        }
    }
}

// The kernel --------------------------------------------------------------------------------------------------------

// Row r: token start + r / heads of the chunk, head first_head + r % heads.
struct Assigned {
    int64_t start;
    int rows, heads, first_head;
};

DEVICE void load_queries(const CacheLayout &c, const Assigned &a, const float *q, int64_t ld, float scale,
                         const float *cosines, const float *sines, const Shared &s)
{
    const int half = head_dim_of(c) / 2;
    for (int at = threadIdx.x; at < ROWS * head_pad_of(c) / 8; at += THREADS)
        zero_16(s.q + at / (head_pad_of(c) / 8) * q_pitch(c) + at % (head_pad_of(c) / 8) * 16);
    for (int at = threadIdx.x; at < (head_pad_of(c) - head_dim_of(c)) * (TILE / 8); at += THREADS)
        zero_16(s.k + head_dim_of(c) * K_PITCH + 16 * at); // channels that no tile has
    __syncthreads();
    for (int at = threadIdx.x; at < a.rows * half; at += THREADS) {
        const int row = at / half, i = at % half;
        const int64_t t = a.start + row / a.heads;
        const float *x = q + t * ld + (int64_t)(a.first_head + row % a.heads) * head_dim_of(c);
        const float cosine = cosines[t * half + i], sine = sines[t * half + i];
        const float u = mul(x[i], scale), v = mul(x[i + half], scale);
        uint16_t *to = (uint16_t *)(s.q + row * q_pitch(c));
        to[i] = float_to_half(bounded(sub(mul(u, cosine), mul(v, sine))));
        to[i + half] = float_to_half(bounded(add(mul(v, cosine), mul(u, sine))));
    }
    __syncthreads();
}

DEVICE void store_rows(const CacheLayout &c, const Assigned &a, Rows &r, float *scratch, float *out, int64_t ld_out,
                       int warp, int lane)
{
    const int g = lane / 4, t = lane % 4, pad = head_pad_of(c), dim = head_dim_of(c);
    float *mine = scratch + WARP_ROWS * warp * pad;
    KV_UNROLL
    for (int h = 0; h < 2; h++) {
        float total = r.total[h];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        KV_UNROLL
        for (int j = 0; j < 2 * MAX_STEPS; j++)
            if (j < pad / 8) {
                mine[(g + 8 * h) * pad + 8 * j + 2 * t] = r.acc[j][2 * h] / total;
                mine[(g + 8 * h) * pad + 8 * j + 2 * t + 1] = r.acc[j][2 * h + 1] / total;
            }
    }
    __syncwarp();
    for (int row = 0; row < WARP_ROWS; row++) {
        const int number = WARP_ROWS * warp + row;
        if (number >= a.rows)
            break;
        if (is_quantised(v_format_of(c)))
            hadamard(mine + row * pad, dim, lane);
        float *to = out + (a.start + number / a.heads) * ld_out + (int64_t)(a.first_head + number % a.heads) * dim;
        for (int i = lane; i < dim; i += 32)
            to[i] = mine[row * pad + i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MAX_PAD <= 128 ? 3 : 1) attend_chunk(
    const Step *step, CacheLayout c, const float *q, int64_t ld, int group, float scale, float softcap,
    const float *cosines, const float *sines, const float *sink_cosines, const float *sink_sines,
    uint8_t *staged_windows, uint8_t *staged_tiles, int64_t max_tiles, float *out, int64_t ld_out)
{
    SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, most_heads = group < ROWS ? group : (int)ROWS;
    const int tokens = ROWS / most_heads, shares = (group + most_heads - 1) / most_heads, head = blockIdx.y / shares;
    const int in_group = blockIdx.y % shares * most_heads, left = group - in_group;
    QueryBlock b;
    if (!find_block(step, c, gridDim.x - 1 - blockIdx.x, tokens, &b)) // the last see most: first
        return;
    Shared s;
    s.q = (uint8_t *)shared;
    s.k = s.q + ROWS * q_pitch(c);
    s.v = s.k + head_pad_of(c) * K_PITCH;
    Assigned a = {b.start, 0, left < most_heads ? left : most_heads, head * group + in_group};
    a.rows = (int)(b.end - b.start) * a.heads;
    load_queries(c, a, q, ld, scale, cosines, sines, s);

    uint32_t kept[MAX_PAD <= 128 ? MAX_STEPS : 1][4];
    if (MAX_PAD <= 128) {
        KV_UNROLL
        for (int i = 0; i < MAX_STEPS; i++)
            if (i < head_pad_of(c) / 16) {
                const uint8_t *from = s.q + (WARP_ROWS * warp + lane / 4) * q_pitch(c) + 32 * i + lane % 4 * 4;
                kept[MAX_PAD <= 128 ? i : 0][0] = *(const uint32_t *)from;
                kept[MAX_PAD <= 128 ? i : 0][1] = *(const uint32_t *)(from + 8 * q_pitch(c));
                kept[MAX_PAD <= 128 ? i : 0][2] = *(const uint32_t *)(from + 16);
                kept[MAX_PAD <= 128 ? i : 0][3] = *(const uint32_t *)(from + 8 * q_pitch(c) + 16);
            }
    }
    Rows r;
    KV_UNROLL
    for (int h = 0; h < 2; h++) {
        r.position[h] = step->first + b.start + (WARP_ROWS * warp + lane / 4 + 8 * h) / a.heads;
        r.position[h] = r.position[h] < step->first + b.end ? r.position[h] : step->first + b.end - 1;
        r.top[h] = -INFINITY, r.total[h] = 0;
    }
    KV_UNROLL
    for (int j = 0; j < 2 * MAX_STEPS; j++)
        r.acc[j][0] = r.acc[j][1] = r.acc[j][2] = r.acc[j][3] = 0;

    const Staged staged = {staged_windows, staged_tiles, max_tiles, tiles_packed(c, step->first)};
    const int64_t oldest = step->first + b.start, newest = step->first + b.end - 1, last = tile_of(c, newest);
    const int64_t before = tiles_evicted(step, c.n_slots, tiles_packed(c, step->first + 1));
    const int place = c.sight ? 0 : (int)(1 + tiles_evicted(step, c.n_slots, b.packed) - before);
    const int64_t sinks = newest + 1 < c.n_sinks ? newest + 1 : c.n_sinks;
    const int64_t sink_tiles = (c.sight ? oldest + 1 - c.sight : 0) < sinks ? (sinks + TILE - 1) / TILE : 0;
    const int64_t first = first_tile(step, c, oldest, b.packed);
    float scores[TILE / 8][4];
    for (int64_t tile = first - sink_tiles; tile <= last || tile < first; tile++) { // sinks come before the first tile
        int64_t start = c.n_sinks + tile * TILE;
        int count = TILE;
        __syncthreads();
        if (tile < first) {
            start = (tile - first + sink_tiles) * TILE;
            count = (int)(sinks - start < TILE ? sinks - start : TILE);
            load_sinks(c, head, (int)start, count, sink_cosines, sink_sines, place, s);
        } else {
            const bool packed = tile < b.packed;
            const uint8_t *from = packed ? packed_tile(c, staged, head, tile) : unpacked_tile(c, staged, head, tile);
            load_keys(c, from, packed, s);
            load_values(c, from + (packed ? c.k_bytes : c.window_k_bytes), packed,
                        (int)(newest + 1 - start < TILE ? newest + 1 - start : TILE), s);
        }
        __syncthreads();
        score_tile(c, s, kept, warp, lane, scores);
        weigh_tile(c, r, scores, start, count, softcap, lane);
        add_tile(c, s, scores, r, lane);
    }
    __syncthreads();
    store_rows(c, a, r, (float *)s.k, out, ld_out, warp, lane);
}
