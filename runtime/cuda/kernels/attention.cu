// Attention of one token: its tiles split among blocks and warps, all heads of a KV head at once, the parts put together by
// the block that ends last.
//
// attend(step, layout, q, group, scale, softcap, cos, sin, sink_cos, sink_sin, partial, counters, out)
//   grid (spans, n_kv_heads, ceil(group / 8)), block 128, dynamic shared memory: `shared_bytes`
//
// A warp takes a tile (or 16 or 32 tokens of one in float16) at a time. Scores are K times the queries, outputs V
// transposed times the weights: m16n8k16 products with tokens or channels down and up to 8 heads across, so that a thread
// keeps the same two heads throughout. Codes meet the tensor cores as they lie in memory, as float16 below the normal ones: a
// code c is c 2^-24. Scales are folded into the queries or weights, minima are a product of their own. Where K or V is float16
// queries or weights are two float16, 22 bits in all.
#include "common.cuh"
#include "cache.cuh"
#include "attention.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS, ROWS = 8, SINK_ITEM = 8 };

// Sizes --------------------------------------------------------------------------------------------------------------

DEVICE bool both_coded(const CacheLayout &c) { return is_quantised(k_format_of(c)) && is_quantised(v_format_of(c)); }
DEVICE int ring_tokens(const CacheLayout &c) { return both_coded(c) ? TILE : 32; }   // of an item
DEVICE int window_tokens(const CacheLayout &c) { return both_coded(c) ? 16 : 32; }
DEVICE int k_pitch(const CacheLayout &c) { return 2 * window_tokens(c) + 16; }       // of float16 in shared memory
DEVICE int v_pitch(const CacheLayout &c) { return 2 * head_pad_of(c) + 16; }

DEVICE int coded_bytes(int format, int pad, int params) { return TILE * pad * bits_of(format) / 8 + params; }

// Shared memory of a warp for keys, and for values.
DEVICE int k_room(const CacheLayout &c)
{
    int format = k_format_of(c), sinks = 4 * SINK_ITEM * head_dim_of(c);
    int half = format == FORMAT_F32 ? 0 : head_dim_of(c) * k_pitch(c);
    int coded = is_quantised(format) ? coded_bytes(format, head_pad_of(c), 4 * head_pad_of(c)) : 0;
    half = half > coded ? half : coded;
    return half > sinks ? half : sinks;
}

DEVICE int v_room(const CacheLayout &c)
{
    int format = v_format_of(c), weights = 32 * ROWS * 4;
    int half = format == FORMAT_F32 ? 0 : window_tokens(c) * v_pitch(c);
    int coded = is_quantised(format) ? coded_bytes(format, head_pad_of(c), 4 * TILE * n_groups(head_dim_of(c))) : 0;
    half = half > coded ? half : coded;
    return half > weights ? half : weights;
}

DEVICE int warp_room(const CacheLayout &c)
{
    int items = k_room(c) + v_room(c), merged = 4 * ROWS * head_pad_of(c);
    return items > merged ? items : merged;
}

DEVICE int fragment_bytes(const CacheLayout &c) { return head_pad_of(c) / 16 * 32 * 8; }

// Queries ------------------------------------------------------------------------------------------------------------

// In shared memory: q [head_dim][8] float32; fragments of it for products: high and low halves of q / 2^e, and as codes
// want it; down[row]: 2^e of a row, which brings its largest to [1, 2).
struct Queries {
    float *q, *down;
    uint2 *high, *low, *coded;
    float factor; // of `coded`, in steps of 16 channels that are odd; in even ones 16 times it, at 8 bits the same
};

// So that queries times scales stay within float16: scales are at most 131008 / (2^bits - 1).
DEVICE float coded_factor(int format) { return format == FORMAT_Q8 ? 32.f : format == FORMAT_Q4 ? 1 / 8.f : 1 / 32.f; }

