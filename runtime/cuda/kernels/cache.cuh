// Where things are in a cache (as _core/cache.pxd has it), what a step sees, and how tiles are packed (as tile.c does
// it).
#pragma once
#include "common.cuh"

enum { LANES = 16, GROUP = 64, CODE_BLOCK = 32 };

DEVICE int bits_of(int format) { return format == KV_FORMAT_Q8 ? 8 : format == KV_FORMAT_Q4 ? 4 : 2; }
DEVICE bool is_quantised(int format) { return format != KV_FORMAT_F32 && format != KV_FORMAT_F16; }
DEVICE int n_groups(int head_dim) { return (head_dim + GROUP - 1) / GROUP; }

// Layout ------------------------------------------------------------------------------------------------------------

DEVICE uint8_t *head_at(const CacheLayout &c, int head) { return c.base + c.start + head * c.head_bytes; }
DEVICE float *sink_keys(const CacheLayout &c, int head) { return (float *)head_at(c, head); }
DEVICE float *sink_values(const CacheLayout &c, int head) { return (float *)(head_at(c, head) + c.sink_v); }

// a % n of what is not negative; in 32 bits, which is much faster, where that is enough.
DEVICE int64_t remainder_of(int64_t a, int64_t n)
{
    return (a | n) >> 32 ? a % n : (int64_t)((uint32_t)a % (uint32_t)n);
}

// Keys of a window tile; its values follow window_k_bytes later.
DEVICE uint8_t *window_tile(const CacheLayout &c, int head, int64_t tile)
{
    return head_at(c, head) + c.windows + remainder_of(tile, c.n_window_tiles) * (c.window_k_bytes + c.window_v_bytes);
}

// Keys of a ring tile; its values follow k_bytes later. Never called for a ring without slots.
DEVICE uint8_t *ring_tile(const CacheLayout &c, int head, int64_t tile)
{
    return head_at(c, head) + c.ring + remainder_of(tile, c.n_slots) * (c.k_bytes + c.v_bytes);
}

// The tile that holds a token, -1 for a sink.
DEVICE int64_t tile_of(const CacheLayout &c, int64_t position)
{
    return position >= c.n_sinks ? (position - c.n_sinks) / TILE : -1;
}

// Tiles that have left the window once n_tokens are in the cache: the window keeps [window, window + 64).
DEVICE int64_t tiles_packed(const CacheLayout &c, int64_t n_tokens)
{
    int64_t gathered = n_tokens - c.n_sinks - c.window;
    return gathered >= TILE ? gathered / TILE : 0;
}

// Tiles that a ring of n_slots no longer has.
DEVICE int64_t tiles_evicted(const Step *step, int64_t n_slots, int64_t n_packed)
{
    int64_t packed = n_packed > step->packed_ever ? n_packed : step->packed_ever;
    return packed > n_slots ? packed - n_slots : 0;
}

// The oldest tile that a query at this position sees.
DEVICE int64_t first_tile(const Step *step, const CacheLayout &c, int64_t position, int64_t n_packed)
{
    if (!c.sight)
        return tiles_evicted(step, c.n_slots, n_packed);
    int64_t tile = tile_of(c, position + 1 - c.sight);
    return tile > 0 ? tile : 0;
}

// Tiles while a chunk is under way: those beyond the window, and those that it packs, are staged until every query of
// the chunk is done. Nothing is staged where max_tiles is 0.
struct Staged {
    uint8_t *windows, *tiles; // [n_kv_heads][max_tiles]
    int64_t max_tiles, packed_before;
};

DEVICE uint8_t *unpacked_tile(const CacheLayout &c, const Staged &s, int head, int64_t tile)
{
    int64_t beyond = tile - s.packed_before - c.n_window_tiles;
    if (beyond < 0 || !s.max_tiles)
        return window_tile(c, head, tile);
    return s.windows + (head * s.max_tiles + beyond) * (c.window_k_bytes + c.window_v_bytes);
}

DEVICE uint8_t *packed_tile(const CacheLayout &c, const Staged &s, int head, int64_t tile)
{
    int64_t fresh = tile - s.packed_before;
    if (fresh < 0 || !s.max_tiles)
        return ring_tile(c, head, tile);
    return s.tiles + (head * s.max_tiles + fresh) * (c.k_bytes + c.v_bytes);
}

// Angles ------------------------------------------------------------------------------------------------------------

