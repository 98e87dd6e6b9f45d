/* Products with tiles of cache formats q8, q4, q2 (cache/quantized.h).
 *
 * The scales are folded into the queries (K) or the softmax weights (V), which are then rounded; the minima become one
 * constant a row. What remains is a product of codes and small integers: int8 in blocks of 32 inputs for q4 and q2, 16
 * bits for q8, so as not to lose what it kept. */
#include "simd/dot.h"
#include "f16.h"
#include "cache/formats.h"
#include "cache/quantized.h"

enum { MAX_DEPTH = KV_MAX_HEAD_DIM, PLANES_8 = 2 };

/* Inputs that share a scale. At 2 bits the steps of the codes are far wider than those of the inputs. */
#define KV_SCALED(BITS) (BITS == 2 ? 2 * KV_BLOCK : KV_BLOCK)

/* A few rows of inputs, folded and rounded, from row to row [planes][blocks of KV_BLOCK], or WIDE_BLOCK where 16 bits
 * are multiplied at once. */
typedef struct {
    float scale[KV_ROWS * PLANES_8 * MAX_DEPTH / KV_BLOCK + 4];
    float constant[KV_ROWS > 4 ? KV_ROWS : 4];
    int32_t sum[KV_ROWS * PLANES_8 * MAX_DEPTH / KV_BLOCK];
    union {
        int8_t q[KV_ROWS * PLANES_8 * MAX_DEPTH + 8 * KV_BLOCK];
        int16_t wide[KV_ROWS * MAX_DEPTH];
    } in;
} folded;

void KV_NAME(kv_quantize_planes)(const float *x, int64_t n, int64_t planes, int8_t *q, float *scale, int32_t *sum,
                                 int32_t *offset);

/* Scales folded in: w[r][ld] = x[r] * scale, zero from the n inputs to the end of the last block; and the constants,
 * the sums of x[r] * (minimum + offset * scale), for an offset that the codes are counted from. */
KV_INLINE void scaled(const int rows, const float offset, const float *x, int64_t ld_x, int64_t n, int64_t depth,
                      const uint16_t *scale, const uint16_t *minimum, float *w, int64_t ld, float *constant)
{
    vf sum[KV_ROWS > 4 ? KV_ROWS : 4];
    KV_UNROLL
    for (int r = 0; r < (KV_ROWS > 4 ? KV_ROWS : 4); r++)
        sum[r] = vf_zero();
    for (int64_t i = 0; i < depth; i += 16) {
        kv_ahead(scale + i);
        kv_ahead(minimum + i);
        vf by = vf_load_f16(scale + i), least = vf_fma(by, vf_set1(offset), vf_load_f16(minimum + i));
        KV_UNROLL
        for (int r = 0; r < rows; r++) {
            vf v = i + 16 <= n ? vf_load(x + r * ld_x + i) : vf_load_part(x + r * ld_x + i, n - i);
            vf_store(w + r * ld + i, vf_mul(v, by));
            sum[r] = vf_fma(v, least, sum[r]);
        }
    }
    for (int64_t i = depth; i < ld; i += 16)
        for (int r = 0; r < rows; r++)
            vf_store(w + r * ld + i, vf_zero());
    KV_UNROLL
    for (int r = 0; r < rows; r += 4)
        f4_store(constant + r, vf_sum4(sum + r));
}

/* The largest |w| of n, a multiple of 32, lane by lane. */
KV_INLINE vf largest(const float *w, const int n)
{
    vf top = vf_max(vf_abs(vf_load(w)), vf_abs(vf_load(w + 16)));
    KV_UNROLL
    for (int i = 32; i < n; i += 32)
        top = vf_max(top, vf_max(vf_abs(vf_load(w + i)), vf_abs(vf_load(w + i + 16))));
    return top;
}

/* `blocks` blocks of `block` numbers as int8, scale = max|w| / 127; total is what each adds up to once rounded. There
 * is room for whole fours of blocks. */
KV_INLINE void rounded(const int block, int64_t blocks, const float *w, int8_t *q, float *scale, float *total)
{
    for (int64_t b = 0; b < blocks; b += 4, w += 4 * block, q += 4 * block) {
        vf top[4];
        KV_UNROLL
        for (int i = 0; i < 4; i++)
            top[i] = largest(w + i * block, block);
        f4 most = vf_top4(top), sum = vf_round4(w, block, 127 / (most + 1e-30f), q); /* finite for a block of zeros */
        most *= 1.0f / 127;
        f4_store(scale + b, most);
        f4_store(total + b, most * sum);
    }
}

