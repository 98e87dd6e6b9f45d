/* Compares every kernel of one level with the scalar one on random data: check LEVEL [SEED].
 * A program of its own, so that levels of another machine can be checked under an emulator. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

void kv_fill_scalar(kv_kernels *table);
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
void PASTE(kv_fill_, CHECKED)(kv_kernels *table);

static kv_kernels reference, checked;
static int failures;
static uint64_t state;

static double uniform(void) /* splitmix64, in [-1, 1) */
{
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-52 - 1;
}

static float *floats(int64_t n)
{
    float *x = aligned_alloc(64, (size_t)(n * 4 + 127) / 64 * 64);
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)uniform();
    return x;
}

static void *bytes(int64_t n) { return calloc(1, (size_t)n + 64); }

static void compare(const char *what, int64_t a, int64_t b, const float *x, const float *y, int64_t n, double tolerance)
{
    double top = 1e-30, error = 0;
    for (int64_t i = 0; i < n; i++) {
        top = fmax(top, fabs(x[i]));
        error = fabs((double)x[i] - y[i]) <= error ? error : fabs((double)x[i] - y[i]); /* keeps a NaN */
    }
    if (error <= tolerance * top)
        return;
    failures++;
    printf("%s (%lld, %lld): error %g of %g\n", what, (long long)a, (long long)b, error, top);
}

static void check_matmul(int type, int64_t rows, int64_t cols, int64_t n, int64_t planes)
{
    int64_t blocks = (cols + 31) / 32, panels = (rows + 15) / 16, row_bytes = kv_raw_row_bytes(type, cols);
    float *w = floats(rows * cols), *x = floats(n * cols), *a = floats(n * panels * 16), *b = bytes(n * panels * 64);
    float *before = bytes(n * panels * 64), *alone = bytes(panels * 64);
    uint8_t *raw = bytes(16 * row_bytes), *packed = aligned_alloc(64, (size_t)kv_packed_bytes(type, rows, cols));
    int8_t *q = bytes(n * planes * blocks * 32);
    float *scale = bytes(n * planes * blocks * 4);
    int32_t *sum = bytes(n * planes * blocks * 4), *offset = bytes(n * planes * blocks * 8);
    for (int64_t p = 0; p < panels; p++) {
        int64_t some = rows - 16 * p < 16 ? rows - 16 * p : 16;
        for (int64_t r = 0; r < some; r++)
            kv_quantize_row(type, w + (16 * p + r) * cols, cols, raw + r * row_bytes);
        kv_pack_panel(type, raw, some, cols, packed + p * kv_packed_bytes(type, 16, cols));
    }
    for (int64_t t = 0; t < n; t++)
        reference.quantize(x + t * cols, cols, planes, q + t * planes * blocks * 32, scale + t * planes * blocks,
                           sum + t * planes * blocks, offset + t * planes * blocks * 2);
    kv_input in = {x, q, scale, sum, cols, blocks, planes, offset};
    for (int add = 0; add < 2; add++) {
        memcpy(b, a, (size_t)(n * panels * 64));
        memcpy(before, a, (size_t)(n * panels * 64));
        reference.matmul[type](packed, panels, cols, &in, n, a, panels * 16, add);
        checked.matmul[type](packed, panels, cols, &in, n, b, panels * 16, add);
        compare("matmul", type, cols, a, b, n * panels * 16, 1e-5);
        for (int64_t t = 0; t < n; t++) {
            int64_t at = t * planes * blocks;
            kv_input one = {x + t * cols, q + at * 32, scale + at, sum + at, cols, blocks, planes, offset + at * 2};
            memcpy(alone, before + t * panels * 16, (size_t)(panels * 64));
            checked.matmul[type](packed, panels, cols, &one, 1, alone, panels * 16, add);
            if (memcmp(alone, b + t * panels * 16, (size_t)(panels * 64)))
                failures++, printf("matmul (%d, %lld): row %lld differs alone\n", type, (long long)cols, (long long)t);
        }
    }
    free(before), free(alone);
    free(w), free(x), free(a), free(b), free(raw), free(packed), free(q), free(scale), free(sum), free(offset);
}

