/* Cache formats q8, q4, q2: asymmetric codes, K per channel over the tile's 64 tokens, V per token over groups of at
 * most 64 channels (as KIVI, arXiv 2402.02750, found best), V after a Hadamard transform.
 *
 * A tile's K is four panels of 16 tokens, each `head_pad` channels deep; V is head_pad / 16 panels of 16 channels, each
 * 64 tokens deep; both in the blocks of dot.h, followed by their parameters:
 *
 *   K  float16 scale [head_pad], float16 minimum [head_pad]
 *   V  for each group of 64 channels: float16 scale [64 tokens], float16 minimum [64 tokens]
 *
 * The scales are folded into the queries (K) or the softmax weights (V), which are then rounded to int8 in blocks of 32;
 * the minima become one constant a row. What remains is a product of codes and int8. */
#include "dot.h"
#include "f16.h"

enum { GROUP = 64, MAX_DEPTH = KV_MAX_HEAD_DIM };

static int64_t n_groups(int64_t head_dim) { return (head_dim + GROUP - 1) / GROUP; }
static int64_t code_bytes(int bits, int64_t head_dim) { return KV_TILE * kv_head_pad(head_dim) * bits / 8; }
static int64_t k_bytes(int bits, int64_t head_dim) { return code_bytes(bits, head_dim) + 4 * kv_head_pad(head_dim); }
static int64_t v_bytes(int bits, int64_t head_dim)
{
    return code_bytes(bits, head_dim) + n_groups(head_dim) * 4 * KV_TILE;
}

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

static void pack_k(int bits, const float *k, int64_t head_dim, uint8_t *tile)
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

static void pack_v(int bits, const float *v, int64_t head_dim, uint8_t *tile)
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

/* Products */

/* A few rows of inputs, folded and rounded. */
typedef struct {
    int8_t q[KV_ROWS * MAX_DEPTH];
    float scale[KV_ROWS * MAX_DEPTH / KV_BLOCK];
    int32_t sum[KV_ROWS * MAX_DEPTH / KV_BLOCK];
    float constant[KV_ROWS];
#ifdef KV_WIDE
    int16_t wide[KV_ROWS * MAX_DEPTH / 2];      /* the two planes of q joined */
#endif
} folded;

void KV_NAME(kv_quantize_input)(const float *x, int64_t n, int64_t planes, int8_t *q, float *scale, int32_t *sum);

/* Row r: x * scale as int8, and the constant sum of x * minimum (plus the offset of 8-bit codes). */
static void fold(int bits, int planes, const float *x, int64_t n, int64_t depth, const uint16_t *scale,
                    const uint16_t *minimum, folded *f, int64_t r)
{
    int64_t blocks = (depth + KV_BLOCK - 1) / KV_BLOCK;
    float w[MAX_DEPTH];
    vf constant = vf_zero();
#ifdef KV_WIDE
    const float offset = 0;
    (void)bits;
#else
    const float offset = bits == 8 ? 128 : 0; /* which dot_codes leaves out */
#endif
    for (int64_t i = 0; i < depth; i += 16) {
        vf v = i + 16 <= n ? vf_load(x + i) : vf_load_part(x + i, n > i ? n - i : 0);
        vf scaled = vf_mul(v, vf_load_f16(scale + i));
        vf_store(w + i, scaled);
        constant = vf_fma(v, vf_load_f16(minimum + i), constant);
        constant = vf_fma(scaled, vf_set1(offset), constant);
    }
    f->constant[r] = vf_sum(constant);
    KV_NAME(kv_quantize_input)(w, depth, planes, f->q + r * planes * blocks * KV_BLOCK, f->scale + r * planes * blocks,
                               f->sum + r * planes * blocks);
#ifdef KV_WIDE
    if (planes == 2)
        d16_join(f->q + r * 2 * blocks * KV_BLOCK, f->q + (r * 2 + 1) * blocks * KV_BLOCK, blocks * KV_BLOCK,
                 f->wide + r * blocks * KV_BLOCK);
#endif
}

/* One panel for a few rows of `planes` planes each: out[r][ld] = (or +=) the 16 lanes' products, constant included. */
typedef void (*panel_fn)(const uint8_t *panel, int64_t depth, const folded *f, float *out, int64_t ld, int add);

