/* The softmax step of attention, from the scores of a tile to weights. */
#include "simd/simd.h"

/* Lanes from n on as if they had been seen nowhere. */
static void hide(float *s, int64_t n, float with)
{
    for (int64_t i = n; i < KV_TILE; i++)
        s[i] = with;
}

/* Weights of one row in place; their sum, lane by lane. */
KV_INLINE vf weights(float *s, float m)
{
    vf top = vf_set1(m), sum = vf_zero();
    KV_UNROLL
    for (int64_t i = 0; i < KV_TILE; i += 16) {
        vf p = vf_exp2(vf_sub(vf_load(s + i), top));
        vf_store(s + i, p);
        sum = vf_add(sum, p);
    }
    return sum;
}

/* Up to four rows, so that their maxima and sums are found together. */
KV_INLINE void softmax_rows(float *scores, const int32_t *visible, int64_t rows, int64_t head_pad, float *m, float *l,
                            float *acc)
{
    vf four[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    f4 found;
    for (int64_t r = 0; r < rows; r++) {
        float *s = scores + r * KV_TILE;
        if (visible[r] < KV_TILE)
            hide(s, visible[r] > 0 ? visible[r] : 0, -INFINITY);
        four[r] = vf_max(vf_max(vf_load(s), vf_load(s + 16)), vf_max(vf_load(s + 32), vf_load(s + 48)));
    }
    found = vf_top4(four);
    for (int64_t r = 0; r < rows; r++) {
        float *s = scores + r * KV_TILE;
        if (found[r] > m[r]) {
            float shrink = exp2f(m[r] - found[r]); /* 0 for the first */
            l[r] *= shrink;
            for (int64_t i = 0; i < head_pad; i += 16)
                vf_store(acc + r * head_pad + i, vf_mul(vf_load(acc + r * head_pad + i), vf_set1(shrink)));
            m[r] = found[r];
        }
        if (visible[r] > 0)
            four[r] = weights(s, m[r]);
        else
            four[r] = vf_zero();
        if (visible[r] < KV_TILE)
            hide(s, visible[r] > 0 ? visible[r] : 0, 0);
    }
    found = vf_sum4(four);
    for (int64_t r = 0; r < rows; r++)
        l[r] += found[r];
}

static void softmax_step(float *scores, const int32_t *visible, int64_t rows, int64_t head_pad, float *m, float *l,
                         float *acc)
{
    for (int64_t r = 0; r < rows; r += 4)
        softmax_rows(scores + r * KV_TILE, visible + r, rows - r < 4 ? rows - r : 4, head_pad, m + r, l + r,
                     acc + r * head_pad);
}

void KV_NAME(kv_fill_softmax)(kv_kernels *table);
void KV_NAME(kv_fill_softmax)(kv_kernels *table) { table->softmax_step = softmax_step; }
