/* Tiles of formats q8, q4, q2: choosing codes, and back to floats.
 *
 * K is packed channel by channel, V token by token: both are rows of numbers, 16 lanes of a panel side by side, with a
 * range to each row. So one routine packs blocks of 32 rows of either, four rows to a line of codes at a time. */
#include "cache/quantized.h"
#include "f16.h"

enum { LANES = 16, PANELS = KV_TILE / LANES };

/* A block of up to 32 rows of n <= 64 numbers, in whole panels: their padding repeats the row's first number. */
typedef struct {
    const float *x;         /* [rows][ld] */
    int64_t ld;
    int rows, n, panels;
    float low[KV_BLOCK], high[KV_BLOCK];            /* extremes of each row */
    float minimum[KV_BLOCK], inverse[KV_BLOCK];     /* as stored; 1 / scale, 0 for a scale of 0 */
} block;

/* Within float16; NaN stays what it is. */
KV_INLINE vf bounded(vf x) { return vf_min(vf_set1(65504), vf_max(vf_set1(-65504), x)); }

static void find_extremes(block *b)
{
    for (int r = 0; r < b->rows; r += 4) {
        vf minus[4], high[4];
        KV_UNROLL
        for (int i = 0; i < 4; i++) {
            const float *x = b->x + (r + i) * b->ld;
            vf low = vf_load(x);
            high[i] = low;
            for (int p = 1; p < b->panels; p++) {
                vf v = vf_load(x + p * LANES);
                low = vf_min(v, low);
                high[i] = vf_max(v, high[i]);
            }
            minus[i] = vf_sub(vf_zero(), low);
        }
        f4_store(b->high + r, vf_top4(high));
        f4_store(b->low + r, 0 - vf_top4(minus));
    }
}

/* Rounds the ranges of 16 rows to the float16 that will be stored, so that codes are chosen for the very values they
 * will decode to. */
static void store_ranges(block *b, int first, vf scale, vf minimum, uint16_t *scales, uint16_t *minima)
{
    vf_store_f16(scales + first, bounded(scale));
    vf_store_f16(minima + first, bounded(minimum));
    scale = vf_load_f16(scales + first);
    vf_store(b->minimum + first, vf_load_f16(minima + first));
    vf_store(b->inverse + first, vf_pick(scale, vf_zero(), vf_div(vf_set1(1), scale), vf_zero()));
}

/* At 2 bits the extremes waste codes on outliers: the range of least squared error is searched, for 16 rows at once.
 * Each row is rounded to int8 between its extremes, which is precise enough to choose among four codes. Clipped ranges
 * are tried; for the codes that each gives, regression finds the range that fits best; and the best of these is
 * improved by doing so again. */
typedef struct {
    uint8_t y[KV_TILE * LANES];     /* lines of int8 [16 rows][4]; padding is -128, above no threshold */
    vf n, sum;                      /* numbers of a row, and their sum */
    int lines;
} search;

/* A range whose codes stand for origin + code * step; what it explains of the variance. */
typedef struct { vf step, origin, gain; } range;

/* Codes from `code` on are given above this. */
KV_INLINE vw threshold(range r, float code)
{
    vf t = vf_sub(vf_fma(r.step, vf_set1(code - 0.5f), r.origin), vf_set1(0.5f)); /* y > t: y > floor(t) */
    return vw_fill(vf_min(vf_max(t, vf_set1(-128)), vf_set1(127)));
}