DEVICE void prepare_queries(const CacheLayout &c, const Queries &s, const float *q, int rows, float scale,
                            const float *cosines, const float *sines)
{
    const int dim = head_dim_of(c), half = dim / 2, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int at = threadIdx.x; at < ROWS * half; at += THREADS) {
        int row = at / half, i = at % half;
        float a = 0, b = 0;
        if (row < rows)
            a = mul(q[row * dim + i], scale), b = mul(q[row * dim + i + half], scale);
        s.q[i * ROWS + row] = sub(mul(a, cosines[i]), mul(b, sines[i]));
        s.q[(i + half) * ROWS + row] = add(mul(b, cosines[i]), mul(a, sines[i]));
    }
    __syncthreads();
    if (k_format_of(c) == FORMAT_F32)
        return;
    for (int row = warp; row < ROWS; row += WARPS) {
        float most = 0;
        for (int i = lane; i < dim; i += 32)
            most = higher(fabsf(s.q[i * ROWS + row]), most);
        for (int other = 16; other; other /= 2)
            most = higher(__shfl_xor_sync(0xffffffffu, most, other), most);
        uint32_t power = __float_as_uint(most) & 0x7f800000;
        power = power < 0x00800000 ? 0x00800000 : power > 0x7e800000 ? 0x7e800000 : power;
        if (lane == 0)
            s.down[row] = __uint_as_float(power);
    }
    __syncthreads();
    const bool coded = is_quantised(k_format_of(c));
    for (int at = threadIdx.x; at < head_pad_of(c) / 16 * 32; at += THREADS) {
        int step = at / 32, row = lane / 4, channel = 16 * step + lane % 4 * 4;
        float up = __uint_as_float(0x7f000000 - __float_as_uint(s.down[row])), x[4], rest[4];
        for (int i = 0; i < 4; i++) {
            x[i] = channel + i < dim ? s.q[(channel + i) * ROWS + row] * up : 0;
            rest[i] = x[i] - half_to_float(float_to_half(x[i]));
        }
        s.high[at].x = half2_pack(x[0], x[2]), s.high[at].y = half2_pack(x[1], x[3]);
        s.low[at].x = half2_pack(rest[0], rest[2]), s.low[at].y = half2_pack(rest[1], rest[3]);
        if (coded) {
            float by = s.factor * (k_format_of(c) != FORMAT_Q8 && step % 2 == 0 ? 16 : 1);
            s.coded[at].x = half2_pack(x[0] * by, x[2] * by), s.coded[at].y = half2_pack(x[1] * by, x[3] * by);
        }
    }
    __syncthreads();
}

// Items --------------------------------------------------------------------------------------------------------------

// What a warp does at a time: up to 64 tokens of one tile.
struct Item {
    const uint8_t *k, *v; // of the tile
    int first, tokens;    // of these tokens of the tile
    Seen seen;            // counted from the first
    bool packed;
};

struct Items {
    int64_t position, window_start, ring_start; // position of the first token of the first item in each
    int n_sinks, first_sink, n_windows, n_ring;
};

DEVICE Items find_items(const Step *step, const CacheLayout &c)
{
    Items s = {step->first, 0, 0, 0, 0, 0, 0};
    int64_t packed = tiles_packed(c, s.position + 1), first = first_tile(step, c, s.position, packed);
    int64_t from = c.sight && s.position + 1 > c.sight ? s.position + 1 - c.sight : 0, last = tile_of(c, s.position);
    int64_t sinks = s.position + 1 < c.n_sinks ? s.position + 1 : c.n_sinks;
    if (from < sinks) {
        s.first_sink = (int)(from / SINK_ITEM);
        s.n_sinks = (int)((sinks + SINK_ITEM - 1) / SINK_ITEM) - s.first_sink;
    }
    int64_t tile = first > packed ? first : packed;
    if (last >= tile) {
        const int tokens = window_tokens(c);
        int64_t start = c.n_sinks + tile * TILE, skip = from > start ? (from - start) / tokens : 0;
        s.window_start = start + skip * tokens;
        s.n_windows = (int)((s.position - s.window_start) / tokens) + 1;
    }
    if (first < packed) {
        const int tokens = ring_tokens(c);
        int64_t start = c.n_sinks + first * TILE, skip = from > start ? (from - start) / tokens : 0;
        s.ring_start = start + skip * tokens;
        s.n_ring = (int)((packed - first) * (TILE / tokens) - skip);
    }
    return s;
}

DEVICE Item item_at(const CacheLayout &c, const Items &s, int head, int number)
{
    Item item;
    int i = number - s.n_sinks;
    item.packed = i >= s.n_windows;
    item.tokens = item.packed ? ring_tokens(c) : window_tokens(c);
    int64_t start = item.packed ? s.ring_start + (int64_t)(i - s.n_windows) * item.tokens : s.window_start + i * item.tokens;
    int64_t tile = (start - c.n_sinks) / TILE;
    item.first = (int)((start - c.n_sinks) % TILE);
    item.k = item.packed ? ring_tile(c, head, tile) : window_tile(c, head, tile);
    item.v = item.k + (item.packed ? c.k_bytes : c.window_k_bytes);
    item.seen = seen_by(c, s.position, start, item.tokens);
    return item;
}

DEVICE int k_format(const CacheLayout &c, const Item &item)
{
    return k_format_of(c) == FORMAT_F32 ? FORMAT_F32 : item.packed ? k_format_of(c) : FORMAT_F16;
}

DEVICE int v_format(const CacheLayout &c, const Item &item)
{
    return v_format_of(c) == FORMAT_F32 ? FORMAT_F32 : item.packed ? v_format_of(c) : FORMAT_F16;
}

// Where a piece of codes lies in shared memory, so that no two lanes meet in a bank: halves of lines 2, 3, 6, 7 ... change
// places. Two bits need nothing of the kind.
DEVICE int place_of(int bits, int at) { return bits > 2 ? at ^ (at >> 2 & 32) : at; }

