/* Kernels of kvrun: what every instruction-set level provides, and the layouts they read.
 *
 * Weights. A matrix [rows, cols] is stored as panels of 16 output rows (the last one padded with zeros), so that one
 * line of 64 bytes feeds 16 rows. Each type has a file in weights/ with its layouts, its row of the table and its
 * product; docs/format.md describes the layouts in full.
 *
 * Cached keys and values come in tiles of KV_TILE = 64 tokens of one KV head; `head_pad` is head_dim rounded up
 * to 16. In f32 and f16 K is channel-major [head_dim][64], V is token-major [64][head_pad]; the quantised formats are
 * described in cache/quantized.h.
 */
#ifndef KVRUN_KERNELS_H
#define KVRUN_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "abi.h"

#define KV_MAX_HEAD_DIM 1024 /* what kernels have room for on the stack */

/* Channels of a head with the padding of its rows. */
static inline int64_t kv_head_pad(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

/* Asks for data that will be read soon, where nothing that was read before it has led hardware to do so. */
static inline void kv_prefetch(const void *data, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)data + i);
}

/* Copies n rows of whole panels of floats, which are too short for memcpy to be quick about them. */
static inline void kv_copy_rows(const float *from, int64_t ld_from, int64_t n, int64_t width, float *to, int64_t ld_to)
{
    typedef struct {
        float f[16];
    } line;
    for (int64_t r = 0; r < n; r++, from += ld_from, to += ld_to)
        for (int64_t i = 0; i < width; i += 16)
            *(line *)(to + i) = *(const line *)(from + i);
}

/* Inputs of a matrix product for a chunk of tokens: as floats, and (for block types) as int8 in blocks of 32.
 * With two planes the second holds what the first rounds away, in steps 256 times finer: 16 bits in all. It is used
 * where memory, not arithmetic, sets the pace. */
typedef struct {
    const float *f;       /* [tokens][ld] */
    const int8_t *q;      /* [tokens][blocks][planes][32] codes */
    const float *scale;   /* [tokens][planes][blocks] */
    const int32_t *sum;   /* [tokens][planes][blocks] sum of the codes of a block */
    int64_t ld;           /* floats between tokens */
    int64_t blocks;       /* blocks of 32 in a token */
    int64_t planes;       /* 1 or 2 */
    const int32_t *offset; /* [tokens][planes][2 blocks] -32 times the sum of each 16 codes, for types that want it */
} kv_input;

/* out[t * ld_out + 16 * p + r] = (or +=, with `add`) row 16 p + r of the panels times input t. */
typedef void (*kv_matmul_fn)(const uint8_t *panels, int64_t n_panels, int64_t cols, const kv_input *in,
                             int64_t n_tokens, float *out, int64_t ld_out, int add);

/* One row of the table of cache formats. K and V of a tile are separate, so their formats are chosen separately.
 * pack/unpack convert between the format and float tiles: K [head_dim][64], V [64][head_pad].
 * put_k/put_v: one token's key or value into a tile; NULL for formats that need the whole tile at once.
 * k_dot: scores[r][lane] = q[r] . K[:, lane] for `lanes` (a multiple of 16) of the tile's tokens, queries [rows][ld_q].
 * v_accumulate: acc[r][:] += sum over `tokens` of p[r][token] * V[token], acc [rows][head_pad].
 * `stride` is the number of token lanes of a K row: 64 for a tile, fewer for the sinks. */
typedef struct {
    const char *name;
    double bits;
    int hadamard;           /* V is kept transformed, which spreads outliers over the head's channels */
    int64_t (*k_bytes)(int64_t head_dim);
    int64_t (*v_bytes)(int64_t head_dim);
    void (*pack_k)(const float *k, int64_t head_dim, void *tile);
    void (*pack_v)(const float *v, int64_t head_dim, void *tile);
    void (*unpack_k)(const void *tile, int64_t head_dim, float *k);
    void (*unpack_v)(const void *tile, int64_t head_dim, float *v);
    void (*put_k)(void *tile, int64_t head_dim, int64_t lane, const float *k);
    void (*put_v)(void *tile, int64_t head_dim, int64_t lane, const float *v);
    void (*k_dot)(const void *tile, int64_t stride, int64_t head_dim, const float *q, int64_t ld_q, int64_t rows,
                  int64_t lanes, float *scores);
    void (*v_accumulate)(const void *tile, int64_t head_dim, const float *p, int64_t rows, int64_t tokens,
                         float *acc);
} kv_format;