/* The range that fits the codes of r best, by linear regression of y on the codes. */
static range regression(const search *s, range r)
{
    vw t1 = threshold(r, 1), t2 = threshold(r, 2), t3 = threshold(r, 3);
    vw zero = vw_fill(vf_zero()), ones = vw_fill(vf_set1(1));
    vs sq = vs_zero(), sqq = vs_zero(), sqy = vs_zero();
    for (int l = 0; l < s->lines; l++) {
        vw y = vw_load(s->y + 64 * l), q = vw_count(vw_count(vw_count(zero, y, t1), y, t2), y, t3);
        sq = vs_dot(sq, q, ones);
        sqq = vs_dot(sqq, q, q);
        sqy = vs_dot(sqy, q, y);
    }
    vf Q = vs_float(sq), d = vf_sub(vf_mul(s->n, vs_float(sqq)), vf_mul(Q, Q)); /* whole numbers, exact */
    vf cov = vf_sub(vf_mul(s->n, vs_float(sqy)), vf_mul(Q, s->sum));
    r.step = vf_div(cov, vf_max(d, vf_set1(1)));
    r.origin = vf_div(vf_sub(s->sum, vf_mul(r.step, Q)), s->n);
    r.gain = vf_mul(r.step, cov);
    return r;
}

KV_INLINE range better(range a, range b)
{
    return (range){vf_pick(b.gain, a.gain, b.step, a.step), vf_pick(b.gain, a.gain, b.origin, a.origin),
                   vf_max(a.gain, b.gain)};
}

static void least_squares(const search *s, vf *step, vf *origin)
{
    static const float clips[][2] = {{0, 1}, {.16f, .84f}, {.08f, .76f}, {.24f, .92f}, {.08f, .84f}, {.16f, .92f},
                                     {.16f, 1}, {0, .84f}, {.24f, .84f}, {.16f, .76f}};
    range best = {vf_zero(), vf_zero(), vf_set1(-1)}, r;
    for (size_t i = 0; i < sizeof clips / sizeof clips[0]; i++) {
        r.step = vf_set1((clips[i][1] - clips[i][0]) * 255 / 3);
        r.origin = vf_set1(clips[i][0] * 255 - 128);
        best = better(best, regression(s, r));
    }
    for (int again = 0; again < 2; again++)
        best = better(best, regression(s, best));
    *step = best.step;
    *origin = best.origin;
}

/* Ranges of 16 rows of a block. */
static void search_ranges(const block *b, int first, vf *scale, vf *minimum)
{
    search s;
    int8_t rows[LANES][KV_TILE];
    float bottom[LANES], inverse[LANES];
    vf low = bounded(vf_load(b->low + first)), high = bounded(vf_load(b->high + first));
    vf unit = vf_div(vf_sub(high, low), vf_set1(255)), offset = vf_set1(128);
    vf_store(bottom, low);
    vf_store(inverse, vf_pick(unit, vf_zero(), vf_div(vf_set1(1), unit), vf_zero()));
    for (int r = 0; r < LANES; r++) {
        const float *x = b->x + (first + r) * b->ld;
        for (int p = 0; p < b->panels; p++) {
            vf y = vf_mul(vf_sub(vf_load(x + p * LANES), vf_set1(bottom[r])), vf_set1(inverse[r]));
            y = vf_min(vf_max(vf_sub(y, offset), vf_set1(-128)), vf_set1(127));
            vf_store_i8(rows[r] + p * LANES, y);
        }
        memset(rows[r] + b->n, -128, (size_t)(b->panels * LANES - b->n));
    }
    s.lines = b->panels * 4;
    vs sum = vs_zero();
    for (int l = 0; l < s.lines; l++) {
        for (int r = 0; r < LANES; r++)
            memcpy(s.y + 64 * l + 4 * r, rows[r] + 4 * l, 4);
        sum = vs_dot(sum, vw_fill(vf_set1(1)), vw_load(s.y + 64 * l));
    }
    s.n = vf_set1((float)b->n);
    s.sum = vf_add(vs_float(sum), vf_set1(128 * (float)(b->panels * LANES - b->n)));
    vf step, origin;
    least_squares(&s, &step, &origin);
    *scale = vf_mul(step, unit);
    *minimum = vf_fma(vf_add(origin, offset), unit, low);
}