DEVICE void fetch_codes(int bits, uint8_t *to, const uint8_t *from, int codes, int params, int lane)
{
    KV_UNROLL
    for (int at = 16 * lane; at < codes; at += 512)
        copy_16(to + place_of(bits, at), from + at, true);
    for (int at = codes + 16 * lane; at < codes + params; at += 512)
        copy_16(to + at, from + at, true);
}

// Has the keys of an item, or its values, copied to this warp's shared memory. float32 is read from where it is.
DEVICE void fetch_keys(const CacheLayout &c, const Item &item, uint8_t *to, int lane)
{
    const int format = k_format(c, item), pieces = item.tokens / 8;
    if (format == FORMAT_F16) {
        for (int at = lane; at < head_dim_of(c) * pieces; at += 32) {
            int channel = at / pieces, piece = at % pieces;
            copy_16(to + channel * k_pitch(c) + 16 * piece, item.k + 2 * (channel * TILE + item.first + 8 * piece), true);
        }
    } else if (format != FORMAT_F32) {
        const int pad = head_pad_of(c), bits = bits_of(k_format_of(c));
        fetch_codes(bits, to, item.k, TILE * pad * bits / 8, 4 * pad, lane);
    }
}

DEVICE void fetch_values(const CacheLayout &c, const Item &item, uint8_t *to, int lane)
{
    const int format = v_format(c, item), pad = head_pad_of(c), pieces = pad / 8;
    if (format == FORMAT_F16) {
        for (int at = lane; at < item.tokens * pieces; at += 32) {
            int token = at / pieces, piece = at % pieces;
            copy_16(to + token * v_pitch(c) + 16 * piece, item.v + 2 * ((item.first + token) * pad + 8 * piece),
                    token < item.seen.to);
        }
    } else if (format != FORMAT_F32) {
        const int bits = bits_of(v_format_of(c));
        fetch_codes(bits, to, item.v, TILE * pad * bits / 8, 4 * TILE * n_groups(head_dim_of(c)), lane);
    }
}

// Scores -------------------------------------------------------------------------------------------------------------

// Of 16 tokens and 8 rows: this thread has tokens 2g and 2g + 1 (g = lane / 4), each with rows 2t and 2t + 1 (t = lane % 4).
typedef float Square[4];

// Two neighbouring words of codes at base + at, base a multiple of 128 where the bits are more than 2.
DEVICE uint2 code_pair(int bits, const uint8_t *tile, int base, int at)
{
    return *(const uint2 *)(tile + base + (bits > 2 ? at ^ ((at ^ base) >> 2 & 32) : at));
}

// The product of 16 rows of codes, of whose words this thread has two, with w: field `field` of 4 (or 2) bits.
DEVICE void multiply_codes(int bits, float *d, uint2 words, int field, const uint32_t *w)
{
    const uint32_t mask = bits == 8 ? 0x00ff00ffu : (bits == 4 ? 0x000f000fu : 0x00030003u) << 4 * field;
    multiply(d, words.x & mask, words.y & mask, words.x >> 8 & mask, words.y >> 8 & mask, w[0], w[1]);
}

DEVICE void score_codes(int bits, const CacheLayout &c, const uint8_t *tile, int first, int count, const Queries &q,
                        Square *s, int lane)
{
    const int g = lane / 4, t = lane % 4, pad = head_pad_of(c), panel = LANES * pad * bits / 8;
    const uint8_t *params = tile + TILE * pad * bits / 8 + 8 * t;
    Square even = {0, 0, 0, 0}, odd = {0, 0, 0, 0};
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0;
    KV_UNROLL
    for (int b = 0; b < MAX_PAD; b += CODE_BLOCK) {
        if (b >= pad)
            break;
        const bool whole = pad - b >= CODE_BLOCK;
        uint32_t w[2][2];
        KV_UNROLL
        for (int j = 0; j < 2; j++)
            if (j == 0 || whole) {
                uint2 x = q.coded[(b / 16 + j) * 32 + lane];
                uint2 scale = even_odd(*(const uint2 *)(params + 2 * (b + 16 * j)));
                uint2 minimum = even_odd(*(const uint2 *)(params + 2 * (pad + b + 16 * j)));
                w[j][0] = half2_mul(x.x, scale.x);
                w[j][1] = half2_mul(x.y, scale.y);
                multiply(j ? odd : even, minimum.x, minimum.x, minimum.y, minimum.y, x.x, x.y);
            }
        KV_UNROLL
        for (int m = 0; m < 4; m++)
            if (m < count) {
                const int base = (first / 16 + m) * panel + 2 * b * bits;
                if (bits == 8) {
                    multiply_codes(8, s[m], code_pair(8, tile, base, 64 * t + 8 * g), 0, w[0]);
                    if (whole)
                        multiply_codes(8, s[m], code_pair(8, tile, base + 256, 64 * t + 8 * g), 0, w[1]);
                    continue;
                }
                // Lines of a block of 32: at 4 bits one for each t, at 2 bits two; a block of 16 has half as many.
                const int lines = whole ? bits : bits / 2, line = t & (lines - 1), shift = bits * (t / lines);
                uint2 words = code_pair(bits, tile, base, 64 * line + 8 * g);
                words.x >>= shift, words.y >>= shift;
                multiply_codes(bits, s[m], words, 0, w[0]);
                if (whole)
                    multiply_codes(bits, s[m], words, 1, w[1]);
            }
    }
    const float less = bits == 8 ? 1 : 1 / 16.f;
    KV_UNROLL
    for (int i = 0; i < 2; i++) {
        float down = q.down[2 * t + i] / q.factor, constant = (even[i] * less + odd[i]) * down, up = down * less * 16777216;
        KV_UNROLL
        for (int m = 0; m < 4; m++) {
            s[m][i] = s[m][i] * up + constant;
            s[m][2 + i] = s[m][2 + i] * up + constant;
        }
    }
}

