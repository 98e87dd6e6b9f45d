/* Tiles of formats q8, q4, q2: choosing codes, and back to floats. */
#include "tile.h"
#include "f16.h"

KV_INLINE float at_f16(const uint16_t *p, int64_t i) { return kv_f16_float(p[i]); }

/* Codes */

typedef struct { float scale, minimum; } range;

KV_INLINE float bounded(float x) { return x > 65504 ? 65504 : x < -65504 ? -65504 : x; }

/* Rounded to the float16 that will be stored, so that codes are chosen for the very values they will decode to. */
KV_INLINE range stored(float scale, float minimum)
{
    return (range){kv_f16_float(kv_float_f16(bounded(scale))), kv_f16_float(kv_float_f16(bounded(minimum)))};
}

KV_INLINE vf codes_of(vf x, range r, float top)
{
    vf q = vf_mul(vf_sub(x, vf_set1(r.minimum)), vf_set1(r.scale != 0 ? 1 / r.scale : 0));
    return vf_round(vf_min(vf_max(q, vf_zero()), vf_set1(top)));
}

/* x [64] of which n count (weight 1, the rest 0): the range between the extremes. */
static range extremes(const float *x, int64_t n, int bits)
{
    float low = x[0], high = x[0];
    for (int64_t i = 1; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    return stored((high - low) / (float)((1 << bits) - 1), low);
}

/* Squared error of a range, and the range that fits its codes best (linear regression of x on the codes). */
static float refit(const float *x, const float *weight, float top, range r, range *better)
{
    vf n = vf_zero(), sq = vf_zero(), sqq = vf_zero(), sx = vf_zero(), sqx = vf_zero(), error = vf_zero();
    for (int i = 0; i < 64; i += 16) {
        vf v = vf_load(x + i), w = vf_load(weight + i), q = codes_of(v, r, top), wq = vf_mul(w, q);
        vf e = vf_sub(v, vf_fma(q, vf_set1(r.scale), vf_set1(r.minimum)));
        error = vf_fma(vf_mul(w, e), e, error);
        n = vf_add(n, w);
        sq = vf_add(sq, wq);
        sqq = vf_fma(wq, q, sqq);
        sx = vf_fma(w, v, sx);
        sqx = vf_fma(wq, v, sqx);
    }
    float N = vf_sum(n), Q = vf_sum(sq), X = vf_sum(sx), d = N * vf_sum(sqq) - Q * Q;
    *better = r;
    if (d > 0) {
        float scale = (N * vf_sum(sqx) - Q * X) / d;
        *better = stored(scale, (X - scale * Q) / N);
    }
    return vf_sum(error);
}

/* At 2 bits the extremes waste codes on outliers: the range of least squared error is searched, from clipped ranges
 * improved by regression. */
static range least_squares(const float *x, const float *weight, int64_t n, int bits)
{
    range full = extremes(x, n, bits), best = full, r, next;
    float top = (float)((1 << bits) - 1), least = INFINITY;
    for (int clip = 0; clip < 6; clip++) {
        float cut = 0.06f * (float)clip * full.scale * top;
        r = stored(full.scale - 2 * cut / top, full.minimum + cut);
        for (int step = 0; step < 4; step++) {
            float error = refit(x, weight, top, r, &next);
            if (error < least) {
                least = error;
                best = r;
            }
            r = next;
        }
    }
    return best;
}

/* Codes of up to 64 numbers; scale and minimum as stored. */
static void quantize_line(int bits, const float *x, int64_t n, uint8_t *codes, uint16_t *scale, uint16_t *minimum)
{
    float line[64] = {0}, weight[64] = {0}, q[64];
    for (int64_t i = 0; i < n; i++) {
        line[i] = x[i];
        weight[i] = 1;
    }
    range r = bits == 2 ? least_squares(line, weight, n, bits) : extremes(line, n, bits);
    for (int i = 0; i < 64; i += 16)
        vf_store(q + i, codes_of(vf_load(line + i), r, (float)((1 << bits) - 1)));
    for (int64_t i = 0; i < 64; i++)
        codes[i] = i < n ? (uint8_t)q[i] : 0;
    *scale = kv_float_f16(r.scale);
    *minimum = kv_float_f16(r.minimum);
}

/* Byte and shift of the code of `input` in a panel of 16 lanes. */
KV_INLINE uint8_t *code_at(int bits, uint8_t *panel, int64_t depth, int64_t lane, int64_t input, int *shift)
{
    int64_t block = input / KV_BLOCK, left = depth - block * KV_BLOCK, size = left < KV_BLOCK ? left : KV_BLOCK;
    int64_t lines = size * bits / 32, quad = input % KV_BLOCK / 4;
    *shift = (int)(quad / lines) * bits;
    return panel + 16 * block * KV_BLOCK * bits / 8 + quad % lines * 64 + lane * 4 + input % 4;
}

void KV_NAME(kv_pack_k)(int bits, const float *k, int64_t head_dim, uint8_t *tile)
{
    int64_t depth = kv_head_pad(head_dim), panel = code_bytes(bits, head_dim) / 4;
    uint16_t *scale = (uint16_t *)(tile + code_bytes(bits, head_dim)), *minimum = scale + depth;
    uint8_t codes[KV_TILE];
    int shift;
    memset(tile, 0, (size_t)k_bytes(bits, head_dim));
    for (int64_t c = 0; c < head_dim; c++) {
        quantize_line(bits, k + c * KV_TILE, KV_TILE, codes, scale + c, minimum + c);
        for (int64_t t = 0; t < KV_TILE; t++) {
            uint8_t *to = code_at(bits, tile + t / 16 * panel, depth, t % 16, c, &shift);
            *to = (uint8_t)(*to | codes[t] << shift);
        }
    }
}

void KV_NAME(kv_pack_v)(int bits, const float *v, int64_t head_dim, uint8_t *tile)
{
    int64_t width = kv_head_pad(head_dim), panel = 16 * KV_TILE * bits / 8;
    uint16_t *scale = (uint16_t *)(tile + code_bytes(bits, head_dim));
    uint8_t codes[GROUP];
    int shift;
    memset(tile, 0, (size_t)v_bytes(bits, head_dim));
    for (int64_t start = 0; start < head_dim; start += GROUP, scale += 2 * KV_TILE) {
        int64_t n = head_dim - start < GROUP ? head_dim - start : GROUP;
        for (int64_t t = 0; t < KV_TILE; t++) {
            quantize_line(bits, v + t * width + start, n, codes, scale + t, scale + KV_TILE + t);
            for (int64_t c = 0; c < n; c++) {
                uint8_t *to = code_at(bits, tile + (start + c) / 16 * panel, KV_TILE, c % 16, t, &shift);
                *to = (uint8_t)(*to | codes[c] << shift);
            }
        }
    }
}

/* One panel as floats: to[input * ld] = 16 lanes of code * scale + minimum, for the first `inputs` of `depth`. */
KV_INLINE void unpack_panel(const int bits, const uint8_t *panel, int64_t depth, int64_t inputs, const uint16_t *scale,
                            const uint16_t *minimum, float *to, int64_t ld)
{
    for (int64_t first = 0; first < inputs; first += KV_BLOCK, panel += 16 * KV_BLOCK * bits / 8) {
        int64_t lines = depth - first >= KV_BLOCK ? bits : bits / 2;
        for (int64_t l = 0; l < lines; l++) {
            vw line = vw_load(panel + 64 * l);
            KV_UNROLL
            for (int code = 0; code < 32 / bits; code++) {
                int64_t i = first + 4 * (code / 4 * lines + l) + code % 4;
                if (i < inputs) {
                    vf q = vw_code(line, code % 4, code / 4 * bits, (1 << bits) - 1);
                    vf_store(to + i * ld, vf_fma(q, vf_set1(at_f16(scale, i)), vf_set1(at_f16(minimum, i))));
                }
            }
        }
    }
}

KV_INLINE void unpack_k(const int bits, const uint8_t *tile, int64_t head_dim, float *k)
{
    int64_t depth = kv_head_pad(head_dim), panel = code_bytes(bits, head_dim) / 4;
    const uint16_t *scale = (const uint16_t *)(tile + code_bytes(bits, head_dim));
    for (int64_t t = 0; t < KV_TILE; t += 16)
        unpack_panel(bits, tile + t / 16 * panel, depth, head_dim, scale, scale + depth, k + t, KV_TILE);
}

KV_INLINE void unpack_v(const int bits, const uint8_t *tile, int64_t head_dim, float *v)
{
    int64_t width = kv_head_pad(head_dim), panel = 16 * KV_TILE * bits / 8;
    const uint16_t *params = (const uint16_t *)(tile + code_bytes(bits, head_dim));
    for (int64_t c = 0; c < width; c += 16) {
        const uint16_t *scale = params + c / GROUP * 2 * KV_TILE;
        unpack_panel(bits, tile + c / 16 * panel, KV_TILE, KV_TILE, scale, scale + KV_TILE, v + c, width);
    }
    for (int64_t t = 0; t < KV_TILE && head_dim < width; t++) /* the padding has no codes of its own */
        memset(v + t * width + head_dim, 0, (size_t)(width - head_dim) * sizeof(float));
}

#define KV_UNPACK(SIDE)                                                                                \
    void KV_NAME(kv_unpack_##SIDE)(int bits, const uint8_t *tile, int64_t head_dim, float *to)         \
    {                                                                                                  \
        switch (bits) {                                                                                \
        case 8: unpack_##SIDE(8, tile, head_dim, to); break;                                           \
        case 4: unpack_##SIDE(4, tile, head_dim, to); break;                                           \
        case 2: unpack_##SIDE(2, tile, head_dim, to); break;                                           \
        }                                                                                              \
    }

KV_UNPACK(k)
KV_UNPACK(v)
