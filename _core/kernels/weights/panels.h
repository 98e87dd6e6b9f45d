/* The loops of a matrix product of a type that takes int8 inputs. Panels outside, inputs inside: a panel is read from
 * memory once for all tokens, and up to KV_ROWS rows of the input, tokens or planes of tokens, share each unpacking of
 * its lines. */
#ifndef KVRUN_PANELS_H
#define KVRUN_PANELS_H

#include "simd/simd.h"

#define KV_MATMUL_ARGUMENTS                                                                                            \
    const uint8_t *panels, int64_t n_panels, int64_t cols, const kv_input *in, int64_t n_tokens, float *out,           \
        int64_t ld_out, int add

#define KV_DECLARE_MATMUL(NAME, name) void KV_NAME(kv_matmul_##name)(KV_MATMUL_ARGUMENTS);
KV_EACH_WEIGHT_TYPE(KV_DECLARE_MATMUL)
#undef KV_DECLARE_MATMUL

/* Defines the product of a type, whose panels have BYTES bytes (an expression of cols), from
 *   ROWS(rows, planes, panel, in, first, out, ld_out, add)   for rows from `first` on
 *   TOKEN(panel, in, token, out, add)                        for one token in two planes */
#define KV_MATMUL(NAME, BYTES, ROWS, TOKEN)                                                                            \
    void KV_NAME(kv_matmul_##NAME)(KV_MATMUL_ARGUMENTS)                                                                \
    {                                                                                                                  \
        const int64_t bytes = (BYTES);                                                                                 \
        for (int64_t p = 0; p < n_panels; p++, panels += bytes, out += KV_PANEL) {                                     \
            int64_t t = 0;                                                                                             \
            if (in->planes == 2) {                                                                                     \
                for (; t + KV_ROWS / 2 <= n_tokens; t += KV_ROWS / 2)                                                  \
                    ROWS(KV_ROWS, 2, panels, in, 2 * t, out + t * ld_out, ld_out, add);                                \
                for (; t < n_tokens; t++)                                                                              \
                    TOKEN(panels, in, t, out + t * ld_out, add);                                                       \
            } else {                                                                                                   \
                for (; t + KV_ROWS <= n_tokens; t += KV_ROWS)                                                          \
                    ROWS(KV_ROWS, 1, panels, in, t, out + t * ld_out, ld_out, add);                                    \
                for (; t < n_tokens; t++)                                                                              \
                    ROWS(1, 1, panels, in, t, out + t * ld_out, ld_out, add);                                          \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