/* Row r of w [ld], in 16 bits; KV_OFFSET_8 is what dot products of such codes leave out of them. */
#ifdef KV_WIDE
#define KV_OFFSET_8 0
/* Inputs that share a scale, and the largest of them: 256 products of 255 and 32512 fit into 31 bits. */
enum { WIDE_BLOCK = 256, WIDE_TOP = 32512 };
static inline int64_t wide_blocks(int64_t depth) { return (depth + WIDE_BLOCK - 1) / WIDE_BLOCK; }
KV_INLINE void fold_8(const float *w, int64_t ld, int64_t r, folded *f)
{
    for (int64_t i = 0; i < ld; i += WIDE_BLOCK) {
        const int64_t n = ld - i < WIDE_BLOCK ? ld - i : WIDE_BLOCK;
        const float most = vf_top(largest(w + i, (int)n));
        d16_round(w + i, n, vf_set1(WIDE_TOP / (most + 1e-30f)), f->in.wide + r * ld + i); /* finite for zeros */
        f->scale[r * wide_blocks(ld) + i / WIDE_BLOCK] = most * (1.0f / WIDE_TOP);
    }
}
#else
#define KV_OFFSET_8 128
KV_INLINE void fold_8(const float *w, int64_t ld, int64_t r, folded *f)
{
    const int64_t blocks = ld / KV_BLOCK;
    KV_NAME(kv_quantize_planes)(w, ld, PLANES_8, f->in.q + r * PLANES_8 * ld, f->scale + r * PLANES_8 * blocks,
                                f->sum + r * PLANES_8 * blocks, NULL);
}
#endif

/* Folds and rounds `rows` rows of x [ld_x]: n inputs, of `depth` that a panel has. */
KV_INLINE void fold(const int bits, const int rows, const float *x, int64_t ld_x, int64_t n, int64_t depth,
                    const uint16_t *scale, const uint16_t *minimum, folded *f)
{
    float w[KV_ROWS * MAX_DEPTH + 8 * KV_BLOCK], total[KV_ROWS * MAX_DEPTH / KV_BLOCK + 4];
    const int64_t blocks = (depth + KV_SCALED(bits) - 1) / KV_SCALED(bits), ld = blocks * KV_SCALED(bits);
    const float middle = 0.5f * (float)((1 << bits) - 1);
    scaled(rows, bits < 8 ? middle : KV_OFFSET_8, x, ld_x, n, depth, scale, minimum, w, ld, f->constant);
    if (bits == 8) {
        for (int r = 0; r < rows; r++)
            fold_8(w + r * ld, ld, r, f);
        return;
    }
    for (int64_t i = rows * ld; i % (4 * KV_SCALED(bits)); i += 16)
        vf_store(w + i, vf_zero());
    rounded(KV_SCALED(bits), rows * blocks, w, f->in.q, f->scale, total);
    /* What rounding took away or added counts as if it met a code of the middle: no bias, and half the error. */
    for (int r = 0; r < rows; r++)
        for (int64_t b = 0; b < blocks; b++)
            f->constant[r] -= middle * total[r * blocks + b];
}

/* dot[r] of `n` inputs, less than share a scale, at the end of a panel. Not in line: GCC would share loads with the
 * whole blocks, and run out of registers. */
static KV_OWN void last_inputs(const int bits, int rows, int64_t n, const uint8_t *codes, const int8_t *q, int64_t ld,
                               const int32_t *sum, int64_t ld_sum, vf *dot)
{
    for (int r = 0; r < rows; r++, q += ld, sum += ld_sum) {
        if (bits == 8) {
            dot_codes(8, 4, 1, codes, q, ld, sum, ld_sum, dot + r);
        } else if (bits == 4) {
            dot_codes(4, 2, 1, codes, q, ld, sum, ld_sum, dot + r);
        } else {
            d4 d = d4_zero();
            if (n >= KV_BLOCK)
                dot_add(2, 2, 1, codes, q, ld, &d);
            if (n % KV_BLOCK)
                dot_add(2, 1, 1, codes + n / KV_BLOCK * 128, q + n / KV_BLOCK * KV_BLOCK, ld, &d);
            dot[r] = d4_float(d);
        }
    }
}

