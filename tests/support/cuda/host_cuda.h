/* CUDA on the host, for the kernels of runtime/cuda/kernels: put this in front of a module, and after it
 * HOST_LAUNCHER(name) for each kernel; compile as C++17 with KVRUN_HOST defined.
 *
 * Blocks run one after the other. Each thread of a block is a fiber that runs until it waits for others, so nothing
 * here is atomic or volatile. Blocks with an odd number run their threads from the last to the first: a missing barrier
 * shows as a wrong result in one of the orders. Masks of warps are ignored: all that have not returned take part.
 * Dynamic shared memory is filled with 0xFF, NaN as a float, and ends at a page that cannot be touched; stacks begin at
 * one.
 */
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if !defined(__x86_64__) || !defined(__linux__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __constant__ static
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define DEVICE static inline
#define KV_UNROLL
#define SHARED(name) uint4 *name = (uint4 *)host::dynamic_shared

using std::max;
using std::min;

struct uint3 {
    unsigned x, y, z;
};
struct int2 {
    int x, y;
};
struct __align__(16) int4 {
    int x, y, z, w;
};
struct __align__(8) uint2 {
    uint32_t x, y;
};
struct __align__(16) uint4 {
    uint32_t x, y, z, w;
};
struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;

// Fibers --------------------------------------------------------------------------------------------------------------

namespace host
{

enum { MAX_THREADS = 1024, WARP_SIZE = 32, MAX_WARPS = MAX_THREADS / WARP_SIZE };
enum { STACK = 256 << 10, PAGE = 64 << 10, SHARED_SPACE = 256 << 10 };
enum { APART = (4 << 10) + 320 }; // tops of stacks, beyond their equal distances: no two share a set of a cache or TLB

#if defined(__x86_64__) && defined(__linux__)

struct Context {
    void *top;
};
extern "C" void kvrun_host_switch(void **save, void *to);
__asm__(R"(
.text
.local kvrun_host_switch
kvrun_host_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
static void change(Context &from, Context &to) { kvrun_host_switch(&from.top, to.top); }
static void prepare(Context &context, uint8_t *stack, size_t size, void (*start)())
{
    void **top = (void **)(stack + size) - 2;
    *top = (void *)start;
    context.top = top - 6; // the registers that a switch takes from the stack
}

#else

struct Context {
    ucontext_t registers;
};
static void change(Context &from, Context &to) { swapcontext(&from.registers, &to.registers); }
static void prepare(Context &context, uint8_t *stack, size_t size, void (*start)())
{
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = size;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, start, 0);
}

#endif

// Threads that wait for each other: those of a warp, or of a block. `turn` counts how often all have met.
struct Meeting {
    int alive, arrived, turn;
};

static Context fibers[MAX_THREADS], caller;
static uint3 indices[MAX_THREADS];
static bool returned[MAX_THREADS];
static Meeting warps[MAX_WARPS], block;
static int n_threads, current, direction, switches; // switches: since threads last met
static uint64_t exchanged[2][MAX_THREADS];
static uint8_t *stacks, *dynamic_shared;
static void (*body)(void *);
static void *body_argument;

static int lane() { return current % WARP_SIZE; }
static int warp() { return current / WARP_SIZE; }

[[noreturn]] static void fail(const char *what)
{
    fprintf(stderr, "kernel on the host: %s (block %u %u %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z);
    abort();
}

// The next thread that has not returned, of `count` from `first` on; `from` itself if there is no other.
static int next_of(int from, int first, int count)
{
    int i = from;
    do {
        i += direction;
        if (i < first)
            i = first + count - 1;
        else if (i == first + count)
            i = first;
    } while (returned[i] && i != from);
    return i;
}

// Whoever comes back here sets `current` and `threadIdx` before.
static void go_on_with(int next)
{
    int from = current;
    current = next;
    threadIdx = indices[next];
    change(fibers[from], fibers[next]);
}

static void meet(Meeting &m)
{
    m.arrived = 0;
    m.turn++;
    switches = 0;
}

static void wait(Meeting &m, int first, int count)
{
    int turn = m.turn;
    if (++m.arrived == m.alive)
        meet(m);
    while (m.turn == turn) {
        int next = next_of(current, first, count);
        if (next == current || ++switches > 64 * MAX_THREADS)
            fail("threads wait for each other in vain");
        go_on_with(next);
    }
}

static void wait_for_warp()
{
    int first = warp() * WARP_SIZE;
    wait(warps[warp()], first, min<int>(WARP_SIZE, n_threads - first));
}

static void leave(Meeting &m)
{
    if (--m.alive && m.arrived == m.alive)
        meet(m);
}

static void thread()
{
    body(body_argument);
    returned[current] = true;
    switches = 0;
    leave(warps[warp()]);
    leave(block);
    Context none;
    if (!block.alive)
        change(none, caller);
    current = next_of(current, 0, n_threads);
    threadIdx = indices[current];
    change(none, fibers[current]);
}

static void run_block(bool backwards)
{
    block = {n_threads, 0, 0};
    for (int i = 0; i < MAX_WARPS; i++)
        warps[i] = {max(0, min<int>(WARP_SIZE, n_threads - i * WARP_SIZE)), 0, 0};
    for (int i = 0; i < n_threads; i++) {
        returned[i] = false;
        prepare(fibers[i], stacks + (size_t)i * (STACK + PAGE) + PAGE, STACK - i * APART % (STACK / 4), thread);
    }
    direction = backwards ? -1 : 1;
    switches = 0;
    current = backwards ? n_threads - 1 : 0;
    threadIdx = indices[current];
    change(caller, fibers[current]);
}

static uint8_t *reserve(size_t bytes)
{
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        fail("no memory");
    return (uint8_t *)p;
}

static void make_memory()
{
    stacks = reserve((size_t)MAX_THREADS * (STACK + PAGE));
    for (int i = 0; i < MAX_THREADS; i++)
        mprotect(stacks + (size_t)i * (STACK + PAGE), PAGE, PROT_NONE);
    dynamic_shared = reserve(SHARED_SPACE + PAGE);
    mprotect(dynamic_shared + SHARED_SPACE, PAGE, PROT_NONE);
}

static void run_grid(size_t shared)
{
    static uint8_t *space = (make_memory(), dynamic_shared);
    n_threads = blockDim.x * blockDim.y * blockDim.z;
    if (n_threads < 1 || n_threads > MAX_THREADS || shared > 227 << 10)
        fail("no GPU has such blocks");
    if (gridDim.x < 1 || gridDim.y < 1 || gridDim.z < 1 || gridDim.y > 65535 || gridDim.z > 65535)
        fail("no GPU has such a grid");
    for (int i = 0; i < n_threads; i++)
        indices[i] = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    dynamic_shared = space + SHARED_SPACE - (shared + 15) / 16 * 16;
    unsigned number = 0;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
                memset(dynamic_shared, 0xff, shared);
                run_block(number++ % 2);
            }
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void **args, std::index_sequence<I...>)
{
    kernel(*(std::remove_const_t<A> *)args[I]...);
}

template <class... A>
static void launch(void (*kernel)(A...), uint3 grid, uint3 threads, size_t shared, void **args)
{
    struct Call {
        void (*kernel)(A...);
        void **args;
    } what = {kernel, args};
    body = [](void *p) { call(((Call *)p)->kernel, ((Call *)p)->args, std::index_sequence_for<A...>()); };
    body_argument = &what;
    gridDim = grid, blockDim = threads;
    run_grid(shared);
}

// Which of two places a warp uses that exchanges something: what lies there is read until the warp has met once more,
// and the next exchange uses the other.
static int place() { return warps[warp()].turn % 2; }

// What each thread of a warp gives, and all can then read, by lane.
template <class T>
static const uint64_t *exchange(T value)
{
    static_assert(sizeof(T) <= 8, "one word");
    uint64_t *all = exchanged[place()], own = 0;
    memcpy(&own, &value, sizeof(T));
    all[current] = own;
    wait_for_warp();
    return all + current - lane();
}

template <class T>
static T received(T own, int from)
{
    const uint64_t *all = exchange(own);
    if (from >= 0 && from < WARP_SIZE)
        memcpy(&own, &all[from], sizeof(T));
    return own;
}

} // namespace host

// (gx, gy, gz, bx, by, bz, bytes of dynamic shared memory, addresses of the arguments)
#define HOST_LAUNCHER(name)                                                                                            \
    extern "C" __attribute__((visibility("default"))) void launch_##name(                                              \
        unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, size_t shared, void **args)      \
    {                                                                                                                  \
        host::launch(name, {gx, gy, gz}, {bx, by, bz}, shared, args);                                                  \
    }

