/* Products with tiles of cache formats q8, q4, q2 (tile.h).
 *
 * The scales are folded into the queries (K) or the softmax weights (V), which are then rounded to int8 in blocks of 32;
 * the minima become one constant a row. What remains is a product of codes and int8. */
#include "dot.h"
#include "f16.h"
#include "tile.h"

enum { MAX_DEPTH = KV_MAX_HEAD_DIM };

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
    static void NAME##_pack_k(const float *k, int64_t head_dim, void *tile)                                            \
    {                                                                                                                  \
        KV_NAME(kv_pack_k)(BITS, k, head_dim, tile);                                                                   \
    }                                                                                                                  \
    static void NAME##_pack_v(const float *v, int64_t head_dim, void *tile)                                            \
    {                                                                                                                  \
        KV_NAME(kv_pack_v)(BITS, v, head_dim, tile);                                                                   \
    }                                                                                                                  \
    static void NAME##_unpack_k(const void *tile, int64_t head_dim, float *k)                                          \
    {                                                                                                                  \
        KV_NAME(kv_unpack_k)(BITS, tile, head_dim, k);                                                                 \
    }                                                                                                                  \
    static void NAME##_unpack_v(const void *tile, int64_t head_dim, float *v)                                          \
    {                                                                                                                  \
        KV_NAME(kv_unpack_v)(BITS, tile, head_dim, v);                                                                 \
    }                                                                                                                  \
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
