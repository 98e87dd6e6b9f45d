// Panels times an input, by a group of warps. A thread takes a *unit* at a time: four rows, a quad, of a few channels,
// which are four loads of 16 bytes. lane % 4 is the quad throughout (of f16, lane % 2 is the half of the panel).
#pragma once
#include "input.cuh"
#include "unpack.cuh"

// Compiled for the types of a model when KV_WEIGHT_TYPES has a bit for each of them, else for all.
#ifdef KV_WEIGHT_TYPES
#define HAS_TYPE(type) (KV_WEIGHT_TYPES >> (type) & 1)
#define IS_TYPE(value, type) (HAS_TYPE(type) && (KV_WEIGHT_TYPES == 1 << (type) || (value) == (type)))
#else
#define HAS_TYPE(type) true
#define IS_TYPE(value, type) ((value) == (type))
#endif

// What a thread has loaded of a unit.
struct Unit {
    uint4 lines[4], more; // more: of q4_k line lane / 4 % 4 of the super-block's scales, of q5_0 the fifth line
    uint2 scale, minimum; // float16, of each row
};

DEVICE uint2 load_pair(const uint8_t *p) { return *(const uint2 *)p; }

// Of a panel.
DEVICE uint32_t n_units(int type, int cols)
{
    switch (type) {
    case KV_F32: return (cols + 3) / 4 * 4;
    case KV_F16: return (cols + 3) / 4 * 2;
    case KV_BF16: return (cols + 7) / 8 * 4;
    case KV_Q8_0:
    case KV_Q6_K: return n_blocks(cols) * 8;
    case KV_Q5_0:
    case KV_Q4_1:
    case KV_Q4_0:
    case KV_Q4_K: return n_blocks(cols) * 4;
    default: return 0; // a type that kernels do not know: weights.py refuses it
    }
}

DEVICE uint4 line_if(bool there, const uint8_t *p) { return there ? load_stream(p) : make_uint4(0, 0, 0, 0); }

template <int TYPE> DEVICE void load(Unit &u, const uint8_t *panel, uint32_t cols, uint32_t t)
{
    const uint32_t quad = t % 4;
    if constexpr (TYPE == KV_F32) {
        const uint32_t column = t / 4 * 4;
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            u.lines[i] = line_if(column + i < cols, panel + (64 * (column + i) + 16 * quad));
    } else if constexpr (TYPE == KV_F16) {
        const uint32_t column = t / 2 * 4;
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            u.lines[i] = line_if(column + i < cols, panel + (32 * (column + i) + 16 * (t % 2)));
    } else if constexpr (TYPE == KV_BF16) {
        const uint32_t line = t / 4 * 4;
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            u.lines[i] = line_if(2 * (line + i) < cols, panel + (64 * (line + i) + 16 * quad));
    } else if constexpr (TYPE == KV_Q4_K) {
        const uint32_t block = t / 4;
        const uint8_t *super = panel + (block / 8 * 2304 + 16 * quad), *from = super + (256 + block % 8 * 256);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            u.lines[i] = load_stream(from + 64 * i);
        if (t / 4 % 4 < 3)
            u.more = load_stream(super + 64 + t / 4 % 4 * 64);
        u.scale = load_pair(super - 8 * quad);
        u.minimum = load_pair(super - 8 * quad + 32);
    } else if constexpr (TYPE == KV_Q6_K) {
        const uint32_t block = t / 4, super = block / 16; // a block of 16
        const uint8_t *pair = panel + super / 2 * (64 + 2 * 3328), *from = pair + (64 + super % 2 * 3328 + 16 * quad);
        KV_UNROLL
        for (int i = 0; i < 3; i++)
            u.lines[i] = load_stream(from + 256 + block % 16 * 192 + 64 * i);
        u.lines[3] = load_stream(from + block % 16 / 4 * 64);
        u.scale = load_pair(pair + super % 2 * 32 + 8 * quad);
    } else if constexpr (TYPE == KV_Q8_0) {
        const uint32_t half = t / 4, block = half / 2;
        const uint8_t *pair = panel + block / 2 * 1088;
        const uint8_t *from = pair + (64 + block % 2 * 512 + half % 2 * 256 + 16 * quad);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            u.lines[i] = load_stream(from + 64 * i);
        u.scale = load_pair(pair + block % 2 * 32 + 8 * quad);
    } else if constexpr (TYPE == KV_Q5_0) {
        const uint32_t block = t / 4;
        const uint8_t *pair = panel + block / 2 * 704, *from = pair + (64 + block % 2 * 320 + 16 * quad);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            u.lines[i] = load_stream(from + 64 * i);
        u.more = load_stream(from + 64 * 4);
        u.scale = load_pair(pair + block % 2 * 32 + 8 * quad);
    } else {
        static_assert(TYPE == KV_Q4_1 || TYPE == KV_Q4_0, "a type that is loaded in no way of its own");
        const uint32_t block = t / 4, head = TYPE == KV_Q4_1 ? 128 : 64;
        const uint8_t *pair = panel + block / 2 * (head + 512), *from = pair + (head + block % 2 * 256 + 16 * quad);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            u.lines[i] = load_stream(from + 64 * i);
        u.scale = load_pair(pair + block % 2 * 32 + 8 * quad);
        if (TYPE == KV_Q4_1)
            u.minimum = load_pair(pair + 64 + block % 2 * 32 + 8 * quad);
    }
}