// What CUDA has built in ----------------------------------------------------------------------------------------------

static inline void __syncthreads() { host::wait(host::block, 0, host::n_threads); }
static inline void __syncwarp(unsigned = 0) { host::wait_for_warp(); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <class T>
static T __shfl_sync(unsigned, T value, int from)
{
    return host::received(value, from & 31);
}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask)
{
    return host::received(value, host::lane() ^ mask);
}
template <class T>
static T __shfl_down_sync(unsigned, T value, int by)
{
    return host::received(value, host::lane() + by);
}
template <class T>
static T __shfl_up_sync(unsigned, T value, int by)
{
    return host::received(value, host::lane() - by);
}
static inline unsigned __ballot_sync(unsigned, int predicate)
{
    unsigned bits = 0;
    const uint64_t *all = host::exchange(predicate);
    int first = host::current - host::lane();
    for (int i = 0; i < 32 && first + i < host::n_threads; i++)
        bits |= (unsigned)(!host::returned[first + i] && all[i]) << i;
    host::wait_for_warp(); // none that took part has returned before
    return bits;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
static T atomicAdd(T *p, std::common_type_t<T> value)
{
    T old = *p;
    *p += value;
    return old;
}
template <class T>
static T atomicMax(T *p, std::common_type_t<T> value)
{
    T old = *p;
    *p = max(old, value);
    return old;
}

template <class To, class From>
static To host_bits(From from)
{
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
static inline uint32_t __float_as_uint(float x) { return host_bits<uint32_t>(x); }
static inline int __float_as_int(float x) { return host_bits<int>(x); }
static inline float __uint_as_float(uint32_t x) { return host_bits<float>(x); }
static inline float __int_as_float(int x) { return host_bits<float>(x); }

template <class T>
static T __ldg(const T *p)
{
    return *p;
}
template <class T>
static T __ldcg(const T *p)
{
    return *p;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select)
{
    uint64_t bytes = a | (uint64_t)b << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++)
        out |= (uint32_t)(bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

// What common.cuh does in PTX -----------------------------------------------------------------------------------------

static inline float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13)
        return __uint_as_float(sign | (rest + (112u << 23)) | 0x7f800000);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));
}