KV_INLINE void panel_rows(const int bits, const int planes, const int rows, const uint8_t *panel, int64_t depth,
                          const folded *f, float *out, int64_t ld_out, int add)
{
    const int64_t blocks = (depth + KV_BLOCK - 1) / KV_BLOCK, ld = blocks * KV_BLOCK;
    vf sum[KV_ROWS], dot[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows * planes; r++)
        sum[r] = vf_zero();
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *codes = panel + 16 * b * KV_BLOCK * bits / 8;
        int lines = depth - b * KV_BLOCK >= KV_BLOCK ? bits : bits / 2;
        dot_codes(bits, lines, rows * planes, codes, f->q + b * KV_BLOCK, ld, f->sum + b, blocks, dot);
        KV_UNROLL
        for (int r = 0; r < rows * planes; r++)
            sum[r] = vf_fma(dot[r], vf_set1(f->scale[r * blocks + b]), sum[r]);
    }
    KV_UNROLL
    for (int r = 0; r < rows; r++) {
        vf total = vf_add(planes == 2 ? vf_add(sum[2 * r], sum[2 * r + 1]) : sum[r], vf_set1(f->constant[r]));
        vf_store(out + r * ld_out, add ? vf_add(vf_load(out + r * ld_out), total) : total);
    }
}

#ifdef KV_WIDE
/* The same for 8 bits, with the planes joined. */
KV_INLINE void panel_rows_wide(const int rows, const uint8_t *panel, int64_t depth, const folded *f, float *out,
                               int64_t ld_out, int add)
{
    const int64_t blocks = (depth + KV_BLOCK - 1) / KV_BLOCK;
    vf sum[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        sum[r] = add ? vf_load(out + r * ld_out) : vf_zero();
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *codes = panel + 16 * b * KV_BLOCK;
        int lines = depth - b * KV_BLOCK >= KV_BLOCK ? 8 : 4;
        d16 dot[KV_ROWS];
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            dot[r] = d16_zero();
        KV_NO_UNROLL
        for (int l = 0; l < lines; l++) {
            __m256i w[4];
            d16_load(w, codes + 64 * l);
            KV_UNROLL
            for (int r = 0; r < rows; r++)
                dot[r] = d16_dot(dot[r], w, f->wide + (r * blocks + b) * KV_BLOCK + 4 * l);
        }
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            sum[r] = vf_fma(d16_float(dot[r]), vf_set1(f->scale[(2 * r + 1) * blocks + b]), sum[r]);
    }
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        vf_store(out + r * ld_out, vf_add(sum[r], vf_set1(f->constant[r])));
}
#endif

/* How a number of bits is multiplied: q8 takes inputs of 16 bits, in two planes, so as not to lose what it kept. */
typedef struct {
    int bits, planes, most;
    panel_fn panels[5];     /* by number of rows, up to `most` */
} product;

#define KV_PANEL_FN(BITS, PLANES, ROWS)                                                                            \
    static void panel_##BITS##_##ROWS(const uint8_t *panel, int64_t depth, const folded *f, float *out, int64_t ld,\
                                      int add)                                                                     \
    {                                                                                                              \
        panel_rows(BITS, PLANES, ROWS, panel, depth, f, out, ld, add);                                             \
    }

#ifdef KV_WIDE
static void panel_8_1(const uint8_t *panel, int64_t depth, const folded *f, float *out, int64_t ld, int add)
{
    panel_rows_wide(1, panel, depth, f, out, ld, add);
}
static void panel_8_2(const uint8_t *panel, int64_t depth, const folded *f, float *out, int64_t ld, int add)
{
    panel_rows_wide(2, panel, depth, f, out, ld, add);
}
#else
KV_PANEL_FN(8, 2, 1)
KV_PANEL_FN(8, 2, 2)
#endif
KV_PANEL_FN(4, 1, 1)
KV_PANEL_FN(4, 1, 2)
KV_PANEL_FN(4, 1, 3)
KV_PANEL_FN(4, 1, 4)
KV_PANEL_FN(2, 1, 1)
KV_PANEL_FN(2, 1, 2)
KV_PANEL_FN(2, 1, 3)
KV_PANEL_FN(2, 1, 4)
static const product product_8 = {8, 2, 2, {NULL, panel_8_1, panel_8_2}};
static const product product_4 = {4, 1, 4, {NULL, panel_4_1, panel_4_2, panel_4_3, panel_4_4}};
static const product product_2 = {2, 1, 4, {NULL, panel_2_1, panel_2_2, panel_2_3, panel_2_4}};

