// What both attention kernels are made of: sizes, warp operations, where rows and tiles are.
#pragma once
#include "common.cuh"
#include "cache.cuh"

// Compiled for one head_dim and one pair of formats when these are defined, else for any.
#ifdef KV_HEAD_DIM
enum { MAX_PAD = (KV_HEAD_DIM + 15) / 16 * 16 };
DEVICE int head_dim_of(const CacheLayout &) { return KV_HEAD_DIM; }
#else
enum { MAX_PAD = MAX_HEAD_DIM };
DEVICE int head_dim_of(const CacheLayout &c) { return c.head_dim; }
#endif
#ifdef KV_K_FORMAT
DEVICE int k_format_of(const CacheLayout &) { return KV_K_FORMAT; }
DEVICE int v_format_of(const CacheLayout &) { return KV_V_FORMAT; }
#else
DEVICE int k_format_of(const CacheLayout &c) { return c.k_format; }
DEVICE int v_format_of(const CacheLayout &c) { return c.v_format; }
#endif
DEVICE int head_pad_of(const CacheLayout &c) { return (head_dim_of(c) + 15) / 16 * 16; }

enum { MAX_STEPS = MAX_PAD / 16, MAX_GROUPS = (MAX_PAD + GROUP - 1) / GROUP };

// Pairs of float16 in a register ------------------------------------------------------------------------------------

#ifdef KVRUN_HOST

