/* Super-blocks of 256 channels: sizes, and what kpack.c does for pack.c. */
#ifndef KVRUN_KPACK_H
#define KVRUN_KPACK_H

#include "kernels.h"

enum { Q4_K_BYTES = 144, Q6_K_BYTES = 210 }; /* GGML's, of one row */
enum { Q4_K_PACKED = 64 + 192 + 2048, Q6_K_PACKED = 256 + 3072 }; /* of 16 rows; q6_k without its d */

static inline int kv_is_super(int type) { return type == KV_Q4_K || type == KV_Q6_K; }

/* Where the pair of super-blocks that has s of q6_k starts in its panel. */
static inline int64_t kv_q6_k_pair(int64_t s) { return s / 2 * (64 + 2 * Q6_K_PACKED); }

static inline int64_t kv_super_panel_bytes(int type, int64_t supers)
{
    return type == KV_Q4_K ? supers * Q4_K_PACKED : (supers + 1) / 2 * 64 + supers * Q6_K_PACKED;
}

/* One row of a panel, which is all zeros where no row has been packed; raw rows are GGML's super-blocks. */
void kv_pack_super_row(int type, const uint8_t *raw, int64_t supers, int64_t r, uint8_t *panel);
void kv_unpack_super_row(int type, const uint8_t *panel, int64_t supers, int64_t r, float *x);
void kv_quantize_super_row(int type, const float *x, int64_t supers, uint8_t *raw);

#endif