static void k_dot(const product *by, const uint8_t *tile, int64_t head_dim, const float *q, int64_t ld_q, int64_t rows,
                  int64_t lanes, float *scores)
{
    int64_t depth = kv_head_pad(head_dim), panel = code_bytes(by->bits, head_dim) / 4;
    const uint16_t *scale = (const uint16_t *)(tile + code_bytes(by->bits, head_dim));
    folded f;
    for (int64_t done = 0, some; done < rows; done += some) {
        some = rows - done < by->most ? rows - done : by->most;
        for (int64_t r = 0; r < some; r++)
            fold(by->bits, by->planes, q + (done + r) * ld_q, head_dim, depth, scale, scale + depth, &f, r);
        for (int64_t p = 0; p < lanes / 16; p++)
            by->panels[some](tile + p * panel, depth, &f, scores + done * KV_TILE + 16 * p, KV_TILE, 0);
    }
}

static void v_accumulate(const product *by, const uint8_t *tile, int64_t head_dim, const float *p, int64_t rows, float *acc)
{
    int64_t width = kv_head_pad(head_dim), panel = 16 * KV_TILE * by->bits / 8;
    folded f;
    for (int64_t done = 0, some; done < rows; done += some) {
        const uint16_t *scale = (const uint16_t *)(tile + code_bytes(by->bits, head_dim));
        some = rows - done < by->most ? rows - done : by->most;
        for (int64_t start = 0; start < width; start += GROUP, scale += 2 * KV_TILE) {
            for (int64_t r = 0; r < some; r++)
                fold(by->bits, by->planes, p + (done + r) * KV_TILE, KV_TILE, KV_TILE, scale, scale + KV_TILE, &f, r);
            for (int64_t c = start; c < width && c < start + GROUP; c += 16)
                by->panels[some](tile + c / 16 * panel, KV_TILE, &f, acc + done * width + c, width, 1);
        }
    }
}

/* One row of the table of formats, all its functions for `BITS`. */
#define KV_QUANTIZED(NAME, BITS, UNPACK)                                                                               \
    static int64_t NAME##_k_bytes(int64_t head_dim) { return k_bytes(BITS, head_dim); }                                \
    static int64_t NAME##_v_bytes(int64_t head_dim) { return v_bytes(BITS, head_dim); }                                \
    static void NAME##_pack_k(const float *k, int64_t head_dim, void *tile) { pack_k(BITS, k, head_dim, tile); }       \
    static void NAME##_pack_v(const float *v, int64_t head_dim, void *tile) { pack_v(BITS, v, head_dim, tile); }       \
    static void NAME##_unpack_k(const void *tile, int64_t head_dim, float *k) { unpack_k(BITS, tile, head_dim, k); }   \
    static void NAME##_unpack_v(const void *tile, int64_t head_dim, float *v) { unpack_v(BITS, tile, head_dim, v); }   \
    static void NAME##_k_dot(const void *tile, int64_t stride, int64_t head_dim, const float *q, int64_t ld_q,         \
                             int64_t rows, int64_t lanes, float *scores)                                               \
    {                                                                                                                  \
        (void)stride;                                                                                                  \
        k_dot(&product_##BITS, tile, head_dim, q, ld_q, rows, lanes, scores);                                             \
    }                                                                                                                  \
    static void NAME##_v_accumulate(const void *tile, int64_t head_dim, const float *p, int64_t rows, int64_t tokens,  \
                                    float *acc)                                                                        \
    {                                                                                                                  \
        (void)tokens;                                                                                                  \
        v_accumulate(&product_##BITS, tile, head_dim, p, rows, acc);                                                             \
    }                                                                                                                  \
    static const kv_format NAME = {                                                                                    \
        #NAME, BITS + 0.5, 1, UNPACK, NAME##_k_bytes, NAME##_v_bytes, NAME##_pack_k, NAME##_pack_v, NAME##_unpack_k,           \
        NAME##_unpack_v, NULL, NULL, NAME##_k_dot, NAME##_v_accumulate,                                                \
    };

#ifdef KV_WIDE
KV_QUANTIZED(q8, 8, 12)
#else
KV_QUANTIZED(q8, 8, 0)
#endif
KV_QUANTIZED(q4, 4, 0)
KV_QUANTIZED(q2, 2, 0)

void KV_NAME(kv_fill_quantized)(kv_kernels *table);
void KV_NAME(kv_fill_quantized)(kv_kernels *table)
{
    table->format[KV_FORMAT_Q8] = q8;
    table->format[KV_FORMAT_Q4] = q4;
    table->format[KV_FORMAT_Q2] = q2;
}
