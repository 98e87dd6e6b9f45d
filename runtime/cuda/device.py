"""The GPU by way of CuPy: memory, kernels, streams, captured graphs, matrix products. Knows nothing of models.

Kernels are compiled by NVRTC when they are first prepared; CuPy keeps them in its cache (~/.cupy/kernel_cache, or the
folder CUPY_CACHE_DIR). Addresses are plain integers, and streams CuPy's.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from kvrun.cuda import abi
from kvrun.cuda.launch import bandwidth
from kvrun.errors import KvrunError, OptionError, one_line

OPTIONS = ("--std=c++17",)
SHARED_BY_DEFAULT = 48 << 10  # bytes of dynamic shared memory that a kernel has without asking
LEAST_CAPABILITY = (7, 5)
EARLY_CAPABILITY = (9, 0)  # kernels may start before the one before them has ended
_R_32F, _R_16F, _COMPUTE_32F, _N, _T, _GEMM_DEFAULT = 0, 2, 68, 0, 1, -1  # of cuBLAS
BANDWIDTH_BYTES = 1 << 30


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: 64 bytes of value."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


_PROGRAMMATIC_STREAM_SERIALIZATION = 6


def _early_launcher(capability: tuple[int, int]) -> Any:
    """The driver's cuLaunchKernelEx, None where kernels wait for each other in any case. CuPy does not have it."""
    if capability < EARLY_CAPABILITY:
        return None
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return function


