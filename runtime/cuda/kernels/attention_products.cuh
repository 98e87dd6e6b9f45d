// Scores, weights and outputs of the items of `attend`.
//
// Scores are K times the queries, outputs V transposed times the weights: m16n8k16 products with tokens or channels
// down and up to 8 heads across, so that a thread keeps the same two heads throughout. Codes meet the tensor cores as
// they lie in memory, as float16 below the normal ones: a code c is c 2^-24. Scales are folded into the queries or
// weights, minima are a product of their own. Where K or V is float16 queries or weights are two float16, 22 bits in
// all.
#pragma once
#include "attention_items.cuh"

// Queries -----------------------------------------------------------------------------------------------------------

// In shared memory: q [head_dim][8] float32; fragments of it for products: high and low halves of q / 2^e, and as
// codes want it; down[row]: 2^e of a row, which brings its largest to [1, 2).
struct Queries {
    float *q, *down;
    uint2 *high, *low, *coded;
    float factor; // of `coded`, in steps of 16 channels that are odd; in even ones 16 times it, at 8 bits the same
};

// So that queries times scales stay within float16: scales are at most 131008 / (2^bits - 1).
DEVICE float coded_factor(int format)
{
    return format == KV_FORMAT_Q8 ? 32.f : format == KV_FORMAT_Q4 ? 1 / 8.f : 1 / 32.f;
}

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
    if (k_format_of(c) == KV_FORMAT_F32)
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
            float by = s.factor * (k_format_of(c) != KV_FORMAT_Q8 && step % 2 == 0 ? 16 : 1);
            s.coded[at].x = half2_pack(x[0] * by, x[2] * by), s.coded[at].y = half2_pack(x[1] * by, x[3] * by);
        }
    }
    __syncthreads();
}

// Scores ------------------------------------------------------------------------------------------------------------

// Of 16 tokens and 8 rows: this thread has tokens 2g and 2g + 1 (g = lane / 4), each with rows 2t and 2t + 1 (t =
// lane % 4).
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

// What rounding took from queries or weights, once scales are in them, counts as if it met a code of the middle: no
// bias.
DEVICE float middle(int bits) { return 0.5f * ((1 << bits) - 1); }

DEVICE void score_codes(int bits, const CacheLayout &c, const uint8_t *tile, int first, int count, const Queries &q,
                        Square *s, int lane)
{
    const int g = lane / 4, t = lane % 4, pad = head_pad_of(c), panel = LANES * pad * bits / 8;
    const uint8_t *params = tile + TILE * pad * bits / 8 + 8 * t;
    Square sums = {0, 0, 0, 0}, rounded = {0, 0, 0, 0}; // q times minima and scales; of w
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
                const int at = (b / 16 + j) * 32 + lane;
                const uint2 x = q.coded[at], high = q.high[at], low = q.low[at];
                uint2 scale = even_odd(*(const uint2 *)(params + 2 * (b + 16 * j)));
                uint2 minimum = even_odd(*(const uint2 *)(params + 2 * (pad + b + 16 * j)));
                w[j][0] = half2_mul(x.x, scale.x);
                w[j][1] = half2_mul(x.y, scale.y);
                multiply(sums, minimum.x, scale.x, minimum.y, scale.y, high.x, high.y);
                multiply(sums, minimum.x, scale.x, minimum.y, scale.y, low.x, low.y);
                const uint32_t one = bits < 8 && j == 0 ? 0x2c002c00u : 0x3c003c00u; // 1/16 or 1
                multiply(rounded, one, one, one, one, w[j][0], w[j][1]);
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
        const float down = q.down[2 * t + i], coded = down / q.factor, up = coded * less * 16777216;
        const float constant = down * (sums[i] + middle(bits) * sums[2 + i]) - middle(bits) * coded * rounded[i];
        KV_UNROLL
        for (int m = 0; m < 4; m++) {
            s[m][i] = s[m][i] * up + constant;
            s[m][2 + i] = s[m][2 + i] * up + constant;
        }
    }
}

// Halves of rows 4t .. 4t + 3 (of a step of 16) at columns 2g and 2g + 1, as a product with these columns down wants
// them.
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

// Softmax -----------------------------------------------------------------------------------------------------------

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

// From scores to weights in place; those of tokens that are not seen are 0. room: 2 to this is kept free of the
// largest float16 weight, for large scales.
DEVICE void weigh(Running &r, int steps, Square *s, Seen seen, float softcap, float room, int lane)
{
    const int g = lane / 4;
    const bool partly = seen.from > 0 || seen.to < TILE;
    float most[2] = {-INFINITY, -INFINITY}, shrink[2];
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        KV_UNROLL
        for (int i = 0; i < 4; i++) {
            if (softcap > 0)
                s[m][i] = capped(s[m][i], softcap);
            const int token = 16 * m + 2 * g + i / 2;
            if (partly && (token < seen.from || token >= seen.to))
                s[m][i] = -INFINITY;
            most[i % 2] = higher(s[m][i], most[i % 2]);
        }
    KV_UNROLL
    for (int i = 0; i < 2; i++) {
        KV_UNROLL
        for (int other = 4; other < 32; other *= 2)
            most[i] = higher(__shfl_xor_sync(0xffffffffu, most[i], other), most[i]);
        const float top = higher(most[i] + room, r.top[i]);
        shrink[i] = top > r.top[i] ? power_of_2(r.top[i] - top) : 1.f;
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
            s[m][i] = power_of_2(s[m][i] - (r.top[i % 2] - 8));
            r.total[i % 2] += s[m][i];
        }
}

// Values ------------------------------------------------------------------------------------------------------------

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
                most = half2_max(most, half2_max(scale.x, scale.y));
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

DEVICE void add_codes(int bits, const CacheLayout &c, const uint8_t *tile, int first, int count, const Square *s,
                      Running &r, int lane)
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
        Square sums = {0, 0, 0, 0}, rounded = {0, 0, 0, 0}; // weights times minima and scales; of w
        KV_UNROLL
        for (int m = 0; m < 4; m++)
            if (m < count) {
                uint2 scale = even_odd(*(const uint2 *)(params + 256 * group + 32 * m));
                uint2 minimum = even_odd(*(const uint2 *)(params + 256 * group + 32 * m + 2 * TILE));
                w[m][0] = half2_mul(p[m][0], scale.x);
                w[m][1] = half2_mul(p[m][1], scale.y);
                if (bits < 8 && m % 2) // their codes count 16 times
                    w[m][0] = half2_mul(w[m][0], 0x2c002c00u), w[m][1] = half2_mul(w[m][1], 0x2c002c00u);
                multiply(sums, minimum.x, scale.x, minimum.y, scale.y, p[m][0], p[m][1]);
                const uint32_t one = bits < 8 && m % 2 ? 0x4c004c00u : 0x3c003c00u; // 16 or 1
                multiply(rounded, one, one, one, one, w[m][0], w[m][1]);
            }
        KV_UNROLL
        for (int i = 0; i < 2; i++)
            r.constant[group][i] += sums[i] + middle(bits) * (sums[2 + i] - rounded[i]);
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
DEVICE void add_floats(const CacheLayout &c, const float *values, int tokens, const Square *s, float *weights,
                       Running &r, int lane)
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