DEVICE void angle(const Ropes &ropes, int64_t rope, int64_t half, int64_t i, int64_t position, float *cosine,
                  float *sine)
{
    double turn = position * ropes.inv_freq[rope * half + i];
    double amplitude = ropes.amplitude ? ropes.amplitude[rope * half + i] : 1;
    *cosine = (float)(amplitude * cos(turn));
    *sine = (float)(amplitude * sin(turn));
}

// Cosines and sines of the new tokens, [ropes.n][n][half], and of the sinks, [ropes.n][sink_rows][n_sinks][half]: row
// 0 where they were, row 1 + s moved up by 64 * (tiles evicted before + s). Thread `item` of `items`. any: the layout
// of any layer; cache_n_slots: slots of a ring without sight.
DEVICE void angles(const Step *step, const Ropes &ropes, const CacheLayout &any, int64_t cache_n_slots, int sink_rows,
                   float *cosines, float *sines, float *sink_cosines, float *sink_sines, int64_t item, int64_t items)
{
    int64_t half = any.head_dim / 2, n = step->n, tokens = ropes.n * n * half;
    int64_t sinks = ropes.n * sink_rows * any.n_sinks * half;
    int64_t evicted = tiles_evicted(step, cache_n_slots, tiles_packed(any, step->first + 1));
    for (int64_t at = item; at < tokens + sinks; at += items) {
        if (at < tokens) {
            int64_t t = at / half % n;
            angle(ropes, at / half / n, half, at % half, step->first + t, cosines + at, sines + at);
        } else {
            int64_t s = at - tokens, place = s / half, row = place / any.n_sinks % sink_rows;
            int64_t shift = row ? TILE * (evicted + row - 1) : 0;
            angle(ropes, place / any.n_sinks / sink_rows, half, s % half, place % any.n_sinks + shift, sink_cosines + s,
                  sink_sines + s);
        }
    }
}

// Arithmetic of the scalar kernels, operation by operation: nothing is contracted -----------------------------------