// Halves of rows 4t .. 4t + 3 (of a step of 16) at columns 2g and 2g + 1, as a product with these columns down wants them.
DEVICE void columns(const uint8_t *from, int pitch, uint32_t *a)
{
    uint2 x = {*(const uint32_t *)from, *(const uint32_t *)(from + 2 * pitch)};
    uint2 y = {*(const uint32_t *)(from + pitch), *(const uint32_t *)(from + 3 * pitch)};
    x = even_odd(x), y = even_odd(y);
    a[0] = x.x, a[1] = x.y, a[2] = y.x, a[3] = y.y;
}

DEVICE void score_halves(const CacheLayout &c, const uint8_t *keys, int count, const Queries &q, Square *s, int lane)
{
    const int g = lane / 4, t = lane % 4, dim = head_dim_of(c);
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0;
    KV_UNROLL
    for (int step = 0; step < MAX_STEPS; step++) {
        if (step >= head_pad_of(c) / 16)
            break;
        const uint2 high = q.high[step * 32 + lane], low = q.low[step * 32 + lane];
        const int channel = 16 * step + 4 * t;
        KV_UNROLL
        for (int m = 0; m < 2; m++)
            if (m < count) {
                uint32_t a[4] = {0, 0, 0, 0};
                if (channel + 3 < dim) {
                    columns(keys + channel * k_pitch(c) + 32 * m + 4 * g, k_pitch(c), a);
                } else if (channel < dim) { // of an even number two are left
                    const uint8_t *at = keys + channel * k_pitch(c) + 32 * m + 4 * g;
                    uint32_t x = *(const uint32_t *)at, y = *(const uint32_t *)(at + k_pitch(c));
                    a[0] = x & 0xffff, a[1] = x >> 16, a[2] = y & 0xffff, a[3] = y >> 16;
                }
                multiply(s[m], a[0], a[1], a[2], a[3], high.x, high.y);
                multiply(s[m], a[0], a[1], a[2], a[3], low.x, low.y);
            }
    }
    KV_UNROLL
    for (int m = 0; m < 2; m++)
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            s[m][i] *= q.down[2 * t + i % 2];
}

// keys: [head_dim][stride], from the first token on.
DEVICE void score_floats(const CacheLayout &c, const float *keys, int stride, int count, const Queries &q, Square *s,
                         int lane)
{
    const int g = lane / 4, t = lane % 4, dim = head_dim_of(c);
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0;
#ifndef KVRUN_HOST
#pragma unroll 8
#endif
    for (int i = 0; i < dim; i++) {
        const float2 x = *(const float2 *)(q.q + i * ROWS + 2 * t);
        KV_UNROLL
        for (int m = 0; m < 2; m++)
            if (m < count) {
                const float2 k = *(const float2 *)(keys + (int64_t)i * stride + 16 * m + 2 * g);
                s[m][0] += x.x * k.x, s[m][1] += x.y * k.x, s[m][2] += x.x * k.y, s[m][3] += x.y * k.y;
            }
    }
}

// Softmax ------------------------------------------------------------------------------------------------------------

// The running state of a thread's two rows: weights are 2^(score - top + 8), which float16 holds down to 2^-33 of the
// largest. The output is acc (times 2^24 while codes are added up) plus the constants, over total.
struct Running {
    float top[2], total[2];
    Square acc[MAX_STEPS];        // 16 channels: 2g and 2g + 1, each with rows 2t and 2t + 1
    float constant[MAX_GROUPS][2];
    bool coded;
};

DEVICE void scale_acc(Running &r, int steps, float by0, float by1)
{
    KV_UNROLL
    for (int i = 0; i < MAX_STEPS; i++)
        if (i < steps)
            r.acc[i][0] *= by0, r.acc[i][1] *= by1, r.acc[i][2] *= by0, r.acc[i][3] *= by1;
}

DEVICE void count_in_codes(Running &r, int steps, bool coded)
{
    float by = coded ? 1 / 16777216.f : 16777216.f;
    if (r.coded != coded)
        scale_acc(r, steps, by, by);
    r.coded = coded;
}