DEVICE uint32_t join(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }
DEVICE uint32_t half2_pack(float low, float high) { return join(float_to_half(low), float_to_half(high)); }
DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) // rounded once, by way of double
{
    float low = (float)((double)half_to_float((uint16_t)a) * half_to_float((uint16_t)b) + half_to_float((uint16_t)c));
    float high = (float)((double)half_to_float(a >> 16) * half_to_float(b >> 16) + half_to_float(c >> 16));
    return half2_pack(low, high);
}
DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) { return half2_fma(a, b, 0x80008000u); }
DEVICE uint32_t half2_add(uint32_t a, uint32_t b) { return half2_fma(a, 0x3c003c00u, b); }
DEVICE uint32_t half2_max(uint32_t a, uint32_t b)
{
    float low = fmaxf(half_to_float((uint16_t)a), half_to_float((uint16_t)b));
    return half2_pack(low, fmaxf(half_to_float(a >> 16), half_to_float(b >> 16)));
}
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t select)
{
    uint64_t bytes = a | (uint64_t)b << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++)
        out |= (uint32_t)(bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
// 8 x 8 halves, each lane with two of row lane / 4, transposed.
DEVICE uint32_t transpose(uint32_t x)
{
    int lane = threadIdx.x % 32, row = lane % 4 * 2, column = lane / 4;
    uint32_t low = __shfl_sync(0xffffffffu, x, 4 * row + column / 2);
    uint32_t high = __shfl_sync(0xffffffffu, x, 4 * row + 4 + column / 2);
    return join((uint16_t)(low >> 16 * (column & 1)), (uint16_t)(high >> 16 * (column & 1)));
}
// Four 8 x 8 matrices of halves, transposed; lane 8 m + r has the address of row r of matrix m.
DEVICE void load_transposed(uint32_t *x, const uint8_t *row)
{
    int lane = threadIdx.x % 32;
    uint64_t address = (uint64_t)row;
    for (int m = 0; m < 4; m++) {
        uint16_t part[2];
        for (int i = 0; i < 2; i++) {
            int from = 8 * m + lane % 4 * 2 + i;
            uint64_t at = __shfl_sync(0xffffffffu, (uint32_t)address, from);
            at |= (uint64_t)__shfl_sync(0xffffffffu, (uint32_t)(address >> 32), from) << 32;
            part[i] = ((const uint16_t *)at)[lane / 4];
        }
        x[m] = join(part[0], part[1]);
    }
}
// 16 bytes to shared memory, zeros if they are not `real`.
DEVICE void copy_16(uint8_t *to, const uint8_t *from, bool real)
{
    for (int i = 0; i < 16; i++)
        to[i] = real ? from[i] : 0;
}
DEVICE void end_copies() {}
DEVICE void wait_but_one() {}
DEVICE void wait_all() {}
DEVICE float load_fresh(const float *x) { return *x; }
DEVICE float power_of_2(float x) { return exp2f(x); }

#else

#if __CUDA_ARCH__ >= 800
DEVICE uint32_t half2_pack(float low, float high)
{
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(x) : "f"(low), "f"(high));
    return x;
}
DEVICE uint32_t half2_max(uint32_t a, uint32_t b)
{
    uint32_t x;
    asm("max.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}
#else
DEVICE uint32_t half2_pack(float low, float high) { return float_to_half(low) | (uint32_t)float_to_half(high) << 16; }
DEVICE uint32_t half2_max(uint32_t a, uint32_t b) // of numbers that are not negative
{
    uint32_t low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff, high = a >> 16 > b >> 16 ? a >> 16 : b >> 16;
    return low | high << 16;
}
#endif
DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t x;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}
DEVICE uint32_t half2_mul(uint32_t a, uint32_t b)
{
    uint32_t x;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}
DEVICE uint32_t half2_add(uint32_t a, uint32_t b)
{
    uint32_t x;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t select) { return __byte_perm(a, b, select); }
DEVICE uint32_t transpose(uint32_t x)
{
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
DEVICE uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
DEVICE void load_transposed(uint32_t *x, const uint8_t *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
#if __CUDA_ARCH__ >= 800
DEVICE void copy_16(uint8_t *to, const uint8_t *from, bool real)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
}
DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void wait_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
DEVICE void wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
DEVICE void copy_16(uint8_t *to, const uint8_t *from, bool real)
{
    *(uint4 *)to = real ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
}
DEVICE void end_copies() {}
DEVICE void wait_but_one() {}
DEVICE void wait_all() {}
#endif
DEVICE float load_fresh(const float *x) { return __ldcg(x); } // what another block has written
DEVICE float power_of_2(float x) // 2 ulp; 0 where the result is below the normal numbers
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

// d [16][8] += a [16][16] b [16][8], halves; of one warp.
DEVICE void multiply(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    mma_m16n8k16(d, a0, a1, a2, a3, b0, b1);
}

// The halves 0, 2 and 1, 3 of four.
DEVICE uint2 even_odd(uint2 x)
{
    uint2 y;
    y.x = permute(x.x, x.y, 0x5410);
    y.y = permute(x.x, x.y, 0x7632);
    return y;
}

// Scores before the softmax, to the base 2.
DEVICE float capped(float score, float cap) { return cap > 0 ? cap * tanhf(score / cap) : score; }

// Which of the tokens from `start` on, `tokens` at most, a query at `position` sees: [from, to).
struct Seen {
    int from, to;
};

DEVICE Seen seen_by(const CacheLayout &c, int64_t position, int64_t start, int tokens)
{
    int64_t to = position + 1 - start, from = c.sight ? to - c.sight : 0;
    Seen s;
    s.to = (int)(to < 0 ? 0 : to < tokens ? to : tokens);
    s.from = (int)(from < 0 ? 0 : from < tokens ? from : tokens);
    return s;
}

// One channel pair of a sink's key, at the place that row `place` of the tables moves it to: [0] and [half].
DEVICE float2 rotated_sink(const CacheLayout &c, const float *keys, const float *cosines, const float *sines, int place,
                           int i, int sink)
{
    int half = head_dim_of(c) / 2;
    int64_t at = ((int64_t)place * c.n_sinks + sink) * half + i;
    float a = keys[i * c.sink_lanes + sink], b = keys[(i + half) * c.sink_lanes + sink];
    float2 turned;
    turned.x = sub(mul(a, cosines[at]), mul(b, sines[at]));
    turned.y = add(mul(b, cosines[at]), mul(a, sines[at]));
    return turned;
}
