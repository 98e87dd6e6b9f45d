// Weights as floats, out of panels (kernels.h describes them), for every type.
#pragma once
#include "common.cuh"

// Four bytes as numbers.
DEVICE float byte_at(uint32_t word, int i) { return (float)(int)(word >> 8 * i & 255); }
DEVICE float4 bytes_to_floats(uint32_t w)
{
    return make_float4(byte_at(w, 0), byte_at(w, 1), byte_at(w, 2), byte_at(w, 3));
}

// x * scale + offset
DEVICE float4 scaled(float4 x, float scale, float offset)
{
    return make_float4(x.x * scale + offset, x.y * scale + offset, x.z * scale + offset, x.w * scale + offset);
}

DEVICE float4 less(float4 x, float by) { return make_float4(x.x - by, x.y - by, x.z - by, x.w - by); }
DEVICE uint32_t word_of(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Of four halves.
DEVICE float half_of(uint2 v, int i) { return half_to_float((uint16_t)((i < 2 ? v.x : v.y) >> i % 2 * 16)); }

DEVICE uint4 load_16(const uint8_t *p) { return *(const uint4 *)p; }
DEVICE uint2 load_8(const uint8_t *p) { return *(const uint2 *)p; }

// A thread unpacks four rows, a *quad*, of a few channels at a time: 16 bytes of a line. put(i, column, values):
// channels [column, column + 4) of row 4 quad + i, where i is a constant once loops are unrolled. Each function takes
// `item`, the place of these channels among those of the panel; beyond the panel's channels nothing is put, and what
// only pads the last four is 0 or as the panel has it.

template <class F> DEVICE void unpack_f32(const uint8_t *panel, int cols, int item, int quad, F put)
{
    int column = 4 * item;
    if (column >= cols)
        return;
    uint4 line[4];
    KV_UNROLL
    for (int c = 0; c < 4; c++)
        line[c] = column + c < cols ? load_16(panel + 64 * (int64_t)(column + c) + 16 * quad) : make_uint4(0, 0, 0, 0);
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        put(i, column,
            make_float4(__uint_as_float(word_of(line[0], i)), __uint_as_float(word_of(line[1], i)),
                        __uint_as_float(word_of(line[2], i)), __uint_as_float(word_of(line[3], i))));
}

template <class F> DEVICE void unpack_f16(const uint8_t *panel, int cols, int item, int quad, F put)
{
    int column = 4 * item;
    if (column >= cols)
        return;
    uint2 line[4];
    KV_UNROLL
    for (int c = 0; c < 4; c++)
        line[c] = column + c < cols ? load_8(panel + 32 * (int64_t)(column + c) + 8 * quad) : make_uint2(0, 0);
    KV_UNROLL
    for (int i = 0; i < 4; i++)
        put(i, column, make_float4(half_of(line[0], i), half_of(line[1], i), half_of(line[2], i), half_of(line[3], i)));
}

template <class F> DEVICE void unpack_bf16(const uint8_t *panel, int cols, int item, int quad, F put)
{
    int column = 4 * item;
    if (column >= cols)
        return;
    uint4 line[2];
    KV_UNROLL
    for (int c = 0; c < 2; c++)
        line[c] = column + 2 * c < cols ? load_16(panel + 32 * (int64_t)(column + 2 * c) + 16 * quad)
                                        : make_uint4(0, 0, 0, 0);
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t a = word_of(line[0], i), b = word_of(line[1], i);
        put(i, column,
            make_float4(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u), __uint_as_float(b << 16),
                        __uint_as_float(b & 0xffff0000u)));
    }
}

