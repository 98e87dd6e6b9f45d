/* Which levels were built (KV_HAVE_*, from setup.py) and which of them this CPU runs. */
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

void kv_fill_scalar(kv_kernels *table);
static int has_scalar(void) { return 1; }

#ifdef KV_HAVE_AVX2
void kv_fill_avx2(kv_kernels *table);
static int has_avx2(void)
{
    unsigned a, b, c, d; /* clang's __builtin_cpu_supports does not know f16c */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d)
           && (c & bit_F16C);
}
#endif

#ifdef KV_HAVE_AVX512
void kv_fill_avx512(kv_kernels *table);
static int has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
           && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef KV_HAVE_NEON
void kv_fill_neon(kv_kernels *table);
static int has_neon(void)
{
#ifdef __linux__
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every 64-bit Apple machine has the dot product */
#endif
}
#endif

/* Best first. */
static const struct { const char *name; int (*runs)(void); void (*fill)(kv_kernels *); } LEVELS[] = {
#ifdef KV_HAVE_AVX512
    {"avx512", has_avx512, kv_fill_avx512},
#endif
#ifdef KV_HAVE_AVX2
    {"avx2", has_avx2, kv_fill_avx2},
#endif
#ifdef KV_HAVE_NEON
    {"neon", has_neon, kv_fill_neon},
#endif
    {"scalar", has_scalar, kv_fill_scalar},
};
enum { N_LEVELS = sizeof LEVELS / sizeof LEVELS[0] };

int kv_kernels_find(const char *level, kv_kernels *table)
{
    for (int i = 0; i < N_LEVELS; i++)
        if ((!level || !strcmp(level, LEVELS[i].name)) && LEVELS[i].runs()) {
            LEVELS[i].fill(table);
            return 1;
        }
    return 0;
}