// From scores to weights in place; those of tokens that are not seen are 0. room: 2 to this is kept free of the largest
// float16 weight, for large scales.
DEVICE void weigh(Running &r, int steps, Square *s, int count, Seen seen, float softcap, float room, int lane)
{
    const int g = lane / 4;
    float most[2] = {-INFINITY, -INFINITY}, shrink[2];
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        KV_UNROLL
        for (int i = 0; i < 4; i++) {
            const int token = 16 * m + 2 * g + i / 2;
            const bool visible = m < count && token >= seen.from && token < seen.to;
            s[m][i] = visible ? capped(s[m][i], softcap) : -INFINITY;
            most[i % 2] = higher(s[m][i], most[i % 2]);
        }
    KV_UNROLL
    for (int i = 0; i < 2; i++) {
        KV_UNROLL
        for (int other = 4; other < 32; other *= 2)
            most[i] = higher(__shfl_xor_sync(0xffffffffu, most[i], other), most[i]);
        const float top = higher(most[i] + room, r.top[i]);
        shrink[i] = top > r.top[i] ? exp2f(r.top[i] - top) : 1.f;
        r.top[i] = top;
        r.total[i] *= shrink[i];
    }
    if (__any_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1)) {
        scale_acc(r, steps, shrink[0], shrink[1]);
        KV_UNROLL
        for (int i = 0; i < MAX_GROUPS; i++)
            r.constant[i][0] *= shrink[0], r.constant[i][1] *= shrink[1];
    }
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        KV_UNROLL
        for (int i = 0; i < 4; i++) {
            s[m][i] = exp2f(s[m][i] - (r.top[i % 2] - 8));
            r.total[i % 2] += s[m][i];
        }
}

// Values -------------------------------------------------------------------------------------------------------------

// Weights of 16 tokens as the right side of a product over them: of row g tokens 4t, 4t + 2 and 4t + 1, 4t + 3.
DEVICE void turn(const float *s, uint32_t *w)
{
    w[0] = transpose(half2_pack(s[0], s[1]));
    w[1] = transpose(half2_pack(s[2], s[3]));
}

DEVICE float rest(float x) { return x - half_to_float(float_to_half(x)); }

// By how many powers of two the weights have to be smaller than usual for scales like these.
DEVICE float room_for(const CacheLayout &c, const uint8_t *params, int first, int count, int lane)
{
    const int t = lane % 4, groups = n_groups(head_dim_of(c));
    uint32_t most = 0; // scales are not negative: they compare like integers
    KV_UNROLL
    for (int group = 0; group < MAX_GROUPS; group++)
        KV_UNROLL
        for (int m = 0; m < 4; m++)
            if (group < groups && m < count) {
                uint2 scale = *(const uint2 *)(params + 256 * group + 2 * (first + 16 * m + 4 * t));
                most = max_halves(most, max_halves(scale.x, scale.y));
            }
    most = (most >> 16) > (most & 0xffff) ? most >> 16 : most & 0xffff;
    if (!__any_sync(0xffffffffu, most > 0x5800)) // 128
        return 0;
    for (int other = 1; other < 4; other *= 2) {
        uint32_t theirs = __shfl_xor_sync(0xffffffffu, most, other);
        most = theirs > most ? theirs : most;
    }
    return (float)((int)(most >> 10) - 21); // of an exponent of 2^7: 1, since the mantissa may be anything
}

DEVICE void add_codes(int bits, const CacheLayout &c, const uint8_t *tile, int first, int count, const Square *s, Running &r,
                      int lane)
{
    const int g = lane / 4, t = lane % 4, pad = head_pad_of(c), panel = LANES * TILE * bits / 8;
    const uint8_t *params = tile + TILE * pad * bits / 8 + 8 * t + 2 * first;
    uint32_t p[4][2], w[4][2];
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        if (m < count)
            turn(s[m], p[m]);
    KV_UNROLL
    for (int group = 0; group < MAX_GROUPS; group++) {
        if (GROUP * group >= pad)
            break;
        Square constant = {0, 0, 0, 0};
        KV_UNROLL
        for (int m = 0; m < 4; m++)
            if (m < count) {
                uint2 scale = even_odd(*(const uint2 *)(params + 256 * group + 32 * m));
                uint2 minimum = even_odd(*(const uint2 *)(params + 256 * group + 32 * m + 2 * TILE));
                w[m][0] = half2_mul(p[m][0], scale.x);
                w[m][1] = half2_mul(p[m][1], scale.y);
                if (bits < 8 && m % 2) // their codes count 16 times
                    w[m][0] = half2_mul(w[m][0], 0x2c002c00u), w[m][1] = half2_mul(w[m][1], 0x2c002c00u);
                multiply(constant, minimum.x, minimum.x, minimum.y, minimum.y, p[m][0], p[m][1]);
            }
        r.constant[group][0] += constant[0];
        r.constant[group][1] += constant[1];
        KV_UNROLL
        for (int i = 4 * group; i < 4 * group + 4 && i < MAX_STEPS; i++) {
            if (i >= pad / 16)
                break;
            KV_UNROLL
            for (int m = 0; m < 4; m += 2)
                if (m < count) {
                    const int base = i * panel + (first / 32 + m / 2) * (CODE_BLOCK * 2 * bits);
                    if (bits == 8) {
                        multiply_codes(8, r.acc[i], code_pair(8, tile, base, 64 * t + 8 * g), 0, w[m]);
                        multiply_codes(8, r.acc[i], code_pair(8, tile, base + 256, 64 * t + 8 * g), 0, w[m + 1]);
                        continue;
                    }
                    const int line = t & (bits - 1), shift = bits * (t / bits);
                    uint2 words = code_pair(bits, tile, base, 64 * line + 8 * g);
                    words.x >>= shift, words.y >>= shift;
                    multiply_codes(bits, r.acc[i], words, 0, w[m]);
                    multiply_codes(bits, r.acc[i], words, 1, w[m + 1]);
                }
        }
    }
}