static void check_vectors(int64_t n)
{
    int64_t blocks = (n + 31) / 32;
    float *x = floats(n), *y = floats(n), *a = bytes(n * 4), *b = bytes(n * 4), s[2][128];
    int8_t *q = bytes(blocks * 64), *p = bytes(blocks * 64);
    int32_t sum[2][128], offset[2][256];
    reference.rms_norm(x, y, n, 1e-5f, a), checked.rms_norm(x, y, n, 1e-5f, b);
    compare("rms_norm", n, 0, a, b, n, 1e-5);
    reference.rope(x, y, y + n / 2, n / 2 * 2, 0.5f, a), checked.rope(x, y, y + n / 2, n / 2 * 2, 0.5f, b);
    compare("rope", n, 0, a, b, n / 2 * 2, 1e-6);
    reference.quantize(x, n, 2, q, s[0], sum[0], offset[0]), checked.quantize(x, n, 2, p, s[1], sum[1], offset[1]);
    compare("quantize scale", n, 0, s[0], s[1], 2 * blocks, 1e-6);
    for (int64_t i = 0; i < blocks * 32; i++) {
        int64_t at = i / 32 * 64 + i % 32; /* in the first plane */
        if (abs(q[at] - p[at]) > 1)        /* ties may fall to either side */
            failures++, printf("quantize (%lld): %d is not %d\n", (long long)n, p[at], q[at]);
    }
    for (int64_t i = 0; i < 2 * blocks; i++) {
        int32_t total = 0;
        for (int64_t j = 0; j < 32; j++)
            total += p[(i % blocks * 2 + i / blocks) * 32 + j]; /* codes are by block, sums by plane */
        if (total != sum[1][i])
            failures++, printf("quantize (%lld): a wrong sum\n", (long long)n);
        if (offset[1][2 * i] + offset[1][2 * i + 1] != -32 * total)
            failures++, printf("quantize (%lld): a wrong offset\n", (long long)n);
    }
    for (int64_t i = 0; i < n; i++)
        x[i] *= 50;
    for (int i = 0; i < KV_ACTIVATIONS; i++) {
        reference.activate[i](x, y, n, a), checked.activate[i](x, y, n, b);
        compare("activate", i, n, a, b, n, 1e-6);
        reference.activate[i](x, NULL, n, a), checked.activate[i](x, NULL, n, b);
        compare("activate without gate", i, n, a, b, n, 1e-6);
    }
    reference.layer_norm(x, y, y, n, 1e-5f, a), checked.layer_norm(x, y, y, n, 1e-5f, b);
    compare("layer_norm", n, 0, a, b, n, 1e-5);
    memcpy(a, x, n * 4), memcpy(b, x, n * 4);
    reference.soft_cap(a, n, 30), checked.soft_cap(b, n, 30);
    compare("soft_cap", n, 0, a, b, n, 1e-6);
    free(x), free(y), free(a), free(b), free(q), free(p);
}

static double squared_error(const float *x, const float *y, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
    return sum;
}

/* A tile is the same on every level; at 2 bits a range may differ where two are as good. */
static void check_packing(int f, int64_t head_dim)
{
    const kv_format *one = &reference.format[f], *two = &checked.format[f];
    int64_t pad = (head_dim + 15) / 16 * 16, nk = one->k_bytes(head_dim), nv = one->v_bytes(head_dim);
    float *k = floats(head_dim * 64), *v = floats(64 * pad), *x = bytes(pad * 256), *y = bytes(pad * 256);
    uint8_t *a = bytes(nk + nv), *b = bytes(nk + nv);
    for (int64_t i = 0; i < 64 * pad; i++)
        v[i] = i % pad < head_dim ? v[i] : 0;
    one->pack_k(k, head_dim, a), one->pack_v(v, head_dim, a + nk);
    two->pack_k(k, head_dim, b), two->pack_v(v, head_dim, b + nk);
    if (f != KV_FORMAT_Q2 && memcmp(a, b, (size_t)(nk + nv)))
        failures++, printf("format %d (%lld): another tile\n", f, (long long)head_dim);
    for (int part = 0; part < 2; part++) {
        int64_t n = part ? 64 * pad : 64 * head_dim;
        if (part)
            one->unpack_v(a + nk, head_dim, x), one->unpack_v(b + nk, head_dim, y);
        else
            one->unpack_k(a, head_dim, x), one->unpack_k(b, head_dim, y);
        double expected = squared_error(part ? v : k, x, n), error = squared_error(part ? v : k, y, n);
        if (!(fabs(error - expected) <= 1e-3 * expected))
            failures++, printf("format %d (%lld): squared error %g, not %g\n", f, (long long)head_dim, error, expected);
    }
    free(k), free(v), free(x), free(y), free(a), free(b);
}