/* One line's four rows: lanes x rows of codes up to `top`. */
KV_INLINE vw codes_of(const block *b, const float *x, int row, vf top)
{
    vf q[4];
    KV_UNROLL
    for (int i = 0; i < 4; i++) {
        vf v = vf_sub(vf_load(x + (row + i) * b->ld), vf_set1(b->minimum[row + i]));
        q[i] = vf_min(vf_max(vf_mul(v, vf_set1(b->inverse[row + i])), vf_zero()), top);
    }
    return vw_pack(q[0], q[1], q[2], q[3]);
}

/* Codes of a block to `panels` panels, their ranges to scales and minima [rows]. */
KV_INLINE void pack_block(const int bits, block *b, uint8_t *to, int64_t panel, uint16_t *scales, uint16_t *minima)
{
    const int fields = 8 / bits, lines = b->rows * bits / 32;
    const float most = (float)((1 << bits) - 1);
    find_extremes(b);
    for (int first = 0; first < b->rows; first += LANES) {
        vf minimum = vf_load(b->low + first), scale = vf_div(vf_sub(vf_load(b->high + first), minimum), vf_set1(most));
        if (bits == 2)
            search_ranges(b, first, &scale, &minimum);
        store_ranges(b, first, scale, minimum, scales, minima);
    }
    float tops[LANES];
    vf_store(tops, vf_set1(most));
    for (int p = 0; p < b->panels; p++, to += panel) {
        int n = b->n - p * LANES;
        vf top = n < LANES ? vf_load_part(tops, n) : vf_set1(most); /* padding has code 0 */
        for (int l = 0; l < lines; l++) {
            vw line = codes_of(b, b->x + p * LANES, 4 * l, top);
            KV_UNROLL
            for (int f = 1; f < fields; f++)
                line = vw_or(line, codes_of(b, b->x + p * LANES, 4 * (f * lines + l), top), f * bits);
            vw_store(to + 64 * l, line);
        }
    }
}

KV_INLINE void pack_k(const int bits, const float *k, int64_t head_dim, uint8_t *tile)
{
    int64_t depth = kv_head_pad(head_dim), panel = code_bytes(bits, head_dim) / PANELS;
    uint16_t *scale = (uint16_t *)(tile + code_bytes(bits, head_dim)), *minimum = scale + depth;
    float copy[KV_BLOCK * KV_TILE];
    for (int64_t c = 0; c < depth; c += KV_BLOCK) {
        int64_t rows = depth - c < KV_BLOCK ? depth - c : KV_BLOCK, n = head_dim - c < rows ? head_dim - c : rows;
        block b = {.x = k + c * KV_TILE, .ld = KV_TILE, .rows = (int)rows, .n = KV_TILE, .panels = PANELS};
        if (n < rows) {
            memset(copy, 0, sizeof copy);
            memcpy(copy, b.x, (size_t)(n * KV_TILE) * sizeof(float));
            b.x = copy;
        }
        pack_block(bits, &b, tile + c * LANES * bits / 8, panel, scale + c, minimum + c);
    }
}

KV_INLINE void pack_v(const int bits, const float *v, int64_t head_dim, uint8_t *tile)
{
    int64_t width = kv_head_pad(head_dim), panel = LANES * KV_TILE * bits / 8;
    uint16_t *scale = (uint16_t *)(tile + code_bytes(bits, head_dim));
    float copy[KV_BLOCK * GROUP];
    for (int64_t start = 0; start < head_dim; start += GROUP, scale += 2 * KV_TILE) {
        int n = (int)(head_dim - start < GROUP ? head_dim - start : GROUP), panels = (n + LANES - 1) / LANES;
        for (int t = 0; t < KV_TILE; t += KV_BLOCK) {
            block b = {.x = v + t * width + start, .ld = width, .rows = KV_BLOCK, .n = n, .panels = panels};
            if (n % LANES) {
                for (int i = 0; i < KV_BLOCK * GROUP; i++)
                    copy[i] = b.x[i / GROUP * width + (i % GROUP < n ? i % GROUP : 0)];
                b.x = copy;
                b.ld = GROUP;
            }
            pack_block(bits, &b, tile + start / LANES * panel + t * LANES * bits / 8, panel, scale + t,
                       scale + KV_TILE + t);
        }
    }
}