// 256 times the products of four rows' codes with the first plane of a block, plus those with the second.
DEVICE void dot_nibbles(const Unit &u, const Input &in, uint32_t block, int *dot)
{
    int first[4] = {0, 0, 0, 0}, second[4] = {0, 0, 0, 0};
    KV_UNROLL
    for (int l = 0; l < 4; l++) {
        const uint4 x = in.codes[l * in.blocks + block];
        KV_UNROLL
        for (int r = 0; r < 4; r++) {
            const uint32_t low = word_of(u.lines[l], r) & 0x0f0f0f0fu, high = word_of(u.lines[l], r) >> 4 & 0x0f0f0f0fu;
            first[r] = dp4a(high, x.y, dp4a(low, x.x, first[r]));
            second[r] = dp4a(high, x.w, dp4a(low, x.z, second[r]));
        }
    }
    KV_UNROLL
    for (int r = 0; r < 4; r++)
        dot[r] = 256 * first[r] + second[r];
}

// The same with the five-bit codes of q5_0; a plane at a time, which takes fewer registers.
DEVICE void dot_fives(const Unit &u, const Input &in, uint32_t block, int *dot)
{
    KV_UNROLL
    for (int r = 0; r < 4; r++)
        dot[r] = 0;
    KV_NO_UNROLL
    for (int plane = 0; plane < 2; plane++) {
        KV_UNROLL
        for (int r = 0; r < 4; r++)
            dot[r] *= 256;
        KV_UNROLL
        for (int l = 0; l < 4; l++) {
            const uint2 x = ((const uint2 *)(in.codes + l * in.blocks + block))[plane];
            KV_UNROLL
            for (int r = 0; r < 4; r++) {
                const uint32_t stored[5] = {word_of(u.lines[0], r), word_of(u.lines[1], r), word_of(u.lines[2], r),
                                            word_of(u.lines[3], r), word_of(u.more, r)};
                dot[r] = dp4a(five_of(stored, 4 + l), x.y, dp4a(five_of(stored, l), x.x, dot[r]));
            }
        }
    }
}

// The same of half a block, 16 channels, whose codes are signed bytes less `zero`: code(l, r), a word of line l.
template <class F> DEVICE void dot_bytes(const Input &in, uint32_t half, uint32_t zero, int *dot, F code)
{
    int first[4], second[4], first_zero = 0, second_zero = 0;
    uint32_t x[4], y[4];
    KV_UNROLL
    for (int l = 0; l < 4; l++) {
        const uint4 both = in.codes[l * in.blocks + half / 2];
        x[l] = half % 2 ? both.y : both.x;
        y[l] = half % 2 ? both.w : both.z;
        if (zero) {
            first_zero = dp4a(x[l], zero, first_zero);
            second_zero = dp4a(y[l], zero, second_zero);
        }
    }
    KV_UNROLL
    for (int r = 0; r < 4; r++) {
        first[r] = first_zero, second[r] = second_zero;
        KV_UNROLL
        for (int l = 0; l < 4; l++) {
            const uint32_t w = code(l, r);
            first[r] = dp4a(w, x[l], first[r]);
            second[r] = dp4a(w, y[l], second[r]);
        }
        dot[r] = 256 * first[r] + second[r];
    }
}

