"""Devices without a GPU, with the methods of `kvrun.cuda.device.CudaDevice`.

`HostDevice` compiles the kernels as C++ (host_cuda.h) and runs them, a thread after the other, on the host's memory. `RecordingDevice`
only notes what it is asked for.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvrun.cuda import abi

FOLDER = Path(__file__).parents[2] / "build" / "host_cuda"
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

    name, architecture, n_multiprocessors, max_shared = "host", "host", 2, 227 << 10

    def __init__(self, limit=None):
        self.limit, self.live, self.recording = limit, {}, None

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
        assert self.recording is None

    def _do(self, what):
        if self.recording is None:
            what()
        else:
            self.recording.append(what)

    def upload(self, address, pinned, stream):
        self._do(lambda: self.write(address, pinned))

    def download(self, pinned, address, stream):
        self._do(lambda: self.read(pinned, address))

    def capture(self, work, stream):
        self.recording = []
        try:
            work()
            return self.recording
        finally:
            self.recording = None

    def replay(self, graph, stream):
        for what in graph:
            what()

    def gemm(self, weights, x, out, rows, cols, n, ld, stream):
        self._do(lambda: self._gemm(weights, x, out, rows, cols, n, ld))

    def _gemm(self, weights, x, out, rows, cols, n, ld):
        w = view(weights, 2 * rows * cols).view(np.float16).reshape(rows, cols).astype(np.float32)
        inputs = view(x, 2 * n * cols).view(np.float16).reshape(n, cols).astype(np.float32)
        to = np.lib.stride_tricks.as_strided(
            view(out, 4 * ((n - 1) * ld + rows)).view(np.float32), (n, rows), (4 * ld, 4)
        )
        to[:] = inputs @ w.T

    def launch(self, launch, stream):
        self._do(lambda: self._run(launch))

    def prepare(self, launch):
        """CudaDevice compiles here."""


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

    def _run(self, launch):
        args = (ctypes.c_void_p * len(launch.args))(*(a.ctypes.data for a in launch.args))
        self._functions[launch.kernel](*map(ctypes.c_uint, (*launch.grid, *launch.block)), ctypes.c_size_t(launch.shared), args)


def compiled(module, text):
    """The library of one module's source with a launcher for each kernel."""
    code = f'#include "{PRELUDE}"\n{text}\n' + "".join(f"HOST_LAUNCHER({name})\n" for name in abi.kernel_names(text))
    key = hashlib.sha256((code + PRELUDE.read_text() + " ".join(FLAGS)).encode()).hexdigest()[:20]
    path = FOLDER / f"{module}.{key}.so"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        source = path.with_suffix(".cpp")
        source.write_text(code)
        part = path.with_suffix(f".{os.getpid()}")
        subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, str(source), "-o", str(part)], check=True)
        part.rename(path)
    return ctypes.CDLL(str(path))


class Gemm(NamedTuple):
    weights: int
    x: int
    out: int
    rows: int
    cols: int
    n: int
    ld: int


class RecordingDevice(HostMemoryDevice):
    """`done`: the launches, products and copies ("upload", "download") of the streams, in order."""

    def __init__(self, limit=None):
        super().__init__(limit)
        self.done, self.graphs = [], 0

    def capture(self, work, stream):
        self.graphs += 1
        return super().capture(work, stream)

    def _run(self, launch):
        self.done.append(launch)

    def _gemm(self, *numbers):
        self.done.append(Gemm(*numbers))

    def upload(self, address, pinned, stream):
        super().upload(address, pinned, stream)
        self._do(lambda: self.done.append(("upload", address, pinned.nbytes)))

    def download(self, pinned, address, stream):
        self._do(lambda: self.done.append(("download", address, pinned.nbytes)))
