/* Arithmetic of the sampler: the same result on every platform, so plain C, no library functions, and no
 * multiply-add contraction (the build passes -ffp-contract=off for this module). */
#ifndef KVRUN_SAMPLER_MATH_H
#define KVRUN_SAMPLER_MATH_H

#include <stdint.h>
#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

/* exp(x) for x <= 0 in float64, relative error below 1e-15; 0 below -700.
 * x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor series of exp(r) to r^13. */
static inline double sampler_exp(double x)
{
    static const double inverse[12] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0,
        1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0,
        1.0 / 6.0, 0.5};
    double kept = x >= -700.0 ? x : -700.0;
    int32_t n = (int32_t)(kept * 1.4426950408889634 - 0.5);         /* truncation: x <= 0, so this rounds */
    double r = kept - (double)n * 6.93147180369123816490e-01;   /* ln 2 in two parts, the first of 33 bits */
    r -= (double)n * 1.90821492927058770002e-10;
    double sum = inverse[0];
    for (int i = 1; i < 12; i++)
        sum = sum * r + inverse[i];
    sum = (sum * r + 1.0) * r + 1.0;
    union { uint64_t bits; double value; } power = {(uint64_t)(n + 1023) << 52};   /* 2^n: n >= -1010 */
    return x >= -700.0 ? sum * power.value : 0.0;
}

/* splitmix64 (Steele, Lea, Flood 2014): spreads a seed over the generator's state. */
static inline uint64_t sampler_splitmix(uint64_t *state)
{
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static inline uint64_t sampler_rotl(uint64_t x, int k)
{
    return (x << k) | (x >> (64 - k));
}

/* xoshiro256++ (Blackman, Vigna 2019), its upper 53 bits as a float64 in [0, 1). */
static inline double sampler_uniform(uint64_t s[4])
{
    uint64_t result = sampler_rotl(s[0] + s[3], 23) + s[0];
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = sampler_rotl(s[3], 45);
    return (double)(result >> 11) * (1.0 / 9007199254740992.0);
}

/* 1 when every float is finite: no exponent is all ones. */
static inline int sampler_all_finite(const float *x, int64_t n)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return !bad;
}

#endif