// sum += the products of a unit; of f16 eight rows, else four.
template <int TYPE> DEVICE void use(const Unit &u, const Input &in, uint32_t t, float *sum)
{
    int dot[4];
    if constexpr (TYPE == KV_F32) {
        const float4 x = *(const float4 *)(in.floats + t / 4 * 4);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            KV_UNROLL
            for (int r = 0; r < 4; r++)
                sum[r] += __uint_as_float(word_of(u.lines[i], r)) * of_four(x, i);
    } else if constexpr (TYPE == KV_F16) {
        const float4 x = *(const float4 *)(in.floats + t / 2 * 4);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            KV_UNROLL
            for (int r = 0; r < 4; r++) {
                const float2 pair = halves_to_floats(word_of(u.lines[i], r));
                sum[2 * r] += pair.x * of_four(x, i);
                sum[2 * r + 1] += pair.y * of_four(x, i);
            }
    } else if constexpr (TYPE == KV_BF16) {
        const float4 *x = (const float4 *)(in.floats + t / 4 * 8);
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            KV_UNROLL
            for (int r = 0; r < 4; r++) {
                const uint32_t w = word_of(u.lines[i], r);
                sum[r] += __uint_as_float(w << 16) * of_four(x[i / 2], i % 2 * 2);
                sum[r] += __uint_as_float(w & 0xffff0000u) * of_four(x[i / 2], i % 2 * 2 + 1);
            }
    } else if constexpr (TYPE == KV_Q8_0 || TYPE == KV_Q6_K) {
        const uint32_t half = t / 4;
        const float step = __uint_as_float(in.sums[half / 2].x);
        if (TYPE == KV_Q8_0)
            dot_bytes(in, half, 0, dot, [&](int l, int r) { return word_of(u.lines[l], r) ^ 0x80808080u; });
        else
            dot_bytes(in, half, 0xe0e0e0e0u, dot, [&](int l, int r) {
                const uint32_t a = word_of(u.lines[0], r), b = word_of(u.lines[1], r), c = word_of(u.lines[2], r);
                return l == 3 ? fourth_six(a, b, c) : (l == 0 ? a : l == 1 ? b : c) & 0x3f3f3f3fu;
            });
        KV_UNROLL
        for (int r = 0; r < 4; r++) {
            float scale = half_of(u.scale, r) * step;
            if (TYPE == KV_Q6_K)
                scale *= (float)((int)(word_of(u.lines[3], r) >> half % 4 * 8 & 255) - 128);
            sum[r] += dot[r] * scale;
        }
    } else {
        static_assert(TYPE == KV_Q5_0 || TYPE == KV_Q4_1 || TYPE == KV_Q4_0 || TYPE == KV_Q4_K,
                      "a type that is multiplied in no way of its own");
        const uint32_t block = t / 4;
        const uint2 of_block = in.sums[block];
        const float step = __uint_as_float(of_block.x), total = step * (int)of_block.y;
        if (TYPE == KV_Q5_0)
            dot_fives(u, in, block, dot);
        else
            dot_nibbles(u, in, block, dot);
        KV_UNROLL
        for (int r = 0; r < 4; r++) {
            float scale = half_of(u.scale, r) * step;
            if (TYPE == KV_Q4_0 || TYPE == KV_Q5_0)
                dot[r] -= (TYPE == KV_Q5_0 ? 16 : 8) * (int)of_block.y;
            if (TYPE == KV_Q4_1)
                sum[r] += half_of(u.minimum, r) * total;
            if (TYPE == KV_Q4_K) {
                const uint32_t mine = word_of(u.more, r); // a warp has a super-block, each of its lanes a line
                const uint32_t a = __shfl_sync(0xffffffffu, mine, t % 4), b = __shfl_sync(0xffffffffu, mine, 4 + t % 4);
                const uint32_t c = __shfl_sync(0xffffffffu, mine, 8 + t % 4);
                const int shift = block % 4 * 8;
                const bool later = block % 8 >= 4;
                scale *= (float)(int)((later ? b : a) >> shift & 63);
                sum[r] -= half_of(u.minimum, r) * (float)(int)((later ? fourth_six(a, b, c) : c) >> shift & 63) * total;
            }
            sum[r] += dot[r] * scale;
        }
    }
}

// A panel; data 0: there is none.
struct Part {
    const uint8_t *data;
    const float *bias; // of its first row, or 0
    int type, rows;    // rows: at least those that are there
};

DEVICE Part part_of(const Matrix &m, int panel)
{
    Part part = {0, 0, 0, 0};
    if (panel >= m.panels)
        return part;
    int k = 0, at = panel; // the segment, and the panel in it
    while (at >= m.segments[k].panels)
        at -= m.segments[k++].panels;
    const Segment &s = m.segments[k];
    part.data = s.data + at * s.panel_bytes;
    part.bias = s.bias ? s.bias + PANEL * at : 0;
    part.type = s.type;
    part.rows = s.rows - PANEL * at;
    return part;
}

template <int TYPE> DEVICE void load_unit(Unit &u, const Part &p, int cols, uint32_t t)
{
    if (t < n_units(TYPE, cols))
        load<TYPE>(u, p.data, cols, t);
}

