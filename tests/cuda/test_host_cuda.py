"""CUDA on the host does what a GPU does: the tests of the kernels rest on it."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvrun.cuda import abi
from support.cuda.host_device import compiled

SOURCE = (
    abi.with_headers("common.cuh")
    + r"""
extern "C" __global__ void halves(const float *x, uint16_t *h, float *y)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    h[i] = float_to_half(x[i]);
    y[i] = half_to_float(h[i]);
}
extern "C" __global__ void products(const uint16_t *a, const uint16_t *b, float *d) // a [16][16], b [16][8] by columns
{
    int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
    float x[4] = {1, 1, 1, 1};
    const uint32_t *rows[2] = {(const uint32_t *)(a + 16 * g), (const uint32_t *)(a + 16 * (g + 8))};
    const uint32_t *column = (const uint32_t *)(b + 16 * g);
    int k = t / 2;
    mma_m16n8k16(x, rows[0][k], rows[1][k], rows[0][k + 4], rows[1][k + 4], column[k], column[k + 4]);
    for (int i = 0; i < 4; i++)
        d[(g + i / 2 * 8) * 8 + t + i % 2] = x[i];
}
extern "C" __global__ void sums(const float *x, float *sum, float *most, int *bytes)
{
    __shared__ float scratch[8];
    int i = threadIdx.x + blockDim.x * threadIdx.y;
    float value = x[blockIdx.x * 256 + i];
    sum[blockIdx.x * 256 + i] = block_sum(value, scratch);
    most[blockIdx.x * 256 + i] = block_max(value, scratch);
    if (i == 7)
        return; // the others do not wait for it
    __syncthreads();
    if (i == 0) {
        bytes[blockIdx.x] = dp4a(0xff807f01u, 0x02fffffeu, 5);
        bytes[gridDim.x + blockIdx.x] = dp4a_unsigned(0xff807f01u, 0x02fffffeu, 5);
    }
}
extern "C" __global__ void next_thread(int *out, int with_barrier)
{
    SHARED(memory);
    int *x = (int *)memory, last = blockDim.x - 1;
    x[threadIdx.x] = threadIdx.x;
    if (with_barrier)
        __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x < last ? threadIdx.x + 1 : 0];
}
extern "C" __global__ void lanes(uint32_t *out)
{
    uint32_t lane = threadIdx.x;
    out[lane] = __shfl_down_sync(0xffffffffu, lane, 3);
    out[32 + lane] = __shfl_up_sync(0xffffffffu, lane, 3);
    out[64 + lane] = __shfl_sync(0xffffffffu, lane, 40);
    out[96 + lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    out[128 + lane] = __any_sync(0xffffffffu, lane == 9) + 2 * __all_sync(0xffffffffu, lane < 32);
    out[128 + lane] += 4 * __all_sync(0xffffffffu, lane);
}
extern "C" __global__ void past_the_end(int i)
{
    SHARED(memory);
    memory[i].x = 1;
}
extern "C" __global__ void waits_in_vain()
{
    if (threadIdx.x < 32)
        __syncthreads();
    else if (threadIdx.x == 32)
        __syncwarp();
    else
        while (true)
            __syncthreads();
}
"""
)


def launch(name, grid, block, shared, *args):
    values = [np.uint64(a.ctypes.data) if isinstance(a, np.ndarray) else np.int32(a) for a in args]
    values = [value.reshape(1) for value in values]
    pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
    sizes = map(ctypes.c_uint, (grid, 1, 1, *block))
    getattr(compiled("host_cuda", SOURCE), f"launch_{name}")(*sizes, ctypes.c_size_t(shared), pointers)


def test_halves():
    bits = np.arange(1 << 20, dtype=np.uint64) * 4099 % (1 << 32)  # all signs and exponents
    near = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # all halves, and next to half way
    with np.errstate(all="ignore"):
        middle = (near[:-1] + near[1:]) / 2
        ways = [np.nextafter(middle, np.float32(way)) for way in (-np.inf, np.inf)]
        x = np.concatenate([bits.astype(np.uint32).view(np.float32), near, middle, *ways, [65519.99, 65520]])
        x = np.resize(x[~np.isnan(x)].astype(np.float32), 2048 * 640)
        expected = x.astype(np.float16)
    h, y = np.zeros(len(x), np.uint16), np.zeros(len(x), np.float32)
    launch("halves", len(x) // 640, (640, 1, 1), 0, x, h, y)
    np.testing.assert_array_equal(h, expected.view(np.uint16))
    np.testing.assert_array_equal(y, expected.astype(np.float32))


def test_products():
    rng = np.random.default_rng(1)
    a, b = rng.integers(-8, 8, (16, 16)).astype(np.float16), rng.integers(-8, 8, (8, 16)).astype(np.float16)
    d = np.zeros((16, 8), np.float32)
    launch("products", 1, (32, 1, 1), 0, a, b, d)
    np.testing.assert_array_equal(d, 1 + a.astype(np.float32) @ b.astype(np.float32).T)


def test_sums_and_bytes():
    x = np.random.default_rng(2).integers(-99, 99, (3, 256)).astype(np.float32)
    sum_, most, numbers = np.zeros((3, 256), np.float32), np.zeros((3, 256), np.float32), np.zeros((2, 3), np.int32)
    launch("sums", 3, (256, 1, 1), 0, x, sum_, most, numbers)
    np.testing.assert_array_equal(sum_, np.repeat(x.sum(1, keepdims=True), 256, 1))
    np.testing.assert_array_equal(most, np.repeat(x.max(1, keepdims=True), 256, 1))
    a, signed, b = np.array([1, 127, 128, 255]), np.array([1, 127, -128, -1]), np.array([-2, -1, -1, 2])
    assert (numbers[0] == 5 + signed @ b).all() and (numbers[1] == 5 + a @ b).all()


def test_lanes():
    out, lane = np.zeros((5, 32), np.uint32), np.arange(32)
    launch("lanes", 1, (32, 1, 1), 0, out)
    expected = [
        np.where(lane < 29, lane + 3, lane),
        np.where(lane > 2, lane - 3, lane),
        8 + 0 * lane,
        sum(1 << i for i in range(0, 32, 3)) + 0 * lane,
        3 + 0 * lane,
    ]
    np.testing.assert_array_equal(out, expected)


def test_a_missing_barrier_shows():
    expected, out = np.tile(np.roll(np.arange(64), -1), (2, 1)), np.zeros((2, 64), np.int32)
    launch("next_thread", 2, (64, 1, 1), 256, out, 1)
    np.testing.assert_array_equal(out, expected)
    launch("next_thread", 2, (64, 1, 1), 256, out, 0)
    assert (out[0] != expected[0]).sum() == 63 and (out[1] != expected[1]).sum() == 1


@pytest.mark.parametrize(
    "call, message",
    [
        ("'next_thread', 1, (2048, 1, 1), 0, np.zeros(2048, np.int32), 0", "no GPU has such blocks"),
        ("'next_thread', 1, (32, 1, 1), 240 << 10, np.zeros(32, np.int32), 0", "no GPU has such blocks"),
        ("'next_thread', 0, (32, 1, 1), 128, np.zeros(32, np.int32), 0", "no GPU has such a grid"),
        ("'waits_in_vain', 1, (64, 1, 1), 0", "threads wait for each other in vain"),
        ("'past_the_end', 1, (1, 1, 1), 160, 10", ""),
    ],
)
def test_mistakes_end_the_process(call, message):
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
    code += "from test_host_cuda import launch, np\nlaunch('lanes', 1, (32, 1, 1), 0, np.zeros(160, np.uint32))\n"
    code += f"launch({call})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode < 0  # by a signal
    assert re.search(message, ended.stderr)


def test_structures_have_the_layout_that_python_reads():
    """Sizes of the structures and offsets of their fields, as a C++ compiler sees them."""
    structures = abi.structures()
    values = []
    for name, dtype in structures.items():
        values += [f"sizeof({name})", *(f"__builtin_offsetof({name}, {field})" for field in dtype.names)]
    text = f'{abi.with_headers("abi.cuh")}\nextern "C" __global__ void layout(int64_t *out)\n{{\n'
    text += "\n".join(f"    out[{i}] = {value};" for i, value in enumerate(values)) + "\n}\n"
    found = np.zeros(len(values), np.int64)
    arguments = (ctypes.c_void_p * 1)(np.array([found.ctypes.data], np.uint64).ctypes.data)
    one = (ctypes.c_uint(1),) * 6
    compiled("layout", text).launch_layout(*one, ctypes.c_size_t(0), arguments)
    expected = []
    for dtype in structures.values():
        expected += [dtype.itemsize, *(dtype.fields[field][1] for field in dtype.names)]
    assert found.tolist() == expected and len(structures) == 6


def test_what_is_not_understood_of_a_structure_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "abi.cuh").write_text("struct A {\n    double x;\n};\n")
    monkeypatch.setattr(abi, "KERNELS", tmp_path)
    with pytest.raises(ValueError, match="abi.cuh: A: 'double x'"):
        abi.structures.__wrapped__()