DEVICE void add_halves(const CacheLayout &c, const uint8_t *values, int count, const Square *s, Running &r, int lane)
{
    const int g = lane / 4, t = lane % 4;
    KV_UNROLL
    for (int m = 0; m < 2; m++)
        if (m < count) {
            uint32_t high[2], low[2], a[4];
            Square left = {rest(s[m][0]), rest(s[m][1]), rest(s[m][2]), rest(s[m][3])};
            turn(s[m], high);
            turn(left, low);
            KV_UNROLL
            for (int i = 0; i < MAX_STEPS; i++) {
                if (i >= head_pad_of(c) / 16)
                    break;
                columns(values + (16 * m + 4 * t) * v_pitch(c) + 32 * i + 4 * g, v_pitch(c), a);
                multiply(r.acc[i], a[0], a[1], a[2], a[3], high[0], high[1]);
                multiply(r.acc[i], a[0], a[1], a[2], a[3], low[0], low[1]);
            }
        }
}

// values: [tokens][head_pad]; weights: room for [32][8] in shared memory.
DEVICE void add_floats(const CacheLayout &c, const float *values, int tokens, const Square *s, float *weights, Running &r,
                       int lane)
{
    const int g = lane / 4, t = lane % 4, pad = head_pad_of(c);
    __syncwarp();
    KV_UNROLL
    for (int m = 0; m < 2; m++)
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            if (16 * m + 2 * g + i / 2 < tokens)
                weights[(16 * m + 2 * g + i / 2) * ROWS + 2 * t + i % 2] = s[m][i];
    __syncwarp();
    for (int token = 0; token < tokens; token++) {
        const float2 p = *(const float2 *)(weights + token * ROWS + 2 * t);
        KV_UNROLL
        for (int i = 0; i < MAX_STEPS; i++) {
            if (i >= pad / 16)
                break;
            const float2 v = *(const float2 *)(values + (int64_t)token * pad + 16 * i + 2 * g);
            r.acc[i][0] += p.x * v.x, r.acc[i][1] += p.y * v.x, r.acc[i][2] += p.x * v.y, r.acc[i][3] += p.y * v.y;
        }
    }
    __syncwarp();
}

// A warp's work ------------------------------------------------------------------------------------------------------

struct Warp {
    const CacheLayout &c;
    const Queries &q;
    uint8_t *keys, *values; // shared memory
    float softcap;
    int head, lane;
};

DEVICE void attend_sinks(const Warp &w, const Items &items, int number, const float *cosines, const float *sines,
                         int place, Running &r)
{
    const CacheLayout &c = w.c;
    int start = (items.first_sink + number) * SINK_ITEM, half = head_dim_of(c) / 2, tokens = c.n_sinks - start;
    tokens = tokens < SINK_ITEM ? tokens : SINK_ITEM;
    float *keys = (float *)w.keys;
    Square s[4];
    Seen seen = seen_by(c, items.position, start, tokens);
    for (int at = w.lane; at < half * SINK_ITEM; at += 32) {
        int i = at / SINK_ITEM, token = at % SINK_ITEM;
        float2 turned = {0, 0};
        if (token < tokens)
            turned = rotated_sink(c, sink_keys(c, w.head), cosines, sines, place, i, start + token);
        keys[i * SINK_ITEM + token] = turned.x;
        keys[(i + half) * SINK_ITEM + token] = turned.y;
    }
    __syncwarp();
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0;
    const int g = w.lane / 4, t = w.lane % 4;
    if (2 * g < SINK_ITEM)
        for (int i = 0; i < head_dim_of(c); i++) {
            const float2 x = *(const float2 *)(w.q.q + i * ROWS + 2 * t);
            const float2 k = *(const float2 *)(keys + i * SINK_ITEM + 2 * g);
            s[0][0] += x.x * k.x, s[0][1] += x.y * k.x, s[0][2] += x.x * k.y, s[0][3] += x.y * k.y;
        }
    weigh(r, head_pad_of(c) / 16, s, 1, seen, w.softcap, 0, w.lane);
    add_floats(c, sink_values(c, w.head) + (int64_t)start * head_pad_of(c), seen.to, s, (float *)w.values, r, w.lane);
}

