/* Cache formats f32 and f16. */
#include "cache/formats.h"
#include "f16.h"
#include "simd/gemm.h"

/* f32: exact, the reference for the others. */
static int64_t f32_k_bytes(int64_t head_dim) { return head_dim * KV_TILE * 4; }
static int64_t f32_v_bytes(int64_t head_dim) { return kv_head_pad(head_dim) * KV_TILE * 4; }
static void f32_pack_k(const float *k, int64_t head_dim, void *tile) { memcpy(tile, k, (size_t)f32_k_bytes(head_dim)); }
static void f32_pack_v(const float *v, int64_t head_dim, void *tile) { memcpy(tile, v, (size_t)f32_v_bytes(head_dim)); }
static void f32_unpack_k(const void *tile, int64_t head_dim, float *k)
{
    memcpy(k, tile, (size_t)f32_k_bytes(head_dim));
}
static void f32_unpack_v(const void *tile, int64_t head_dim, float *v)
{
    memcpy(v, tile, (size_t)f32_v_bytes(head_dim));
}

static void f32_put_k(void *tile, int64_t head_dim, int64_t lane, const float *k)
{
    float *to = (float *)tile + lane;
    for (int64_t i = 0; i < head_dim; i++)
        to[i * KV_TILE] = k[i];
}

static void f32_put_v(void *tile, int64_t head_dim, int64_t lane, const float *v)
{
    float *to = (float *)tile + lane * kv_head_pad(head_dim);
    memcpy(to, v, (size_t)head_dim * sizeof(float));
    memset(to + head_dim, 0, (size_t)(kv_head_pad(head_dim) - head_dim) * sizeof(float));
}

static void f32_k_dot(const void *tile, int64_t stride, int64_t head_dim, const float *q, int64_t ld_q, int64_t rows,
                      int64_t lanes, float *scores)
{
    gemm_f32(rows, q, ld_q, tile, stride, head_dim, lanes, scores, KV_TILE, 0);
}

static void f32_v_accumulate(const void *tile, int64_t head_dim, const float *p, int64_t rows, int64_t tokens,
                             float *acc)
{
    int64_t width = kv_head_pad(head_dim);
    gemm_f32(rows, p, KV_TILE, tile, width, tokens, width, acc, width, 1);
}

/* f16 */
static int64_t f16_k_bytes(int64_t head_dim) { return head_dim * KV_TILE * 2; }
static int64_t f16_v_bytes(int64_t head_dim) { return kv_head_pad(head_dim) * KV_TILE * 2; }

static void to_f16(const float *x, int64_t n, uint16_t *h)
{
    for (int64_t i = 0; i < n; i += 16)
        vf_store_f16(h + i, vf_load(x + i));
}

static void from_f16(const uint16_t *h, int64_t n, float *x)
{
    for (int64_t i = 0; i < n; i += 16)
        vf_store(x + i, vf_load_f16(h + i));
}

static void f16_pack_k(const float *k, int64_t head_dim, void *tile) { to_f16(k, head_dim * KV_TILE, tile); }
static void f16_pack_v(const float *v, int64_t head_dim, void *tile)
{
    to_f16(v, kv_head_pad(head_dim) * KV_TILE, tile);
}
static void f16_unpack_k(const void *tile, int64_t head_dim, float *k) { from_f16(tile, head_dim * KV_TILE, k); }
static void f16_unpack_v(const void *tile, int64_t head_dim, float *v)
{
    from_f16(tile, kv_head_pad(head_dim) * KV_TILE, v);
}

static void f16_put_k(void *tile, int64_t head_dim, int64_t lane, const float *k)
{
    uint16_t *to = (uint16_t *)tile + lane, part[16];
    for (int64_t i = 0; i < head_dim; i += 16) {
        int64_t n = head_dim - i < 16 ? head_dim - i : 16;
        vf_store_f16(part, n == 16 ? vf_load(k + i) : vf_load_part(k + i, n));
        for (int64_t j = 0; j < n; j++)
            to[(i + j) * KV_TILE] = part[j];
    }
}

static void f16_put_v(void *tile, int64_t head_dim, int64_t lane, const float *v)
{
    uint16_t *to = (uint16_t *)tile + lane * kv_head_pad(head_dim);
    for (int64_t i = 0; i < head_dim; i += 16)
        vf_store_f16(to + i, head_dim - i >= 16 ? vf_load(v + i) : vf_load_part(v + i, head_dim - i));
}

static void f16_k_dot(const void *tile, int64_t stride, int64_t head_dim, const float *q, int64_t ld_q, int64_t rows,
                      int64_t lanes, float *scores)
{
    gemm_f16(rows, q, ld_q, tile, stride, head_dim, lanes, scores, KV_TILE, 0);
}

static void f16_v_accumulate(const void *tile, int64_t head_dim, const float *p, int64_t rows, int64_t tokens,
                             float *acc)
{
    int64_t width = kv_head_pad(head_dim);
    gemm_f16(rows, p, KV_TILE, tile, width, tokens, width, acc, width, 1);
}

const kv_format KV_CACHE_FORMAT(f32) = {
    "f32",        32,           0,         f32_k_bytes, f32_v_bytes, f32_pack_k,      f32_pack_v,
    f32_unpack_k, f32_unpack_v, f32_put_k, f32_put_v,   f32_k_dot,   f32_v_accumulate,
};
const kv_format KV_CACHE_FORMAT(f16) = {
    "f16",        16,           0,         f16_k_bytes, f16_v_bytes, f16_pack_k,      f16_pack_v,
    f16_unpack_k, f16_unpack_v, f16_put_k, f16_put_v,   f16_k_dot,   f16_v_accumulate,
};
