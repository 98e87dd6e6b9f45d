/* Integer dot products of codes with int8 inputs, shared by block-quantised weights and quantised tiles.
 *
 * A block of 32 (or at the end 16) inputs for 16 lanes is stored in lines of 64 bytes [16 lanes][4]. With 8 bits line l
 * holds inputs 4l..4l+3; with fewer bits each byte holds the codes of 8/bits inputs: field f (bits f*bits and up) of
 * line l holds inputs 4(f * lines + l).. of the block's `lines`. */
#ifndef KVRUN_DOT_H
#define KVRUN_DOT_H

#include "simd/simd.h"

/* Adds the products of a block's 4- or 2-bit codes with input rows r, integers all, to dot[r]. */
KV_INLINE void dot_add(const int bits, const int lines, const int rows, const uint8_t *codes, const int8_t *x, int64_t ld,
                       d4 *dot)
{
    KV_LINES
    for (int l = 0; l < lines; l++) {
        vw line = vw_load(codes + 64 * l);
        kv_ahead(codes + 64 * l);
        KV_UNROLL
        for (int f = 0; f < 8 / bits; f++) {
            vw field = vw_field(line, f * bits, (1 << bits) - 1);
            KV_UNROLL
            for (int r = 0; r < rows; r++)
                dot[r] = d4_dot(dot[r], field, x + r * ld + 4 * (f * lines + l));
        }
    }
}

/* sum[r] = the exact dot products of one block with input row r, as floats. 8-bit codes are stored with an offset of
 * 128, which is not part of the result; x_sum has the sums of the rows' codes. */
KV_INLINE void dot_codes(const int bits, const int lines, const int rows, const uint8_t *codes, const int8_t *x,
                         int64_t ld, const int32_t *x_sum, int64_t ld_sum, vf *sum)
{
    if (bits == 8) {
        d8 dot[KV_ROWS];
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            dot[r] = d8_zero();
        KV_LINES
        for (int l = 0; l < lines; l++) {
            vw line = vw_load(codes + 64 * l);
            kv_ahead(codes + 64 * l);
            KV_UNROLL
            for (int r = 0; r < rows; r++)
                dot[r] = d8_dot(dot[r], line, x + r * ld + 4 * l);
        }
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            sum[r] = d8_float(dot[r], x_sum[r * ld_sum]);
    } else {
        d4 dot[KV_ROWS];
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            dot[r] = d4_zero();
        dot_add(bits, lines, rows, codes, x, ld, dot);
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            sum[r] = d4_float(dot[r]);
    }
}

/* 256 times the dot products of a block of 32 with row x, plus those with row y. sum: 256 times the sum of x plus that
 * of y. Integers below 2^28. */
KV_INLINE vf dot_two(const int bits, const uint8_t *codes, const int8_t *x, const int8_t *y, int32_t sum)
{
    if (bits == 8) {
        d8 a = d8_zero(), b = d8_zero();
        KV_UNROLL
        for (int l = 0; l < 8; l++) {
            vw line = vw_load(codes + 64 * l);
            kv_ahead(codes + 64 * l);
            a = d8_dot(a, line, x + 4 * l);
            b = d8_dot(b, line, y + 4 * l);
        }
        return d8_two(a, b, sum);
    }
    d4 a = d4_zero(), b = d4_zero();
    KV_UNROLL
    for (int l = 0; l < 4; l++) {
        vw line = vw_load(codes + 64 * l);
        kv_ahead(codes + 64 * l);
        KV_UNROLL
        for (int f = 0; f < 2; f++) {
            vw field = vw_field(line, 4 * f, 15);
            a = d4_dot(a, field, x + 4 * (4 * f + l));
            b = d4_dot(b, field, y + 4 * (4 * f + l));
        }
    }
    return d4_two(a, b);
}

#endif
