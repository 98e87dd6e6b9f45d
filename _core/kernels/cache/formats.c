/* This level's table of cache formats. */
#include "cache/formats.h"

#define KV_COUNT(ID, NAME) +1
_Static_assert(0 KV_CACHE_FORMATS(KV_COUNT) == KV_FORMATS, "a format has a number and no row, or a row and no number");

void KV_NAME(kv_fill_formats)(kv_kernels *table);
void KV_NAME(kv_fill_formats)(kv_kernels *table)
{
#define KV_ROW(ID, NAME) table->format[KV_FORMAT_##ID] = KV_CACHE_FORMAT(NAME);
    KV_CACHE_FORMATS(KV_ROW)
}