#ifdef KVRUN_HOST
DEVICE float mul(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
#else
DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
#endif
DEVICE float sub(float a, float b) { return add(a, -b); }
DEVICE float higher(float a, float b) { return a > b ? a : b; }
DEVICE float lower(float a, float b) { return a < b ? a : b; }
DEVICE float bounded(float x) { return lower(65504.f, higher(-65504.f, x)); } // within float16

// Orthonormal Hadamard transform of x [n] in shared memory by one warp, in blocks of the largest powers of two.
DEVICE void hadamard(float *x, int n, int lane)
{
    while (n > 0) {
        int size = 1;
        while (2 * size <= n)
            size *= 2;
        for (int step = 1; step < size; step *= 2) {
            float norm = step == 2 && size >= 4 ? 1 / sqrtf((float)size) : 1;
            __syncwarp();
            for (int p = lane; p < size / 2; p += 32) {
                int i = p / step * 2 * step + p % step;
                float a = x[i], b = x[i + step];
                if (size == 2)
                    a = mul(a, 0.70710678f), b = mul(b, 0.70710678f);
                x[i] = mul(add(a, b), norm);
                x[i + step] = mul(sub(a, b), norm);
            }
        }
        x += size;
        n -= size;
    }
    __syncwarp();
}

// Packing -----------------------------------------------------------------------------------------------------------

// A row of numbers (a channel of K over 64 tokens, a token of V over up to 64 channels) is packed by ROW_LANES lanes
// of a warp that lie side by side, each with ROW_EACH numbers: lane l has numbers 8 l to 8 l + 7 of n.
enum { ROW_LANES = 8, ROW_EACH = 8 };

DEVICE float row_max(float x)
{
    for (int lane = 1; lane < ROW_LANES; lane *= 2)
        x = higher(__shfl_xor_sync(0xffffffffu, x, lane), x);
    return x;
}

DEVICE int row_sum(int x)
{
    for (int lane = 1; lane < ROW_LANES; lane *= 2)
        x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// A range whose codes stand for origin + code * step; what it explains of the variance.
struct Range {
    float step, origin, gain;
};

// Codes from `code` on are given above this.
DEVICE int threshold(const Range &r, float code)
{
    float t = sub(add(mul(r.step, code - 0.5f), r.origin), 0.5f);
    return (int)rintf(lower(higher(t, -128.f), 127.f));
}

// The range that fits the codes of r best, by linear regression of y on the codes. y: this lane's `mine` numbers.
DEVICE Range regression(const int *y, int mine, int n, int sum, Range r)
{
    int t1 = threshold(r, 1), t2 = threshold(r, 2), t3 = threshold(r, 3), q1 = 0, q2 = 0, qy = 0;
    KV_UNROLL
    for (int i = 0; i < ROW_EACH; i++) {
        int q = i < mine ? (y[i] > t1) + (y[i] > t2) + (y[i] > t3) : 0;
        q1 += q;
        q2 += q * q;
        qy += q * y[i];
    }
    float size = (float)n, q = (float)row_sum(q1), total = (float)sum;
    float d = sub(mul(size, (float)row_sum(q2)), mul(q, q));
    float covariance = sub(mul(size, (float)row_sum(qy)), mul(q, total));
    r.step = covariance / higher(d, 1.f);
    r.origin = sub(total, mul(r.step, q)) / size;
    r.gain = mul(r.step, covariance);
    return r;
}

DEVICE Range better(const Range &a, const Range &b)
{
    Range r = b.gain > a.gain ? b : a;
    r.gain = higher(a.gain, b.gain);
    return r;
}

// The range of least squared error for two bits, searched as tile.c does: regression from clipped ranges, twice
// improved.
DEVICE void search_range(const float *x, int mine, int n, float least, float most, float *scale, float *minimum)
{
    float low = bounded(least), high = bounded(most), unit = sub(high, low) / 255.f;
    float inverse = unit > 0 ? 1.f / unit : 0.f;
    int y[ROW_EACH], sum = 0;
    KV_UNROLL
    for (int i = 0; i < ROW_EACH; i++) {
        float scaled = sub(mul(sub(x[i], low), inverse), 128.f);
        y[i] = (int)rintf(lower(higher(scaled, -128.f), 127.f));
        sum += i < mine ? y[i] : 0;
    }
    sum = row_sum(sum);
    const float clips[10][2] = {{0, 1}, {.16f, .84f}, {.08f, .76f}, {.24f, .92f}, {.08f, .84f}, {.16f, .92f},
                                {.16f, 1}, {0, .84f}, {.24f, .84f}, {.16f, .76f}};
    Range best = {0, 0, -1}, r = best;
    KV_UNROLL
    for (int i = 0; i < 10; i++) {
        r.step = (clips[i][1] - clips[i][0]) * 255 / 3;
        r.origin = sub(mul(clips[i][0], 255.f), 128.f);
        best = better(best, regression(y, mine, n, sum, r));
    }
    for (int again = 0; again < 2; again++)
        best = better(best, regression(y, mine, n, sum, best));
    *scale = mul(best.step, unit);
    *minimum = add(mul(add(best.origin, 128.f), unit), low);
}

// Codes of this lane's numbers, 0 from the n-th on, and the range of the row as it is stored. Every lane of a warp
// calls it.
DEVICE void pack_row(int bits, const float *x, int lane, int n, uint8_t *codes, uint16_t *scale_bits,
                     uint16_t *minimum_bits)
{
    float most = (float)((1 << bits) - 1), low = x[0], high = x[0];
    int mine = n - lane * ROW_EACH;
    mine = mine < 0 ? 0 : mine > ROW_EACH ? ROW_EACH : mine;
    KV_UNROLL
    for (int i = 1; i < ROW_EACH; i++) {
        low = lower(x[i], low);
        high = higher(x[i], high);
    }
    high = row_max(high);
    low = -row_max(-low);
    float minimum = low, scale = sub(high, low) / most;
    if (bits == 2)
        search_range(x, mine, n, low, high, &scale, &minimum);
    *scale_bits = float_to_half(bounded(scale));
    *minimum_bits = float_to_half(bounded(minimum));
    scale = half_to_float(*scale_bits);
    minimum = half_to_float(*minimum_bits);
    float inverse = scale > 0 ? 1.f / scale : 0.f;
    KV_UNROLL
    for (int i = 0; i < ROW_EACH; i++) {
        float q = lower(higher(mul(sub(x[i], minimum), inverse), 0.f), most);
        codes[i] = i < mine ? (uint8_t)rintf(q) : (uint8_t)0;
    }
}

// Lines of 64 bytes of the block of inputs that begins with `first`, of a panel `depth` deep.
DEVICE int block_lines(int bits, int depth, int first) { return depth - first >= CODE_BLOCK ? bits : bits / 2; }

// The 4 bytes of a lane in a line of codes: codes of inputs 4 (f * lines + l) to + 3 of the block, for each field f.
// codes: of this lane, `stride` from input to input.
DEVICE uint32_t code_word(int bits, const uint8_t *codes, int stride, int lines, int line)
{
    uint32_t word = 0;
    for (int f = 0; f < 8 / bits; f++)
        for (int i = 0; i < 4; i++)
            word |= (uint32_t)codes[(4 * (f * lines + line) + i) * stride] << (8 * i + f * bits);
    return word;
}