// q8_0 (BITS 8) and q4_1 and q4_0 (4, with and without MINIMUM): an item is a line.
template <int BITS, bool MINIMUM, class F>
DEVICE void unpack_blocks(const uint8_t *panel, int cols, int item, int quad, F put)
{
    const int lines = BITS, head = MINIMUM ? 128 : 64;
    int block = item / lines, line = item % lines;
    if (block * BLOCK >= cols)
        return;
    const uint8_t *pair = panel + block / 2 * (int64_t)(head + 2 * 64 * lines);
    uint4 codes = load_16(pair + head + (block % 2 * lines + line) * 64 + 16 * quad);
    uint2 scales = load_8(pair + block % 2 * 32 + 8 * quad), minimums = scales;
    if (MINIMUM)
        minimums = load_8(pair + 64 + block % 2 * 32 + 8 * quad);
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t w = word_of(codes, i);
        float scale = half_of(scales, i), minimum = MINIMUM ? half_of(minimums, i) : 0;
        int column = block * BLOCK + 4 * line;
        if (BITS == 8) {
            put(i, column, scaled(less(bytes_to_floats(w), 128), scale, 0));
        } else {
            float zero = MINIMUM ? 0 : 8;
            put(i, column, scaled(less(bytes_to_floats(w & 0x0f0f0f0fu), zero), scale, minimum));
            put(i, column + 16, scaled(less(bytes_to_floats(w >> 4 & 0x0f0f0f0fu), zero), scale, minimum));
        }
    }
}

// The fourth of four lines of six-bit numbers, out of the two high bits of the others.
DEVICE uint32_t fourth_six(uint32_t a, uint32_t b, uint32_t c)
{
    return (a >> 6 & 0x03030303u) | (b >> 4 & 0x0c0c0c0cu) | (c >> 2 & 0x30303030u);
}

// Line l of eight of five-bit numbers, out of the five that are stored.
DEVICE uint32_t five_of(const uint32_t *stored, int l)
{
    if (l < 5)
        return stored[l] & 0x1f1f1f1fu;
    if (l == 7)
        return (stored[4] >> 5 & 0x07070707u) | (stored[1] >> 2 & 0x08080808u) | (stored[3] >> 1 & 0x10101010u);
    return (stored[2 * l - 10] >> 5 & 0x07070707u) | (stored[2 * l - 9] >> 3 & 0x18181818u);
}

// An item is a block of 32.
template <class F> DEVICE void unpack_q5_0(const uint8_t *panel, int cols, int item, int quad, F put)
{
    if (item * BLOCK >= cols)
        return;
    const uint8_t *pair = panel + item / 2 * (int64_t)(64 + 2 * 320), *from = pair + 64 + item % 2 * 320 + 16 * quad;
    uint4 line[5];
    KV_UNROLL
    for (int l = 0; l < 5; l++)
        line[l] = load_16(from + 64 * l);
    uint2 scales = load_8(pair + item % 2 * 32 + 8 * quad);
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        const uint32_t stored[5] = {word_of(line[0], i), word_of(line[1], i), word_of(line[2], i), word_of(line[3], i),
                                    word_of(line[4], i)};
        KV_UNROLL
        for (int l = 0; l < 8; l++)
            put(i, item * BLOCK + 4 * l, scaled(less(bytes_to_floats(five_of(stored, l)), 16), half_of(scales, i), 0));
    }
}

// An item is a line of a block of 32.
template <class F> DEVICE void unpack_q4_k(const uint8_t *panel, int cols, int item, int quad, F put)
{
    int block = item / 4, line = item % 4, b = block % 8;
    if (block * BLOCK >= cols)
        return;
    const uint8_t *super = panel + block / 8 * (int64_t)(256 + 2048);
    uint4 codes = load_16(super + 256 + (4 * b + line) * 64 + 16 * quad);
    uint2 d = load_8(super + 8 * quad), d_minimum = load_8(super + 32 + 8 * quad);
    const uint8_t *sixes = super + 64 + 16 * quad;
    uint4 six[3] = {load_16(sixes), load_16(sixes + 64), load_16(sixes + 128)};
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t s0 = word_of(six[0], i), s1 = word_of(six[1], i), s2 = word_of(six[2], i), w = word_of(codes, i);
        int scale = (b < 4 ? s0 : s1) >> b % 4 * 8 & 63;
        int minimum = (b < 4 ? s2 : fourth_six(s0, s1, s2)) >> b % 4 * 8 & 63;
        float factor = half_of(d, i) * scale, offset = -(half_of(d_minimum, i) * minimum);
        int column = block * BLOCK + 4 * line;
        put(i, column, scaled(bytes_to_floats(w & 0x0f0f0f0fu), factor, offset));
        put(i, column + 16, scaled(bytes_to_floats(w >> 4 & 0x0f0f0f0fu), factor, offset));
    }
}

