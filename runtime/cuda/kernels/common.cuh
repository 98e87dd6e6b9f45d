// What every kernel uses: types, structures passed by value, conversions, loads, sums of a warp and of a block.
//
// No header of CUDA is included: NVRTC has none here. All but the PTX compiles as C++ too, behind a header that
// supplies what CUDA has built in and what is under `#ifndef KVRUN_HOST` below.
#pragma once

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#endif

#ifndef KVRUN_HOST
#define DEVICE static __device__ __forceinline__
#define KV_UNROLL _Pragma("unroll")
#define SHARED(name) extern __shared__ uint4 name[] // the dynamic shared memory
#endif

#include "abi.cuh"

// Numbers -------------------------------------------------------------------------------------------------------------

#ifndef KVRUN_HOST

DEVICE float half_to_float(uint16_t h)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DEVICE uint16_t float_to_half(float f)
{
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// c + the products of four signed bytes each.
DEVICE int dp4a(uint32_t a, uint32_t b, int c)
{
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(c) : "r"(a), "r"(b));
    return c;
}

// The same with unsigned bytes in a.
DEVICE int dp4a_unsigned(uint32_t a, uint32_t b, int c)
{
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(c) : "r"(a), "r"(b));
    return c;
}

// 16 bytes that are read once and that no kernel running now writes.
DEVICE uint4 load_stream(const void *p)
{
    uint4 x;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
        : "l"(p));
    return x;
}

// d [16][8] += a [16][16] b [16][8], halves, sums in float32; of one warp, operands spread as PTX has them.
#if __CUDA_ARCH__ >= 800
DEVICE void mma_m16n8k16(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
DEVICE void mma_m16n8k8(float *d, uint32_t a0, uint32_t a1, uint32_t b0)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

DEVICE void mma_m16n8k16(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    mma_m16n8k8(d, a0, a1, b0);
    mma_m16n8k8(d, a2, a3, b1);
}
#endif

#endif

// Of kernels that may start before the one before them has ended (programmatic dependent launch): waits for its end;
// lets the next one start. Nothing where they are not launched so.
DEVICE void wait_for_previous()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_next_start()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE float bf16_to_float(uint16_t b) { return __uint_as_float((uint32_t)b << 16); }

// The low and the high half of a register.
DEVICE float2 halves_to_floats(uint32_t x)
{
    float2 y;
    y.x = half_to_float((uint16_t)x);
    y.y = half_to_float((uint16_t)(x >> 16));
    return y;
}

// Sums and maxima, which every thread gets ----------------------------------------------------------------------------

DEVICE float warp_sum(float x)
{
    KV_UNROLL
    for (int i = WARP / 2; i > 0; i /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

DEVICE int warp_sum_int(int x)
{
    KV_UNROLL
    for (int i = WARP / 2; i > 0; i /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

DEVICE float warp_max(float x)
{
    KV_UNROLL
    for (int i = WARP / 2; i > 0; i /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

// Of a block of whole warps in one dimension. scratch: shared, a float for each warp; free again on return.
DEVICE float block_sum(float x, float *scratch)
{
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0)
        scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : 0.f);
    __syncthreads();
    return x;
}

DEVICE float block_max(float x, float *scratch)
{
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0)
        scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    x = warp_max(scratch[lane < warps ? lane : 0]);
    __syncthreads();
    return x;
}
