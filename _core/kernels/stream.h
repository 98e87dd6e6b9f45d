/* Reads memory as fast as it comes: what the speed of everything else is compared with. */
#ifndef KVRUN_STREAM_H
#define KVRUN_STREAM_H

#include <stdint.h>

typedef uint64_t kv_quarter __attribute__((vector_size(16)));

/* Sums of n bytes, a multiple of 256, that start on a 64-byte boundary, in two ways, of which one or the other is
 * faster: lines from four places in turn, since hardware prefetches several streams faster than one; and one line
 * after the other, asked for 8 KiB ahead. Sixteen-byte additions, which every instruction set has, take a fraction
 * of the time of reading from memory. */
static inline uint64_t kv_stream_four(const void *data, int64_t n)
{
    const int64_t step = n / 64; /* a quarter of the data, in vectors */
    const kv_quarter *p = data;
    kv_quarter a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};
    for (const kv_quarter *end = p + step; p < end; p += 4) {
        const kv_quarter *q = p + step, *r = q + step, *s = r + step;
        a += p[0]; b += p[1]; c += p[2]; d += p[3];
        e += q[0]; f += q[1]; g += q[2]; h += q[3];
        a += r[0]; b += r[1]; c += r[2]; d += r[3];
        e += s[0]; f += s[1]; g += s[2]; h += s[3];
    }
    a += b + c + d + e + f + g + h;
    return a[0] + a[1];
}

static inline uint64_t kv_stream_one(const void *data, int64_t n)
{
    const kv_quarter *p = data;
    kv_quarter a = {0}, b = {0}, c = {0}, d = {0};
    for (const kv_quarter *end = p + n / 16; p < end; p += 4) {
        __builtin_prefetch((const char *)p + 8192);
        a += p[0]; b += p[1]; c += p[2]; d += p[3];
    }
    a += b + c + d;
    return a[0] + a[1];
}

#endif
