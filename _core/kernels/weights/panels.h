/* The loops of a matrix product of a type that takes int8 inputs. Panels outside, inputs inside: a panel is read from
 * memory once for all tokens, and up to KV_ROWS tokens in one plane, or KV_TOKENS in two, share each unpacking of its
 * lines. */
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
 *   ROWS(rows, panel, in, first, out, ld_out, add)       for tokens in one plane, from `first` on
 *   TOKENS(tokens, panel, in, first, out, ld_out, add)   for tokens in two planes
 * What a token gets is the same to the bit whatever the number of them. */
#define KV_MATMUL(NAME, BYTES, ROWS, TOKENS)                                                                           \
    void KV_NAME(kv_matmul_##NAME)(KV_MATMUL_ARGUMENTS)                                                                \
    {                                                                                                                  \
        const int64_t bytes = (BYTES);                                                                                 \
        for (int64_t p = 0; p < n_panels; p++, panels += bytes, out += KV_PANEL) {                                     \
            int64_t t = 0;                                                                                             \
            if (in->planes == 2) {                                                                                     \
                for (; t + KV_TOKENS <= n_tokens; t += KV_TOKENS)                                                      \
                    TOKENS(KV_TOKENS, panels, in, t, out + t * ld_out, ld_out, add);                                   \
                if (KV_TOKENS > 2 && t + 2 <= n_tokens) {                                                              \
                    TOKENS(2, panels, in, t, out + t * ld_out, ld_out, add);                                           \
                    t += 2;                                                                                            \
                }                                                                                                      \
                for (; t < n_tokens; t++)                                                                              \
                    TOKENS(1, panels, in, t, out + t * ld_out, ld_out, add);                                           \
            } else {                                                                                                   \
                for (; t + KV_ROWS <= n_tokens; t += KV_ROWS)                                                          \
                    ROWS(KV_ROWS, panels, in, t, out + t * ld_out, ld_out, add);                                       \
                for (; t < n_tokens; t++)                                                                              \
                    ROWS(1, panels, in, t, out + t * ld_out, ld_out, add);                                             \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