class CudaDevice:
    """The device that is current when this is made. `memory_limit`: bytes of it to use at most.

    `early`, False at first: kernels of abi.EARLY may start before the one before them has ended, on devices that can
    (programmatic stream serialization). What that does to results can only be seen on a GPU.
    """

    def __init__(self, memory_limit: int | None = None) -> None:
        self._check()
        properties = runtime.getDeviceProperties(runtime.getDevice())
        self.name = properties["name"].decode()
        self.n_multiprocessors = int(properties["multiProcessorCount"])
        self.capability = (properties["major"], properties["minor"])
        if self.capability < LEAST_CAPABILITY:
            raise OptionError(
                f"device: {self.name} has compute capability {'.'.join(map(str, self.capability))}; "
                f"at least {'.'.join(map(str, LEAST_CAPABILITY))} is needed"
            )
        self.architecture = "sm_{}{}".format(*self.capability)
        self.early = False
        self._launch_early = _early_launcher(self.capability)
        self._limit = memory_limit
        self._pool = cupy.cuda.MemoryPool()
        if memory_limit is not None:
            self._pool.set_limit(size=memory_limit)
        self.shared_per_multiprocessor = int(properties["sharedMemPerMultiprocessor"])
        self.shared_per_block = int(properties["sharedMemPerBlockOptin"])
        self._kernels: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._shared: dict[tuple[str, tuple[str, ...]], int] = {}

    @staticmethod
    def _check() -> None:
        """OptionError unless there is a driver, and a device."""
        driver = count = 0
        try:
            driver = runtime.driverGetVersion()
            count = runtime.getDeviceCount() if driver else 0
        except runtime.CUDARuntimeError as error:
            if driver and "NoDevice" not in str(error):  # most likely one too old for this CuPy
                raise OptionError(f"device: cuda cannot be used: {one_line(error)}") from None
        if not driver:
            raise OptionError("device: cuda needs NVIDIA's driver, which is not there")
        if not count:
            raise OptionError("device: cuda needs an NVIDIA GPU, and the driver finds none")

    def prepare(self, launch: abi.Launch) -> Any:
        """The compiled kernel of a launch, with the shared memory that it wants. KvrunError if it does not compile,
        OptionError if the device has not so much."""
        key = launch.kernel, launch.options
        if key not in self._kernels:
            self._kernels |= self._compile(abi.module_of(launch.kernel), launch.options)
        kernel = self._kernels[key]
        needed = launch.shared + kernel.shared_size_bytes
        if needed > self.shared_per_block:
            raise OptionError(
                f"device: {launch.kernel} needs {needed} bytes of shared memory for this model and cache, and a block "
                f"on {self.name} has at most {self.shared_per_block}; another cache format (--kv) may fit"
            )
        if launch.shared > max(SHARED_BY_DEFAULT, self._shared.get(key, 0)):
            kernel.max_dynamic_shared_size_bytes = self._shared[key] = launch.shared
        return kernel

    @staticmethod
    def _compile(module: str, options: tuple[str, ...]) -> dict[tuple[str, tuple[str, ...]], Any]:
        text = abi.source(module)
        compiled = cupy.RawModule(code=text, options=(*OPTIONS, *options), backend="nvrtc")
        try:
            compiled.compile()
            return {(name, options): compiled.get_function(name) for name in abi.kernel_names(text)}
        except (cupy.cuda.compiler.CompileException, ImportError, RuntimeError) as error:
            raise KvrunError(
                f"device: the kernels in {module}.cu cannot be compiled: {one_line(error)[:500]}"
            ) from None

    # --- memory -------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Bytes that `alloc` can still give out."""
        free: int = runtime.memGetInfo()[0] + self._pool.free_bytes()
        return free if self._limit is None else max(0, min(free, self._limit - self._pool.used_bytes()))

    def alloc(self, n_bytes: int) -> Any:
        """Memory with whatever was in it, freed with the object; `ptr` is its address. abi.DeviceMemoryError."""
        try:
            return self._pool.malloc(max(n_bytes, 1))
        except cupy.cuda.memory.OutOfMemoryError:
            self._pool.free_all_blocks()
        try:
            return self._pool.malloc(max(n_bytes, 1))
        except cupy.cuda.memory.OutOfMemoryError:
            raise abi.DeviceMemoryError(n_bytes, self.free_bytes()) from None

    def zero(self, address: int, n_bytes: int) -> None:
        runtime.memset(address, 0, n_bytes)
        runtime.deviceSynchronize()

    def write(self, address: int, data: np.ndarray) -> None:
        """Copy a contiguous array to the device, and wait for it."""
        runtime.memcpy(address, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice)
        runtime.deviceSynchronize()  # it may be on its way still, and other streams would not wait for it

    def read(self, data: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array."""
        runtime.memcpy(data.ctypes.data, address, data.nbytes, runtime.memcpyDeviceToHost)

    def copy(self, to: int, address: int, n_bytes: int) -> None:
        """Copy within the device, and wait for it."""
        runtime.memcpy(to, address, n_bytes, runtime.memcpyDeviceToDevice)
        runtime.deviceSynchronize()

    def pinned(self, n_bytes: int) -> np.ndarray:
        """uint8 [n_bytes] of the host that the device copies from and to on its own."""
        return np.frombuffer(cupy.cuda.alloc_pinned_memory(n_bytes), np.uint8, n_bytes)

    # --- work on a stream -----------------------------------------------------------------------------------

    def stream(self) -> Any:
        return cupy.cuda.Stream(non_blocking=True)

    def synchronize(self, stream: Any) -> None:
        """Wait for what was asked of a stream. KvrunError if the device has failed."""
        try:
            stream.synchronize()
        except runtime.CUDARuntimeError as error:
            raise KvrunError(f"the GPU has failed: {one_line(error)}") from None

    def do(self, operation: abi.Operation, stream: Any) -> None:
        """Ask a stream for a launch, a matrix product or a copy."""
        if isinstance(operation, abi.Launch):
            self._launch(operation, stream)
        elif isinstance(operation, abi.Gemm):
            self._gemm(operation, stream)
        else:
            data, address = operation.pinned, operation.address
            if operation.to_device:
                runtime.memcpyAsync(address, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice, stream.ptr)
            else:
                runtime.memcpyAsync(data.ctypes.data, address, data.nbytes, runtime.memcpyDeviceToHost, stream.ptr)

    def _launch(self, launch: abi.Launch, stream: Any) -> None:
        kernel = self.prepare(launch)
        if not self.early or self._launch_early is None or launch.kernel not in abi.EARLY:
            with stream:
                kernel(launch.grid, launch.block, launch.args, shared_mem=launch.shared)
            return
        early = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
        grid, block = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.block)
        config = _Config(grid, block, launch.shared, stream.ptr, ctypes.pointer(early), 1)
        args = (ctypes.c_void_p * len(launch.args))(*(arg.ctypes.data for arg in launch.args))
        status = self._launch_early(ctypes.byref(config), kernel.kernel.ptr, args, None)
        if status:
            raise KvrunError(f"the GPU does not take {launch.kernel}: error {status} of cuLaunchKernelEx")

    def _gemm(self, g: abi.Gemm, stream: Any) -> None:
        from cupy_backends.cuda.libs import cublas

        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        with stream:  # cuBLAS is column-major: out' = weights' x
            cublas.gemmEx(
                cupy.cuda.device.get_cublas_handle(),
                _T,
                _N,
                g.rows,
                g.n,
                g.cols,
                one.ctypes.data,
                g.weights,
                _R_16F,
                g.cols,
                g.x,
                _R_16F,
                g.cols,
                zero.ctypes.data,
                g.out,
                _R_32F,
                g.ld,
                _COMPUTE_32F,
                _GEMM_DEFAULT,
            )

    def capture(self, operations: Sequence[abi.Operation], stream: Any) -> Any:
        """A graph of operations, which are not done: `replay` does them, as often as wanted."""
        for operation in operations:
            if isinstance(operation, abi.Launch):
                self.prepare(operation)
        stream.begin_capture()
        try:
            for operation in operations:
                self.do(operation, stream)
        finally:
            graph = stream.end_capture()
        graph.upload(stream)
        return graph

    def replay(self, graph: Any, stream: Any) -> None:
        graph.launch(stream)

    # --- measuring --------------------------------------------------------------------------------------------

    def seconds(self, work: Callable[[], None], stream: Any) -> float:
        """What the device takes for `work`, by its own clock."""
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def read_bandwidth(self, seconds: float = 0.1) -> float:
        """GB (1e9 bytes) a second that the device reads from its memory, the best of several passes."""
        n_bytes = min(BANDWIDTH_BYTES, self.free_bytes() // 4) // 4096 * 4096
        memory, out, stream = self.alloc(n_bytes), self.alloc(4), self.stream()
        runtime.memset(memory.ptr, 0, n_bytes)
        launch = bandwidth.read_memory(memory.ptr, n_bytes, out.ptr, self.n_multiprocessors)
        times, start = list[float](), time.perf_counter()
        while len(times) < 3 or time.perf_counter() - start < seconds:
            times.append(self.seconds(lambda: self.do(launch, stream), stream))
        return n_bytes / min(times) / 1e9