DEVICE void score(const Warp &w, const Item &item, Square *s)
{
    const int format = k_format(w.c, item);
    if (format == FORMAT_F32)
        score_floats(w.c, (const float *)item.k + item.first, TILE, item.tokens / 16, w.q, s, w.lane);
    else if (format == FORMAT_F16)
        score_halves(w.c, w.keys, item.tokens / 16, w.q, s, w.lane);
    else
        score_codes(bits_of(k_format_of(w.c)), w.c, w.keys, item.first, item.tokens / 16, w.q, s, w.lane);
}

DEVICE void weigh_and_add(const Warp &w, const Item &item, Square *s, Running &r)
{
    const int format = v_format(w.c, item), steps = head_pad_of(w.c) / 16, count = item.tokens / 16;
    const int bits = bits_of(v_format_of(w.c));
    const bool coded = is_quantised(format);
    float room = 0;
    if (coded)
        room = room_for(w.c, w.values + TILE * head_pad_of(w.c) * bits / 8, item.first, count, w.lane);
    weigh(r, steps, s, count, item.seen, w.softcap, room, w.lane);
    count_in_codes(r, steps, coded);
    if (coded)
        add_codes(bits, w.c, w.values, item.first, count, s, r, w.lane);
    else if (format == FORMAT_F16)
        add_halves(w.c, w.values, count, s, r, w.lane);
    else
        add_floats(w.c, (const float *)item.v + (int64_t)item.first * head_pad_of(w.c), item.seen.to, s,
                   (float *)w.values, r, w.lane);
}

// Items number, number + stride ... of `end`; the next one is on its way while one is worked on.
DEVICE void attend_items(const Warp &w, const Items &items, int number, int end, int stride, Running &r)
{
    if (number >= end)
        return;
    Item item = item_at(w.c, items, w.head, number);
    fetch_keys(w.c, item, w.keys, w.lane);
    end_copies();
    fetch_values(w.c, item, w.values, w.lane);
    end_copies();
    while (true) {
        number += stride;
        const bool more = number < end;
        Item next = item;
        Square s[4];
        if (more)
            next = item_at(w.c, items, w.head, number);
        wait_but_one();
        __syncwarp();
        score(w, item, s);
        __syncwarp();
        if (more)
            fetch_keys(w.c, next, w.keys, w.lane);
        end_copies();
        wait_but_one();
        __syncwarp();
        weigh_and_add(w, item, s, r);
        __syncwarp();
        if (!more)
            break;
        fetch_values(w.c, next, w.values, w.lane);
        end_copies();
        item = next;
    }
    wait_all();
}

// Putting parts together -----------------------------------------------------------------------------------------------

// Part of a KV head's output, in shared memory for each warp or in global memory for each block: [8][pad] outputs, and
// top and total of each row.
DEVICE void store_running(const Running &r, int pad, float *acc, float *tops, float *totals, int lane)
{
    const int g = lane / 4, t = lane % 4;
    const float up = r.coded ? 16777216.f : 1.f;
    KV_UNROLL
    for (int i = 0; i < MAX_STEPS; i++)
        if (i < pad / 16) {
            float2 a = {r.acc[i][0] * up + r.constant[i / 4][0], r.acc[i][2] * up + r.constant[i / 4][0]};
            float2 b = {r.acc[i][1] * up + r.constant[i / 4][1], r.acc[i][3] * up + r.constant[i / 4][1]};
            *(float2 *)(acc + 2 * t * pad + 16 * i + 2 * g) = a;
            *(float2 *)(acc + (2 * t + 1) * pad + 16 * i + 2 * g) = b;
        }
    for (int i = 0; i < 2; i++) {
        float total = r.total[i];
        for (int other = 4; other < 32; other *= 2)
            total += __shfl_xor_sync(0xffffffffu, total, other);
        if (g == 0)
            tops[2 * t + i] = r.top[i], totals[2 * t + i] = total;
    }
}

