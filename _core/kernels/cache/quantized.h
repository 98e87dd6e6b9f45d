/* Cache formats q8, q4, q2: asymmetric codes, K per channel over the tile's 64 tokens, V per token over groups of at
 * most 64 channels (as KIVI, arXiv 2402.02750, found best), V after a Hadamard transform.
 *
 * A tile's K is four panels of 16 tokens, each `head_pad` channels deep; V is head_pad / 16 panels of 16 channels, each
 * 64 tokens deep; both in the blocks of dot.h, followed by their parameters:
 *
 *   K  float16 scale [head_pad], float16 minimum [head_pad]
 *   V  for each group of 64 channels: float16 scale [64 tokens], float16 minimum [64 tokens] */
#ifndef KVRUN_TILE_H
#define KVRUN_TILE_H

#include "simd/simd.h"

enum { GROUP = 64 };

static inline int64_t n_groups(int64_t head_dim) { return (head_dim + GROUP - 1) / GROUP; }
static inline int64_t code_bytes(int bits, int64_t head_dim) { return KV_TILE * kv_head_pad(head_dim) * bits / 8; }
static inline int64_t k_bytes(int bits, int64_t head_dim)
{
    return code_bytes(bits, head_dim) + 4 * kv_head_pad(head_dim);
}
static inline int64_t v_bytes(int bits, int64_t head_dim)
{
    return code_bytes(bits, head_dim) + n_groups(head_dim) * 4 * KV_TILE;
}

/* Between float tiles, K [head_dim][64] and V [64][head_pad], and tiles of `bits` (8, 4 or 2). */
void KV_NAME(kv_pack_k)(int bits, const float *k, int64_t head_dim, uint8_t *tile);
void KV_NAME(kv_pack_v)(int bits, const float *v, int64_t head_dim, uint8_t *tile);
void KV_NAME(kv_unpack_k)(int bits, const uint8_t *tile, int64_t head_dim, float *k);
void KV_NAME(kv_unpack_v)(int bits, const uint8_t *tile, int64_t head_dim, float *v);

#endif
