/* The cache formats, in the order of their numbers (enum kv_format_id). A new one takes a line here and a file beside
 * this one, which defines its row of the table, KV_CACHE_FORMAT(name), for the level that it is compiled for. Names
 * that users give, sizes and everything else follow from the row. */
#ifndef KVRUN_CACHE_FORMATS_H
#define KVRUN_CACHE_FORMATS_H

#include "simd/simd.h"

#define KV_CACHE_FORMATS(FORMAT)                                                                                       \
    FORMAT(F32, f32) /* float.c: exact, and what the sinks and the window of an f32 ring are kept in */                \
    FORMAT(F16, f16) /* float.c: what other windows are kept in */                                                     \
    FORMAT(Q8, q8)   /* quantized.c */                                                                                 \
    FORMAT(Q4, q4)                                                                                                     \
    FORMAT(Q2, q2)

#define KV_CACHE_FORMAT(NAME) KV_NAME(kv_cache_##NAME)

#define KV_DECLARE(ID, NAME) extern const kv_format KV_CACHE_FORMAT(NAME);
KV_CACHE_FORMATS(KV_DECLARE)
#undef KV_DECLARE

#endif