KV_INLINE void whole_block(const int bits, const int rows, const uint8_t *codes, const int8_t *q, int64_t ld,
                           const int32_t *sum, int64_t ld_sum, vf *dot)
{
    if (bits != 2) {
        dot_codes(bits, bits, rows, codes, q, ld, sum, ld_sum, dot);
        return;
    }
    d4 d[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        d[r] = d4_zero();
    KV_NO_UNROLL
    for (int i = 0; i < 2; i++, codes += 128, q += KV_BLOCK)
        dot_add(2, 2, rows, codes, q, ld, d);
    KV_UNROLL
    for (int r = 0; r < rows; r++)
        dot[r] = d4_float(d[r]);
}

/* One panel: out[r][ld_out] = (or +=) the products of its 16 lanes, constant included. */
KV_INLINE void panel_rows(const int bits, const int rows, const uint8_t *panel, int64_t depth, const folded *f,
                          float *out, int64_t ld_out, int add)
{
    const int planes = bits == 8 ? PLANES_8 : 1, block = KV_SCALED(bits);
    const int64_t blocks = (depth + block - 1) / block, ld = blocks * block;
    vf sum[KV_ROWS], dot[KV_ROWS];
    KV_UNROLL
    for (int r = 0; r < rows * planes; r++)
        sum[r] = vf_zero();
    for (int64_t b = 0; b < blocks; b++, panel += 16 * block * bits / 8) {
        const int8_t *q = f->in.q + b * block;
        if (b < depth / block)
            whole_block(bits, rows * planes, panel, q, ld, f->sum + b, blocks, dot);
        else
            last_inputs(bits, rows * planes, depth - b * block, panel, q, ld, f->sum + b, blocks, dot);
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
/* The same for 8 bits with inputs of 16. */
KV_INLINE void panel_wide(const int rows, const uint8_t *panel, int64_t depth, const folded *f, float *out,
                          int64_t ld_out, int add)
{
    const int64_t ld = (depth + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
    for (int lane = 0; lane < KV_PANEL; lane += WIDE_LANES, panel += 4 * WIDE_LANES, out += WIDE_LANES) {
        wf sum[KV_ROWS];
        KV_UNROLL
        for (int r = 0; r < rows; r++) {
            sum[r] = wf_set1(f->constant[r]);
            if (add)
                sum[r] = wf_add(sum[r], wf_load(out + r * ld_out));
        }
        for (int64_t from = 0; from < depth; from += WIDE_BLOCK) {
            const int64_t end = depth - from < WIDE_BLOCK ? depth : from + WIDE_BLOCK;
            d16 dot[KV_ROWS];
            KV_UNROLL
            for (int r = 0; r < rows; r++)
                dot[r] = d16_zero();
            for (int64_t i = from; i < end; i += 16) {
                KV_UNROLL
                for (int j = 0; j < 16; j += 4) {
                    d16 line = d16_load(panel + 16 * (i + j));
                    if (!lane)
                        kv_ahead(panel + 16 * (i + j));
                    KV_UNROLL
                    for (int r = 0; r < rows; r++)
                        dot[r] = d16_dot(dot[r], line, f->in.wide + r * ld + i + j);
                }
            }
            KV_UNROLL
            for (int r = 0; r < rows; r++)
                sum[r] = wf_fma(d16_float(dot[r]), wf_set1(f->scale[r * wide_blocks(ld) + from / WIDE_BLOCK]), sum[r]);
        }
        KV_UNROLL
        for (int r = 0; r < rows; r++)
            wf_store(out + r * ld_out, sum[r]);
    }
}
#endif

/* Panels one after the other, each `depth` deep, whose 16 lanes lie one after the other in out. */
KV_INLINE void panels(const int bits, const int rows, const uint8_t *codes, int64_t n, int64_t depth, const folded *f,
                      float *out, int64_t ld_out, int add)
{
    for (int64_t p = 0; p < n; p++, codes += 16 * depth * bits / 8, out += 16) {
#ifdef KV_WIDE
        if (bits == 8) {
            panel_wide(rows, codes, depth, f, out, ld_out, add);
            continue;
        }
#endif
        panel_rows(bits, rows, codes, depth, f, out, ld_out, add);
    }
}

/* Rows that are done together: with two planes to a row, half as many. */
#ifdef KV_WIDE
#define KV_MOST(BITS) KV_ROWS
#else
#define KV_MOST(BITS) (BITS == 8 ? KV_ROWS / PLANES_8 : KV_ROWS)
#endif

/* Each number of bits and rows has its own code, and not in line, for the sake of registers. */
#define KV_PANELS(BITS, ROWS)                                                                                          \
    static KV_OWN void fold_##BITS##_##ROWS(const float *x, int64_t ld_x, int64_t n, int64_t depth,                    \
                                            const uint16_t *scale, const uint16_t *minimum, folded *f)                 \
    {                                                                                                                  \
        if (ROWS <= KV_MOST(BITS) && n == KV_TILE)                                                                     \
            fold(BITS, ROWS, x, ld_x, KV_TILE, KV_TILE, scale, minimum, f);                                            \
        else if (ROWS <= KV_MOST(BITS))                                                                                \
            fold(BITS, ROWS, x, ld_x, n, depth, scale, minimum, f);                                                    \
    }                                                                                                                  \
    static KV_OWN void panels_##BITS##_##ROWS(const uint8_t *codes, int64_t n, int64_t depth, const folded *f,         \
                                              float *out, int64_t ld_out, int add)                                     \
    {                                                                                                                  \
        if (ROWS <= KV_MOST(BITS) && depth == KV_TILE)                                                                 \
            panels(BITS, ROWS, codes, n, KV_TILE, f, out, ld_out, add);                                                \
        else if (ROWS <= KV_MOST(BITS))                                                                                \
            panels(BITS, ROWS, codes, n, depth, f, out, ld_out, add);                                                  \
    }
#define KV_ALL_PANELS(BITS)                                                                                            \
    KV_PANELS(BITS, 1) KV_PANELS(BITS, 2) KV_PANELS(BITS, 3) KV_PANELS(BITS, 4) KV_PANELS(BITS, 8)
KV_ALL_PANELS(8)
KV_ALL_PANELS(4)
KV_ALL_PANELS(2)

typedef struct {
    int rows;
    void (*fold)(const float *x, int64_t ld_x, int64_t n, int64_t depth, const uint16_t *scale, const uint16_t *minimum,
                 folded *f);
    void (*panels)(const uint8_t *codes, int64_t n, int64_t depth, const folded *f, float *out, int64_t ld_out,
                   int add);
} product;

typedef struct {
    int bits, most;
    product by_rows[5]; /* 1, 2, 3, 4 and 8 */
} products;

#define KV_PRODUCT(BITS, ROWS) {ROWS, fold_##BITS##_##ROWS, panels_##BITS##_##ROWS}
#define KV_PRODUCTS(BITS)                                                                                              \
    {BITS, KV_MOST(BITS), {KV_PRODUCT(BITS, 1), KV_PRODUCT(BITS, 2), KV_PRODUCT(BITS, 3), KV_PRODUCT(BITS, 4),         \
                           KV_PRODUCT(BITS, 8)}}
static const products products_8 = KV_PRODUCTS(8), products_4 = KV_PRODUCTS(4), products_2 = KV_PRODUCTS(2);

/* For as many of the rows as fit. */
static const product *next_rows(const products *by, int64_t rows)
{
    int64_t n = rows < by->most ? rows : by->most;
    return &by->by_rows[n >= 8 ? 4 : n >= 4 ? 3 : n - 1];
}

static void k_dot(const products *by, const uint8_t *tile, int64_t head_dim, const float *q, int64_t ld_q, int64_t rows,
                  int64_t lanes, float *scores)
{
    int64_t depth = kv_head_pad(head_dim);
    const uint16_t *scale = (const uint16_t *)(tile + code_bytes(by->bits, head_dim));
    folded f;
    while (rows) {
        const product *some = next_rows(by, rows);
        some->fold(q, ld_q, head_dim, depth, scale, scale + depth, &f);
        some->panels(tile, lanes / 16, depth, &f, scores, KV_TILE, 0);
        rows -= some->rows, q += some->rows * ld_q, scores += some->rows * KV_TILE;
    }
}

static void v_accumulate(const products *by, const uint8_t *tile, int64_t head_dim, const float *p, int64_t rows,
                         float *acc)
{
    int64_t width = kv_head_pad(head_dim);
    folded f;
    while (rows) {
        const product *some = next_rows(by, rows);
        const uint16_t *scale = (const uint16_t *)(tile + code_bytes(by->bits, head_dim));
        for (int64_t c = 0; c < width; c += GROUP, scale += 2 * KV_TILE) {
            some->fold(p, KV_TILE, KV_TILE, KV_TILE, scale, scale + KV_TILE, &f);
            some->panels(tile + c * KV_TILE * by->bits / 8, (width - c < GROUP ? width - c : GROUP) / 16, KV_TILE, &f,
                         acc + c, width, 1);
        }
        rows -= some->rows, p += some->rows * KV_TILE, acc += some->rows * width;
    }
}

/* One row of the table of formats, all its functions for `BITS`. */
#define KV_QUANTIZED(NAME, BITS)                                                                                       \
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
        k_dot(&products_##BITS, tile, head_dim, q, ld_q, rows, lanes, scores);                                         \
    }                                                                                                                  \
    static void NAME##_v_accumulate(const void *tile, int64_t head_dim, const float *p, int64_t rows, int64_t tokens,  \
                                    float *acc)                                                                        \
    {                                                                                                                  \
        (void)tokens;                                                                                                  \
        v_accumulate(&products_##BITS, tile, head_dim, p, rows, acc);                                                  \
    }                                                                                                                  \
    const kv_format KV_CACHE_FORMAT(NAME) = {                                                                          \
        #NAME, BITS + 0.5, 1, NAME##_k_bytes, NAME##_v_bytes, NAME##_pack_k, NAME##_pack_v, NAME##_unpack_k,           \
        NAME##_unpack_v, NULL, NULL, NAME##_k_dot, NAME##_v_accumulate,                                                \
    };

KV_QUANTIZED(q8, 8)
KV_QUANTIZED(q4, 4)
KV_QUANTIZED(q2, 2)
