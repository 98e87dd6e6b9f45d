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

/* Addresses of rows, in a register each: GCC would make them up anew, from fewer, for each of the rows' elements. */
KV_INLINE void rows_from(const int rows, const int8_t *x, int64_t ld, const int8_t **row)
{
    KV_UNROLL
    for (int r = 0; r < rows; r++) {
        row[r] = x;
        __asm__("" : "+r"(row[r]));
        x = row[r] + ld;
    }
}

/* Dot products of a block of 32 with tokens in two planes, exact: dot[t] = 256 times that with token t's first plane,
 * plus that with its second; integers below 2^28. x: the first token's block in both planes; ld: codes from a token to
 * the next. offset[t]: with 8 bits 128 times (256 times the sum of the first plane, plus that of the second). */
KV_INLINE void dot_two(const int bits, const int tokens, const uint8_t *codes, const int8_t *x, int64_t ld,
                       const int32_t *offset, vf *dot)
{
    const int8_t *row[KV_TOKENS];
    rows_from(tokens, x, ld, row);
    if (bits == 8) {
        d8 a[KV_TOKENS], b[KV_TOKENS];
        KV_UNROLL
        for (int t = 0; t < tokens; t++)
            a[t] = b[t] = d8_zero();
        KV_UNROLL
        for (int l = 0; l < 8; l++) {
            vw line = vw_load(codes + 64 * l);
            kv_ahead(codes + 64 * l);
            KV_UNROLL
            for (int t = 0; t < tokens; t++) {
                a[t] = d8_dot(a[t], line, row[t] + 4 * l);
                b[t] = d8_dot(b[t], line, row[t] + KV_BLOCK + 4 * l);
            }
        }
        KV_UNROLL
        for (int t = 0; t < tokens; t++)
            dot[t] = d8_two(a[t], b[t], offset[t]);
    } else {
        d4 a[KV_TOKENS], b[KV_TOKENS];
        KV_UNROLL
        for (int t = 0; t < tokens; t++)
            a[t] = b[t] = d4_zero();
        KV_UNROLL
        for (int l = 0; l < 4; l++) {
            vw line = vw_load(codes + 64 * l);
            kv_ahead(codes + 64 * l);
            KV_UNROLL
            for (int f = 0; f < 2; f++) {
                vw field = vw_field(line, 4 * f, 15);
                KV_UNROLL
                for (int t = 0; t < tokens; t++) {
                    a[t] = d4_dot(a[t], field, row[t] + 4 * (4 * f + l));
                    b[t] = d4_dot(b[t], field, row[t] + KV_BLOCK + 4 * (4 * f + l));
                }
            }
        }
        KV_UNROLL
        for (int t = 0; t < tokens; t++)
            dot[t] = d4_two(a[t], b[t]);
    }
}

#endif