/* One panel as floats: to[input * ld] = 16 lanes of code * scale + minimum, for the first `inputs` of `depth`. */
KV_INLINE void unpack_panel(const int bits, const uint8_t *panel, int64_t depth, int64_t inputs, const float *scale,
                            const float *minimum, float *to, int64_t ld)
{
    for (int64_t first = 0; first < inputs; first += KV_BLOCK, panel += LANES * KV_BLOCK * bits / 8) {
        int64_t lines = depth - first >= KV_BLOCK ? bits : bits / 2;
        for (int64_t l = 0; l < lines; l++) {
            vw line = vw_load(panel + 64 * l);
            KV_UNROLL
            for (int f = 0; f < 8 / bits; f++) {
                int64_t i = first + 4 * (f * lines + l);
                KV_UNROLL
                for (int j = 0; j < 4; j++)
                    if (i + j < inputs) {
                        vf q = vw_code(line, j, f * bits, (1 << bits) - 1);
                        vf_store(to + (i + j) * ld, vf_fma(q, vf_set1(scale[i + j]), vf_set1(minimum[i + j])));
                    }
            }
        }
    }
}

static void floats(const uint16_t *h, int64_t n, float *x)
{
    for (int64_t i = 0; i < n; i += LANES)
        vf_store(x + i, vf_load_f16(h + i));
}

KV_INLINE void unpack_k(const int bits, const uint8_t *tile, int64_t head_dim, float *k)
{
    int64_t depth = kv_head_pad(head_dim), panel = code_bytes(bits, head_dim) / PANELS;
    float params[2 * KV_MAX_HEAD_DIM];
    floats((const uint16_t *)(tile + code_bytes(bits, head_dim)), 2 * depth, params);
    for (int64_t t = 0; t < KV_TILE; t += LANES)
        unpack_panel(bits, tile + t / LANES * panel, depth, head_dim, params, params + depth, k + t, KV_TILE);
}

KV_INLINE void unpack_v(const int bits, const uint8_t *tile, int64_t head_dim, float *v)
{
    int64_t width = kv_head_pad(head_dim), panel = LANES * KV_TILE * bits / 8;
    const uint16_t *stored = (const uint16_t *)(tile + code_bytes(bits, head_dim));
    float params[2 * KV_TILE];
    for (int64_t c = 0; c < width; c += LANES) {
        if (c % GROUP == 0)
            floats(stored + c / GROUP * 2 * KV_TILE, 2 * KV_TILE, params);
        unpack_panel(bits, tile + c / LANES * panel, KV_TILE, KV_TILE, params, params + KV_TILE, v + c, width);
    }
    for (int64_t t = 0; t < KV_TILE && head_dim < width; t++) /* the padding has no codes of its own */
        memset(v + t * width + head_dim, 0, (size_t)(width - head_dim) * sizeof(float));
}

#define KV_TILE_FN(NAME, FROM, TO)                                                                                 \
    void KV_NAME(kv_##NAME)(int bits, const FROM *from, int64_t head_dim, TO *to)                                  \
    {                                                                                                              \
        switch (bits) {                                                                                            \
        case 8: NAME(8, from, head_dim, to); break;                                                                \
        case 4: NAME(4, from, head_dim, to); break;                                                                \
        case 2: NAME(2, from, head_dim, to); break;                                                                \
        }                                                                                                          \
    }

KV_TILE_FN(pack_k, float, uint8_t)
KV_TILE_FN(pack_v, float, uint8_t)
KV_TILE_FN(unpack_k, uint8_t, float)
KV_TILE_FN(unpack_v, uint8_t, float)
