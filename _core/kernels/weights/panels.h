/* The loops of a matrix product of a block type. Panels outside, inputs inside: a panel is read from memory once for all
 * tokens, and up to KV_ROWS rows of the input, tokens or planes of tokens, share each unpacking of its lines. */
#ifndef KVRUN_PANELS_H
#define KVRUN_PANELS_H

#include "simd/simd.h"

/* Defines matmul_NAME for a panel of BYTES bytes (with `in` at hand), from
 *   ROWS(type, rows, planes, panel, in, first, out, ld_out, add)   for rows from `first` on
 *   TOKEN(type, panel, in, token, out, add)                        for one token in two planes */
#define KV_MATMUL(NAME, TYPE, BYTES, ROWS, TOKEN)                                                                      \
    static void matmul_##NAME(const uint8_t *panels, int64_t n_panels, int64_t cols, const kv_input *in,               \
                              int64_t n_tokens, float *out, int64_t ld_out, int add)                                   \
    {                                                                                                                  \
        const int64_t bytes = (BYTES);                                                                                 \
        (void)cols;                                                                                                    \
        for (int64_t p = 0; p < n_panels; p++, panels += bytes, out += KV_PANEL) {                                     \
            int64_t t = 0;                                                                                             \
            if (in->planes == 2) {                                                                                     \
                for (; t + KV_ROWS / 2 <= n_tokens; t += KV_ROWS / 2)                                                  \
                    ROWS(TYPE, KV_ROWS, 2, panels, in, 2 * t, out + t * ld_out, ld_out, add);                          \
                for (; t < n_tokens; t++)                                                                              \
                    TOKEN(TYPE, panels, in, t, out + t * ld_out, add);                                                 \
            } else {                                                                                                   \
                for (; t + KV_ROWS <= n_tokens; t += KV_ROWS)                                                          \
                    ROWS(TYPE, KV_ROWS, 1, panels, in, t, out + t * ld_out, ld_out, add);                              \
                for (; t < n_tokens; t++)                                                                              \
                    ROWS(TYPE, 1, 1, panels, in, t, out + t * ld_out, ld_out, add);                                    \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
