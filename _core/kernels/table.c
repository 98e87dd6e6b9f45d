/* This level's table of kernels. */
#include "weights/panels.h"

void KV_NAME(kv_fill_vector)(kv_kernels *table);
void KV_NAME(kv_fill_formats)(kv_kernels *table);
void KV_NAME(kv_fill_softmax)(kv_kernels *table);
void KV_NAME(kv_fill)(kv_kernels *table);

void KV_NAME(kv_fill)(kv_kernels *table)
{
    table->name = KV_STRING(KV_LEVEL);
    KV_NAME(kv_fill_vector)(table);
#define KV_FILL(NAME, name) table->matmul[KV_##NAME] = KV_NAME(kv_matmul_##name);
    KV_EACH_WEIGHT_TYPE(KV_FILL)
#undef KV_FILL
    KV_NAME(kv_fill_formats)(table);
    KV_NAME(kv_fill_softmax)(table);
}