// An item is a block of 16.
template <class F> DEVICE void unpack_q6_k(const uint8_t *panel, int cols, int item, int quad, F put)
{
    int super = item / 16, b = item % 16;
    if (item * 16 >= cols)
        return;
    const uint8_t *pair = panel + super / 2 * (int64_t)(64 + 2 * (256 + 3072));
    const uint8_t *from = pair + 64 + super % 2 * (256 + 3072), *codes = from + 256 + 192 * b + 16 * quad;
    uint4 line[3] = {load_16(codes), load_16(codes + 64), load_16(codes + 128)};
    uint4 scales = load_16(from + b / 4 * 64 + 16 * quad);
    uint2 d = load_8(pair + super % 2 * 32 + 8 * quad);
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t w[4] = {word_of(line[0], i), word_of(line[1], i), word_of(line[2], i), 0};
        w[3] = fourth_six(w[0], w[1], w[2]);
        float scale = half_of(d, i) * ((int)(word_of(scales, i) >> b % 4 * 8 & 255) - 128);
        KV_UNROLL
        for (int l = 0; l < 4; l++)
            put(i, item * 16 + 4 * l, scaled(less(bytes_to_floats(w[l] & 0x3f3f3f3fu), 32), scale, 0));
    }
}

// Channels [column, column + count) of a panel, both multiples of 64, or of what is there of them, by `threads`
// threads, a multiple of 4: thread t has quad t % 4.
template <class F>
DEVICE void unpack(const Segment &s, int cols, int panel, int column, int count, int thread, int threads, F put)
{
    const uint8_t *data = s.data + panel * s.panel_bytes;
    int quad = thread % 4, from = thread / 4, by = threads / 4;
    switch (s.type) {
    case KV_F32:
        for (int i = from; i < count / 4; i += by)
            unpack_f32(data, cols, column / 4 + i, quad, put);
        break;
    case KV_F16:
        for (int i = from; i < count / 4; i += by)
            unpack_f16(data, cols, column / 4 + i, quad, put);
        break;
    case KV_BF16:
        for (int i = from; i < count / 4; i += by)
            unpack_bf16(data, cols, column / 4 + i, quad, put);
        break;
    case KV_Q8_0:
        for (int i = from; i < count / 4; i += by)
            unpack_blocks<8, false>(data, cols, column / 4 + i, quad, put);
        break;
    case KV_Q5_0:
        for (int i = from; i < count / 32; i += by)
            unpack_q5_0(data, cols, column / 32 + i, quad, put);
        break;
    case KV_Q4_1:
        for (int i = from; i < count / 8; i += by)
            unpack_blocks<4, true>(data, cols, column / 8 + i, quad, put);
        break;
    case KV_Q4_0:
        for (int i = from; i < count / 8; i += by)
            unpack_blocks<4, false>(data, cols, column / 8 + i, quad, put);
        break;
    case KV_Q4_K:
        for (int i = from; i < count / 8; i += by)
            unpack_q4_k(data, cols, column / 8 + i, quad, put);
        break;
    case KV_Q6_K:
        for (int i = from; i < count / 16; i += by)
            unpack_q6_k(data, cols, column / 16 + i, quad, put);
        break;
    }
}

// One row, by all threads of a block: put(column, values of channels [column, column + 4)); those beyond cols are 0 or
// as the panel has them.
template <class F> DEVICE void unpack_row(const Segment &s, int cols, int row, F put)
{
    int r = row % PANEL;
    for (int t = threadIdx.x; t < (cols + 63) / 64 * 16; t += blockDim.x) // a thread: at least 4 channels
        unpack(s, cols, row / PANEL, 0, 64 * ((cols + 63) / 64), 4 * t + r / 4, 4 * ((cols + 63) / 64 * 16),
               [&](int i, int column, float4 x) {
                   if (i == r % 4)
                       put(column, x);
               });
}