#define FOR_TYPE(type, call)                                                                                           \
    if (IS_TYPE(type, KV_F32)) {                                                                                       \
        call(KV_F32)                                                                                                   \
    } else if (IS_TYPE(type, KV_F16)) {                                                                                \
        call(KV_F16)                                                                                                   \
    } else if (IS_TYPE(type, KV_BF16)) {                                                                               \
        call(KV_BF16)                                                                                                  \
    } else if (IS_TYPE(type, KV_Q8_0)) {                                                                               \
        call(KV_Q8_0)                                                                                                  \
    } else if (IS_TYPE(type, KV_Q5_0)) {                                                                               \
        call(KV_Q5_0)                                                                                                  \
    } else if (IS_TYPE(type, KV_Q4_1)) {                                                                               \
        call(KV_Q4_1)                                                                                                  \
    } else if (IS_TYPE(type, KV_Q4_0)) {                                                                               \
        call(KV_Q4_0)                                                                                                  \
    } else if (IS_TYPE(type, KV_Q4_K)) {                                                                               \
        call(KV_Q4_K)                                                                                                  \
    } else if (IS_TYPE(type, KV_Q6_K)) {                                                                               \
        call(KV_Q6_K)                                                                                                  \
    }

// What a thread has on its way: two units, this one and the next.
struct Units {
    Unit a, b;
};

// The first units of a thread of a group of `threads`.
DEVICE void load_first(Units &u, const Part &p, int cols, uint32_t thread, uint32_t threads)
{
    if (!p.data)
        return;
#define LOAD(T)                                                                                                        \
    load_unit<T>(u.a, p, cols, thread);                                                                                \
    load_unit<T>(u.b, p, cols, thread + threads);
    FOR_TYPE(p.type, LOAD)
#undef LOAD
}

// sum [4]: of the quad that the lane has; u: the first units, loaded. `threads` of a group.
template <int TYPE>
DEVICE void add_units(Units &u, const Part &p, const Input &in, int cols, uint32_t thread, uint32_t threads, float *sum)
{
    const uint32_t n = n_units(TYPE, cols);
    float rows[TYPE == KV_F16 ? 8 : 4];
    KV_UNROLL
    for (int r = 0; r < (TYPE == KV_F16 ? 8 : 4); r++)
        rows[r] = 0;
    KV_NO_UNROLL
    for (uint32_t t = thread; t < n; t += 2 * threads) {
        use<TYPE>(u.a, in, t, rows);
        load_unit<TYPE>(u.a, p, cols, t + 2 * threads);
        if (t + threads < n) { // the same for a warp of q4_k, which shuffles
            use<TYPE>(u.b, in, t + threads, rows);
            load_unit<TYPE>(u.b, p, cols, t + 3 * threads);
        }
    }
    KV_UNROLL
    for (int r = 0; r < 4; r++)
        sum[r] = rows[r];
    if (TYPE == KV_F16) { // a lane keeps the upper or lower four of its eight rows, its neighbour the others
        const bool upper = thread & 2;
        KV_UNROLL
        for (int r = 0; r < 4; r++) {
            const float low = rows[r], high = rows[TYPE == KV_F16 ? 4 + r : r];
            sum[r] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
        }
    }
}

// sum [4] = the product of a panel as far as this thread has it: of the quad that its lane has. Every lane of a warp
// calls it with the same part, whose first units are loaded.
DEVICE void multiply(Units &u, const Part &p, const Input &in, int cols, uint32_t thread, uint32_t threads, float *sum)
{
    sum[0] = sum[1] = sum[2] = sum[3] = 0;
    if (!p.data)
        return;
#define ADD(T) add_units<T>(u, p, in, cols, thread, threads, sum);
    FOR_TYPE(p.type, ADD)
#undef ADD
}

// sums [16]: of a warp's lanes. Those with the same quad share out its rows: two, then one each.
DEVICE void put_sums(const float *sum, int type, int lane, float *sums)
{
    const int row = lane / 16 * 2 + lane / 8 % 2;
    const int quad = IS_TYPE(type, KV_F16) ? lane % 2 * 2 + lane / 2 % 2 : lane % 4;
    float a = lane & 16 ? sum[2] : sum[0], b = lane & 16 ? sum[3] : sum[1];
    a += __shfl_xor_sync(0xffffffffu, lane & 16 ? sum[0] : sum[2], 16);
    b += __shfl_xor_sync(0xffffffffu, lane & 16 ? sum[1] : sum[3], 16);
    float mine = lane & 8 ? b : a;
    mine += __shfl_xor_sync(0xffffffffu, lane & 8 ? a : b, 8);
    mine += __shfl_xor_sync(0xffffffffu, mine, 4);
    if (!(lane & 4))
        sums[4 * quad + row] = mine;
}
