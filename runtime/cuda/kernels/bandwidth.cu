/* What the memory can do: reads all of it, as kernels that read weights do.
 *
 * read_memory(const uint4* data, int64_t n_bytes, unsigned* out)      any grid and block; n_bytes a multiple of 16
 */
#include "common.cuh"

extern "C" __global__ void read_memory(const uint4 *data, int64_t n_bytes, unsigned *out)
{
    int64_t n = n_bytes / 16, step = (int64_t)gridDim.x * blockDim.x;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = data[i], b = data[i + step], c = data[i + 2 * step], d = data[i + 3 * step];
        sum += (a.x ^ a.y ^ a.z ^ a.w) + (b.x ^ b.y ^ b.z ^ b.w) + (c.x ^ c.y ^ c.z ^ c.w) + (d.x ^ d.y ^ d.z ^ d.w);
    }
    for (; i < n; i += step)
        sum += data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
    if (sum == 0x9e3779b9) /* hardly ever, but the sums have to be computed */
        *out = sum;
}
