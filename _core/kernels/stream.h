/* Reads memory as fast as it comes: what the speed of everything else is compared with. */
#ifndef KVRUN_STREAM_H
#define KVRUN_STREAM_H

#include <stdint.h>

typedef uint64_t kv_line __attribute__((vector_size(64)));

/* Sum of n bytes, a multiple of 256, that start on a 64-byte boundary. Four places are read in turn, since hardware
 * prefetches several streams faster than one. Two accumulators, each a whole line wide, keep additions well below
 * the time of the loads, at the plainest instruction set too. */
static inline uint64_t kv_stream_sum(const void *data, int64_t n)
{
    const kv_line *line = data;
    const int64_t quarter = n / 256;
    kv_line a = {0}, b = {0};
    for (int64_t i = 0; i < quarter; i++) {
        a += line[i];
        b += line[i + quarter];
        a += line[i + 2 * quarter];
        b += line[i + 3 * quarter];
    }
    a += b;
    return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

#endif