static inline uint16_t float_to_half(float f)
{
    uint32_t bits = __float_as_uint(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return 0x7fff;
    if (rest >= 0x477ff000) // 65520 and more
        return sign | 0x7c00;
    if (rest < 0x38800000) // below the normal numbers: the sum is rounded where they end
        return sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000);
    return sign | ((rest + 0xfff + (rest >> 13 & 1)) - (112u << 23)) >> 13;
}

static inline int dp4a(uint32_t a, uint32_t b, int c)
{
    for (int i = 0; i < 32; i += 8)
        c += (int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}
static inline int dp4a_unsigned(uint32_t a, uint32_t b, int c)
{
    for (int i = 0; i < 32; i += 8)
        c += (uint8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}

static inline uint4 load_stream(const void *p)
{
    if ((uintptr_t)p % 16)
        host::fail("16 bytes loaded from an odd address");
    return *(const uint4 *)p;
}

static void mma_m16n8k16(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    static float left[2][host::MAX_WARPS][16][16], right[2][host::MAX_WARPS][8][16]; // rows of a, columns of b
    int g = host::lane() / 4, t = host::lane() % 4, place = host::place();
    uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    float(*x)[16] = left[place][host::warp()], (*y)[16] = right[place][host::warp()];
    for (int i = 0; i < 4; i++) {
        x[g + i % 2 * 8][2 * t + i / 2 * 8] = half_to_float((uint16_t)a[i]);
        x[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = half_to_float((uint16_t)(a[i] >> 16));
    }
    for (int i = 0; i < 2; i++) {
        y[g][2 * t + i * 8] = half_to_float((uint16_t)b[i]);
        y[g][2 * t + i * 8 + 1] = half_to_float((uint16_t)(b[i] >> 16));
    }
    host::wait_for_warp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++)
            d[i] += x[g + i / 2 * 8][k] * y[2 * t + i % 2][k];
}