// The output [rows][head_dim] from `spans` parts, each [8][pad + 2]. One warp takes a row at a time.
DEVICE void combine(const CacheLayout &c, const float *parts, int spans, int rows, float *scratch, float *out)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pad = head_pad_of(c), dim = head_dim_of(c), ld = pad + 2;
    float *to = scratch + warp * MAX_PAD;
    for (int row = warp; row < rows; row += WARPS) {
        const float *part = parts + row * ld;
        float top = -INFINITY, total = 0, sum[(MAX_PAD + 31) / 32];
        for (int span = lane; span < spans; span += 32)
            top = higher(load_fresh(part + (int64_t)span * ROWS * ld + pad), top);
        for (int other = 16; other; other /= 2)
            top = higher(__shfl_xor_sync(0xffffffffu, top, other), top);
        KV_UNROLL
        for (int i = 0; i < (MAX_PAD + 31) / 32; i++)
            sum[i] = 0;
#ifndef KVRUN_HOST
#pragma unroll 4
#endif
        for (int span = 0; span < spans; span++) {
            const float *from = part + (int64_t)span * ROWS * ld;
            float weight = exp2f(load_fresh(from + pad) - top);
            total += weight * load_fresh(from + pad + 1);
            KV_UNROLL
            for (int i = 0; i < (MAX_PAD + 31) / 32; i++)
                if (lane + 32 * i < dim)
                    sum[i] += weight * load_fresh(from + lane + 32 * i);
        }
        KV_UNROLL
        for (int i = 0; i < (MAX_PAD + 31) / 32; i++)
            if (lane + 32 * i < dim)
                to[lane + 32 * i] = sum[i] / total;
        __syncwarp();
        if (is_quantised(v_format_of(c)))
            hadamard(to, dim, lane);
        for (int i = lane; i < dim; i += 32)
            out[row * dim + i] = to[i];
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(128) attend(const Step *step, CacheLayout c, const float *q, int group,
    float scale, float softcap, const float *cosines, const float *sines, const float *sink_cosines,
    const float *sink_sines, float *partial, int *counters, float *out)
{
    SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, pad = head_pad_of(c);
    const int first_row = ROWS * blockIdx.z, rows = group - first_row < ROWS ? group - first_row : (int)ROWS;
    const Items items = find_items(step, c);
    const int n_items = items.n_sinks + items.n_windows + items.n_ring;
    const int active = n_items < (int)gridDim.x ? n_items : (int)gridDim.x;
    if ((int)blockIdx.x >= active)
        return;
    uint8_t *at = (uint8_t *)shared;
    Queries queries;
    queries.q = (float *)at, at += 4 * ROWS * head_dim_of(c);
    queries.high = (uint2 *)at, at += fragment_bytes(c);
    queries.low = (uint2 *)at, at += fragment_bytes(c);
    queries.coded = (uint2 *)at, at += fragment_bytes(c);
    queries.down = (float *)at;
    queries.factor = coded_factor(k_format_of(c));
    float *tops = queries.down + ROWS, *totals = tops + WARPS * ROWS;
    int *last = (int *)(totals + WARPS * ROWS);
    at += 512;
    const int64_t first_head = (int64_t)head * group + first_row;
    prepare_queries(c, queries, q + first_head * head_dim_of(c), rows, scale, cosines, sines);

    Running r;
    for (int i = 0; i < 2; i++)
        r.top[i] = -INFINITY, r.total[i] = 0;
    KV_UNROLL
    for (int i = 0; i < MAX_STEPS; i++)
        r.acc[i][0] = r.acc[i][1] = r.acc[i][2] = r.acc[i][3] = 0;
    KV_UNROLL
    for (int i = 0; i < MAX_GROUPS; i++)
        r.constant[i][0] = r.constant[i][1] = 0;
    r.coded = false;
    const Warp w = {c, queries, at + warp * warp_room(c), at + warp * warp_room(c) + k_room(c), softcap, head, lane};
    const int stride = gridDim.x * WARPS;
    int number = blockIdx.x + gridDim.x * warp;
    for (; number < items.n_sinks; number += stride)
        attend_sinks(w, items, number, sink_cosines, sink_sines, c.sight ? 0 : 1, r);
    attend_items(w, items, number, n_items, stride, r);

    __syncthreads(); // nobody needs the tiles any more: the warps' parts take their room
    store_running(r, pad, (float *)(at + warp * warp_room(c)), tops + warp * ROWS, totals + warp * ROWS, lane);
    __syncthreads();
    const int64_t number_of_head = head * gridDim.z + blockIdx.z, ld = pad + 2;
    float *parts = partial + number_of_head * gridDim.x * ROWS * ld, *part = parts + blockIdx.x * ROWS * ld;
    for (int i = threadIdx.x; i < rows * (pad + 1); i += THREADS) {
        const int row = i / (pad + 1), channel = i % (pad + 1);
        float top = -INFINITY, sum = 0;
        for (int j = 0; j < WARPS; j++)
            top = higher(tops[j * ROWS + row], top);
        for (int j = 0; j < WARPS; j++) {
            const float *acc = (const float *)(at + j * warp_room(c)) + row * pad;
            sum += exp2f(tops[j * ROWS + row] - top) * (channel < pad ? acc[channel] : totals[j * ROWS + row]);
        }
        part[row * ld + (channel < pad ? channel : pad + 1)] = sum;
        if (channel == pad)
            part[row * ld + pad] = top;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(&counters[number_of_head], 1) == active - 1;
        if (*last)
            counters[number_of_head] = 0;
    }
    __syncthreads();
    if (*last) {
        __threadfence();
        combine(c, parts, active, rows, (float *)at, out + first_head * head_dim_of(c));
    }
}
