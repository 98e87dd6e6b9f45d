/* Types with super-blocks of 256 columns, whose blocks have scales in small integers. Like every file of a type, this
 * is compiled without KV_LEVEL for what is portable, and once for each level. */
#ifndef KVRUN_SUPERS_H
#define KVRUN_SUPERS_H

#include "kernels.h"

#ifndef KV_LEVEL

#include <math.h>
#include <string.h>

#include "f16.h"

/* Six-bit numbers, packed -----------------------------------------------------------------------------------------*/

/* Byte `at` of line l of four, of which only three are stored: their two high bits are the fourth. */
static inline void kv_put_six(uint8_t *lines, int l, int64_t at, int value)
{
    if (l < 3)
        lines[64 * l + at] |= (uint8_t)value;
    else
        for (int i = 0; i < 3; i++)
            lines[64 * i + at] |= (uint8_t)((value >> 2 * i & 3) << 6);
}

static inline int kv_get_six(const uint8_t *lines, int l, int64_t at)
{
    if (l < 3)
        return lines[64 * l + at] & 63;
    return lines[at] >> 6 | lines[64 + at] >> 6 << 2 | lines[128 + at] >> 6 << 4;
}

/* Quantisation: four blocks at a time, a lane each ----------------------------------------------------------------*/

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

static inline f4 pick(i4 mask, f4 a, f4 b) { return (f4)((mask & (i4)a) | (~mask & (i4)b)); }
static inline f4 larger(f4 a, f4 b) { return pick(a > b, a, b); }
static inline f4 smaller(f4 a, f4 b) { return pick(a < b, a, b); }
static inline f4 whole(f4 x) { return x + 12582912.0f - 12582912.0f; } /* to nearest, of less than 2^22 */
/* Codes of x: whole numbers from low to high; low for what is not a number. */
static inline f4 code(f4 x, float low, float high)
{
    return whole(smaller(larger(x, (f4){low, low, low, low}), (f4){high, high, high, high}));
}
static inline f4 inverse_of(f4 x) { return pick(x != 0.0f, 1.0f / x, (f4){0}); }

static inline float largest_of(const f4 *x, int n) /* by size, with its sign */
{
    float top = 0;
    for (int i = 0; i < 4 * n; i++)
        if (fabsf(x[i / 4][i % 4]) > fabsf(top))
            top = x[i / 4][i % 4];
    return top;
}

#else

#include "simd/dot.h"
#include "weights/panels.h"

/* Four lines of six-bit numbers from three: their high bits are the fourth. */
KV_INLINE void six_bits(const uint8_t *p, vw line[4])
{
    vw a = vw_load(p), b = vw_load(p + 64), c = vw_load(p + 128);
    line[0] = vw_field(a, 0, 63);
    line[1] = vw_field(b, 0, 63);
    line[2] = vw_field(c, 0, 63);
    line[3] = vw_or(vw_or(vw_field(a, 6, 3), vw_field(b, 4, 12), 0), vw_field(c, 2, 48), 0);
}

/* Inputs from a certain token on. ld: codes of a plane; blocks: of a plane. */
typedef struct {
    const int8_t *q;
    const float *scale;
    const int32_t *sum, *offset;
    int64_t ld, blocks;
} some_inputs;

KV_INLINE some_inputs inputs_from(const kv_input *in, int64_t row)
{
    const int64_t blocks = in->blocks;
    return (some_inputs){in->q + row * blocks * KV_BLOCK, in->scale + row * blocks, in->sum + row * blocks,
                         in->offset ? in->offset + row * blocks * 2 : NULL, blocks * KV_BLOCK, blocks};
}

/* Defines a function that gives some rows of the input, each of so many planes, their products with a panel, from
 * SUPER(rows, panel, s, in, sum), which adds super-block s of the panel to their sums. */
#define KV_SUPER_PRODUCT(FUNCTION, MOST, PLANES, SUPER)                                                                \
    KV_INLINE void FUNCTION(const int rows, const uint8_t *panel, const kv_input *in, int64_t first, float *out,       \
                            int64_t ld_out, int add)                                                                   \
    {                                                                                                                  \
        const some_inputs some = inputs_from(in, PLANES * first);                                                      \
        vf sum[MOST];                                                                                                  \
        KV_UNROLL                                                                                                      \
        for (int r = 0; r < rows; r++)                                                                                 \
            sum[r] = add ? vf_load(out + r * ld_out) : vf_zero();                                                      \
        for (int64_t s = 0; s < in->blocks / 8; s++)                                                                   \
            SUPER(rows, panel, s, &some, sum);                                                                         \
        KV_UNROLL                                                                                                      \
        for (int r = 0; r < rows; r++)                                                                                 \
            vf_store(out + r * ld_out, sum[r]);                                                                        \
    }

/* The product of a type whose panels have BYTES bytes, from two such functions: of tokens in one plane, and in two. */
#define KV_SUPER_MATMUL(NAME, BYTES, SUPER, SUPER_TWO)                                                                 \
    KV_SUPER_PRODUCT(rows_##NAME, KV_ROWS, 1, SUPER)                                                                   \
    KV_SUPER_PRODUCT(tokens_##NAME, KV_TOKENS, 2, SUPER_TWO)                                                           \
    KV_MATMUL(NAME, BYTES, rows_##NAME, tokens_##NAME)

#endif
#endif