static void check_tile(int f, int64_t head_dim, int64_t rows)
{
    int64_t pad = (head_dim + 15) / 16 * 16;
    const kv_format *one = &reference.format[f], *two = &checked.format[f];
    float *k = floats(head_dim * 64), *v = floats(pad * 64), *q = floats(rows * head_dim), *p = floats(rows * 64);
    float *a = floats(rows * pad), *b = bytes(rows * pad * 4), *s = bytes(rows * 256), *t = bytes(rows * 256);
    float *unpacked = bytes(pad * 256), *again = bytes(pad * 256), m[2][64], l[2][64];
    int32_t visible[64];
    void *keys = bytes(one->k_bytes(head_dim)), *values = bytes(one->v_bytes(head_dim));
    two->pack_k(k, head_dim, keys), two->pack_v(v, head_dim, values);
    if (strcmp(one->name, two->name) || one->k_bytes(head_dim) != two->k_bytes(head_dim))
        failures++, printf("format %d: another name or size\n", f);
    one->unpack_k(keys, head_dim, unpacked), two->unpack_k(keys, head_dim, again);
    compare("unpack_k", f, head_dim, unpacked, again, head_dim * 64, 1e-6);
    one->unpack_v(values, head_dim, unpacked), two->unpack_v(values, head_dim, again);
    compare("unpack_v", f, head_dim, unpacked, again, pad * 64, 1e-6);
    one->k_dot(keys, 64, head_dim, q, head_dim, rows, 64, s), two->k_dot(keys, 64, head_dim, q, head_dim, rows, 64, t);
    /* a rounded input may fall to either side of a tie: then a product moves by one step of 1/127 */
    compare("k_dot", f, head_dim, s, t, rows * 64, one->bits < 16 ? 1e-2 : 1e-5);
    memcpy(b, a, (size_t)(rows * pad * 4));
    one->v_accumulate(values, head_dim, p, rows, 64, a), two->v_accumulate(values, head_dim, p, rows, 64, b);
    compare("v_accumulate", f, head_dim, a, b, rows * pad, one->bits < 16 ? 1e-2 : 1e-5);
    memcpy(b, a, (size_t)(rows * pad * 4));
    for (int64_t r = 0; r < rows; r++) {
        visible[r] = (int32_t)(uniform() * 40 + 28) > 64 ? 64 : (int32_t)(uniform() * 36 + 28);
        m[0][r] = m[1][r] = r % 2 ? -INFINITY : 0.1f;
        l[0][r] = l[1][r] = r % 2 ? 0 : 1;
    }
    memcpy(t, s, (size_t)(rows * 256));
    reference.softmax_step(s, visible, rows, pad, m[0], l[0], a), checked.softmax_step(t, visible, rows, pad, m[1], l[1], b);
    compare("softmax weights", f, rows, s, t, rows * 64, 1e-6);
    compare("softmax sums", f, rows, l[0], l[1], rows, 1e-6);
    compare("softmax outputs", f, rows, a, b, rows * pad, 1e-6);
    free(k), free(v), free(q), free(p), free(a), free(b), free(s), free(t), free(unpacked), free(again);
    free(keys), free(values);
}

int main(int argc, char **argv)
{
    static const int64_t dims[] = {8, 20, 64, 80, 96, 128, 256}, lengths[] = {1, 15, 31, 32, 33, 576, 1536};
    state = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    kv_fill_scalar(&reference);
    PASTE(kv_fill_, CHECKED)(&checked);
    for (int type = 0; type < KV_N_WEIGHT_TYPES; type++) {
        const int super = kv_weight_of(type)->column_multiple > 1;
        check_matmul(type, 48, super ? 512 : 96, 1, 2);
        check_matmul(type, 33, super ? 768 : 577, 11, 1);
        check_matmul(type, 16, super ? 256 : 100, 23, 2);
    }
    for (int i = 0; i < 7; i++)
        check_vectors(lengths[i]);
    for (int f = 0; f < KV_FORMATS; f++)
        for (int i = 0; i < 7; i++) {
            check_packing(f, dims[i]);
            for (int rows = 1; rows <= 9; rows++)
                check_tile(f, dims[i], rows);
        }
    printf("%s: %d differences from scalar\n", checked.name, failures);
    return failures != 0;
}
