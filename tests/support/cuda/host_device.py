"""Devices without a GPU, with the methods of `kvrun.cuda.device.CudaDevice`.

`HostDevice` compiles the kernels as C++ (host_cuda.h) and runs them, a thread after the other, on the host's memory.
`RecordingDevice` only notes what it is asked for.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np

from kvrun.cuda import abi
from support import ROOT, needs

FOLDER = ROOT / "build" / "test-cache" / "host_cuda"
PRELUDE = Path(__file__).with_name("host_cuda.h")
JUNK = 0xFF  # of memory that nobody has written: NaN as a float, -1 as a number
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-w", "-DKVRUN_HOST")


def view(address, n_bytes):
    """uint8 [n_bytes] at an address."""
    return np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint8)


class Memory:
    """Aligned like a GPU's; `ptr` is its address."""

    def __init__(self, device, n_bytes):
        self._device, self.n_bytes = device, n_bytes
        self._raw = np.full(n_bytes + 256, JUNK, np.uint8)
        self.ptr = (self._raw.ctypes.data + 255) // 256 * 256
        device.live[self.ptr] = n_bytes

    def __del__(self):
        del self._device.live[self.ptr]


class HostMemoryDevice:
    """Memory and copies; what is asked of a stream is done at once."""

    name, architecture, n_multiprocessors, shared_per_multiprocessor = "host", "host", 2, 228 << 10

    def __init__(self, limit=None):
        self.limit, self.live = limit, {}

    def free_bytes(self):
        return (1 << 40) - sum(self.live.values()) if self.limit is None else self.limit - sum(self.live.values())

    def alloc(self, n_bytes):
        if n_bytes > self.free_bytes():
            raise abi.DeviceMemoryError(n_bytes, self.free_bytes())
        return Memory(self, n_bytes)

    def zero(self, address, n_bytes):
        view(address, n_bytes)[:] = 0

    def write(self, address, data):
        assert data.flags.c_contiguous
        view(address, data.nbytes)[:] = data.reshape(-1).view(np.uint8)

    def read(self, data, address):
        assert data.flags.c_contiguous
        data.reshape(-1).view(np.uint8)[:] = view(address, data.nbytes)

    def copy(self, to, address, n_bytes):
        view(to, n_bytes)[:] = view(address, n_bytes)

    def pinned(self, n_bytes):
        return np.full(n_bytes, JUNK, np.uint8)

    def stream(self):
        return object()

    def synchronize(self, stream):
        """Nothing is under way."""

    def read_bandwidth(self, seconds):
        """GB a second: some number."""
        return 10.0

    def do(self, operation, stream):
        if isinstance(operation, abi.Launch):
            self._launch(operation)
        elif isinstance(operation, abi.Gemm):
            self._gemm(operation)
        else:
            self._copy(operation)

    def _launch(self, launch):
        raise NotImplementedError(f"{launch.kernel}: this device runs no kernels")

    def capture(self, operations, stream):
        return list(operations)

    def replay(self, graph, stream):
        for operation in graph:
            self.do(operation, stream)

    def _copy(self, copy):
        if copy.to_device:
            self.write(copy.address, copy.pinned)
        else:
            self.read(copy.pinned, copy.address)

    def _gemm(self, g):
        weights = view(g.weights, 2 * g.rows * g.cols).view(np.float16).reshape(g.rows, g.cols).astype(np.float32)
        x = view(g.x, 2 * g.n * g.cols).view(np.float16).reshape(g.n, g.cols).astype(np.float32)
        out = view(g.out, 4 * ((g.n - 1) * g.ld + g.rows)).view(np.float32)
        np.lib.stride_tricks.as_strided(out, (g.n, g.rows), (4 * g.ld, 4))[:] = x @ weights.T


class HostDevice(HostMemoryDevice):
    """Runs the kernels. One library for all formats, kept by the hash of its source."""

    def __init__(self, limit=None):
        super().__init__(limit)
        self._functions = {}
        for module in abi.MODULES:
            text = abi.source(module)
            library = compiled(module, text)
            for name in abi.kernel_names(text):
                self._functions[name] = getattr(library, f"launch_{name}")

    def _launch(self, launch):
        args = (ctypes.c_void_p * len(launch.args))(*(a.ctypes.data for a in launch.args))
        self._functions[launch.kernel](
            *map(ctypes.c_uint, (*launch.grid, *launch.block)), ctypes.c_size_t(launch.shared), args
        )


def compiled(module, text):
    """The library of one module's source with a launcher for each kernel."""
    code = f'#include "{PRELUDE}"\n{text}\n' + "".join(f"HOST_LAUNCHER({name})\n" for name in abi.kernel_names(text))
    key = hashlib.sha256((code + PRELUDE.read_text() + " ".join(FLAGS)).encode()).hexdigest()[:20]
    path = FOLDER / f"{module}.{key}.so"
    if not path.exists():
        compiler = os.environ.get("CXX", "g++")
        needs.program(compiler, "g++")
        FOLDER.mkdir(parents=True, exist_ok=True)
        source = path.with_suffix(".cpp")
        source.write_text(code)
        part = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, str(source), "-o", str(part)], check=True)
        part.rename(path)
    return ctypes.CDLL(str(path))


class RecordingDevice(HostMemoryDevice):
    """`done`: what its streams were asked for, in order; of that only copies are made. `graphs`: those captured."""

    def __init__(self, limit=None):
        super().__init__(limit)
        self.done, self.graphs = [], []

    def capture(self, operations, stream):
        self.graphs.append(super().capture(operations, stream))
        return self.graphs[-1]

    def do(self, operation, stream):
        self.done.append(operation)
        if isinstance(operation, abi.Copy):
            self._copy(operation)
