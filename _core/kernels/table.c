/* This level's table of kernels. */
#include "simd/simd.h"

void KV_NAME(kv_fill_vector)(kv_kernels *table);
void KV_NAME(kv_fill_matmul)(kv_kernels *table);
void KV_NAME(kv_fill_kquants)(kv_kernels *table);
void KV_NAME(kv_fill_formats)(kv_kernels *table);
void KV_NAME(kv_fill_softmax)(kv_kernels *table);
void KV_NAME(kv_fill)(kv_kernels *table);

void KV_NAME(kv_fill)(kv_kernels *table)
{
    table->name = KV_STRING(KV_LEVEL);
    KV_NAME(kv_fill_vector)(table);
    KV_NAME(kv_fill_matmul)(table);
    KV_NAME(kv_fill_kquants)(table);
    KV_NAME(kv_fill_formats)(table);
    KV_NAME(kv_fill_softmax)(table);
}