typedef struct {
    const char *name;
    kv_matmul_fn matmul[KV_N_WEIGHT_TYPES];
    kv_format format[KV_FORMATS];
    /* out = x / sqrt(mean(x^2) + eps) * weight */
    void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *out);
    /* out = (x - mean) / sqrt(variance + eps) * weight + bias */
    void (*layer_norm)(const float *x, const float *weight, const float *bias, int64_t n, float eps, float *out);
    /* One token of a kv_input: int8 codes in blocks of 32, scale = max|x| / 127; the last block is padded with zeros.
     * offset may be NULL. */
    void (*quantize)(const float *x, int64_t n, int64_t planes, int8_t *q, float *scale, int32_t *sum,
                     int32_t *offset);
    /* Rotates the halves of one head (RoFormer, rotate-half order): [head_dim] by angles given as cos and sin
     * [head_dim/2], times `scale`. in and out may be the same. */
    void (*rope)(const float *x, const float *cos, const float *sin, int64_t head_dim, float scale, float *out);
    /* Orthonormal Hadamard transform of x [n] in place, its own inverse; in blocks of the largest powers of two when n
     * is not one. */
    void (*hadamard)(float *x, int64_t n);
    /* out = activation(x) * up, or activation(x) when up is NULL */
    void (*activate[KV_ACTIVATIONS])(const float *x, const float *up, int64_t n, float *out);
    /* x = cap * tanh(x / cap), in place */
    void (*soft_cap)(float *x, int64_t n, float cap);
    /* Online softmax over one tile (Milakov and Gimelshein 2018), to the base 2: scores [rows][64], which come times
     * log2(e), become weights in place; lanes at or beyond visible[r] get weight 0. Running maximum m, sum l and
     * accumulators acc [rows][head_pad] are rescaled when the maximum grows. */
    void (*softmax_step)(float *scores, const int32_t *visible, int64_t rows, int64_t head_pad, float *m, float *l,
                         float *acc);
} kv_kernels;

/* Fills the table of the best level this CPU has, or of the level asked for. 0 when that one is not built or the
 * CPU lacks it. */
int kv_kernels_find(const char *level, kv_kernels *table);

/* One row of the table of weight types. Raw rows are GGML's blocks, or plain elements; r is a row of a panel, 0 to 15.
 * The functions are portable. */
typedef struct {
    const char *name;        /* GGML's in small letters */
    int ggml_number;         /* of the type in GGUF files */
    int64_t block;           /* columns in a raw block */
    int64_t block_bytes;     /* of a raw block */
    int64_t column_multiple; /* what the columns of a matrix must be a multiple of */
    int takes_int8;          /* products read kv_input's int8 codes instead of its floats */
    int wants_offset;        /* and its `offset` */
    int64_t (*panel_bytes)(int64_t cols);
    void (*quantize_row)(const float *x, int64_t cols, uint8_t *raw);
    void (*pack_row)(const uint8_t *raw, int64_t cols, int64_t r, uint8_t *panel); /* all zeros where no row has been */
    void (*unpack_row)(const uint8_t *panel, int64_t cols, int64_t r, float *x);
} kv_weight;

const kv_weight *kv_weight_of(int type);
int64_t kv_raw_row_bytes(int type, int64_t cols);
int64_t kv_packed_bytes(int type, int64_t rows, int64_t cols);
void kv_quantize_row(int type, const float *x, int64_t cols, uint8_t *raw);
/* Rows [0, rows) of one panel, rows <= 16, from raw rows one after the other. */
void kv_pack_panel(int type, const uint8_t *raw, int64_t rows, int64_t cols, uint8_t *panel);
void kv_unpack_row(int type, const uint8_t *packed, int64_t cols, int64_t row, float *x);

#endif
