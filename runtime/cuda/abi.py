"""What Python and the kernels agree on: sources, structures passed by value, arguments, launches.

Knows no device: the one of CuPy and those of the tests take the same launches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

KERNELS = Path(__file__).with_name("kernels")
MODULES = ("step", "matrix", "chunk", "experts", "cache", "attention", "attention_chunk", "bandwidth")
MAX_SEGMENTS = 3
EARLY = frozenset(
    ("matvec", "matvec_gated", "norm_heads", "append", "attend", "choose", "experts_gated", "experts_down", "add_chunk")
)
"""Kernels that may start before the one before them has ended: before they read what it writes, they wait for it. Not the
first of a step, which follows a copy, so that all of them find the step written."""

# As in kernels/common.cuh; aligned like C's.
SEGMENT = np.dtype(
    [
        ("data", "u8"),
        ("bias", "u8"),
        ("panel_bytes", "i8"),
        ("type", "i4"),
        ("rows", "i4"),
        ("panels", "i4"),
        ("offset", "i4"),
    ],
    align=True,
)
MATRIX = np.dtype(
    [("segments", SEGMENT, MAX_SEGMENTS), ("n_segments", "i4"), ("cols", "i4"), ("panels", "i4"), ("width", "i4")],
    align=True,
)
NORM = np.dtype([("weight", "u8"), ("bias", "u8"), ("eps", "f4"), ("layer_norm", "i4")], align=True)
LAYOUT = np.dtype(
    [("base", "u8")]
    + [
        (name, "i8")
        for name in (
            "start",
            "head_bytes",
            "sight",
            "n_slots",
            "sink_v",
            "windows",
            "ring",
            "k_bytes",
            "v_bytes",
            "window_k_bytes",
            "window_v_bytes",
        )
    ]
    + [
        (name, "i4")
        for name in (
            "head_dim",
            "head_pad",
            "n_kv_heads",
            "n_sinks",
            "sink_lanes",
            "window",
            "n_window_tiles",
            "k_format",
            "v_format",
            "wk_format",
            "wv_format",
        )
    ],
    align=True,
)
STEP = np.dtype([("first", "i8"), ("packed_ever", "i8"), ("n", "i4"), ("first_logit", "i4")], align=True)
ROPES = np.dtype([("n", "i8"), ("inv_freq", "u8"), ("amplitude", "u8"), ("of_layer", "u8")], align=True)


class DeviceMemoryError(MemoryError):
    """`needed` bytes were asked for, `free` are there."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed / 1e9:.2f} GB of the GPU's memory are needed, {free / 1e9:.2f} GB are free")
        self.needed, self.free = needed, free


class Launch(NamedTuple):
    """One kernel with all it needs. `shared`: bytes of dynamic shared memory. `args`: NumPy arrays of one element, each
    passed by value. `options`: what its module is compiled with, besides what all are."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    args: tuple[np.ndarray, ...]
    options: tuple[str, ...] = ()


class Gemm(NamedTuple):
    """out float32 [n][ld] = x float16 [n][cols] times weights float16 [rows][cols], summed in float32."""

    weights: int
    x: int
    out: int
    rows: int
    cols: int
    n: int
    ld: int


class Copy(NamedTuple):
    """Between pinned memory of the host and the device, in the order of the stream."""

    pinned: np.ndarray
    address: int
    to_device: bool


Operation = Launch | Gemm | Copy


def pointer(address: int) -> np.ndarray:
    return np.array([address], np.uint64)


def int32(value: int) -> np.ndarray:
    return np.array([value], np.int32)


def int64(value: int) -> np.ndarray:
    return np.array([value], np.int64)


def float32(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def struct(dtype: np.dtype, **fields: object) -> np.ndarray:
    """A structure as an argument; fields that are not given are 0."""
    value = np.zeros(1, dtype)
    for name, field in fields.items():
        value[name] = field
    return value


def source(module: str) -> str:
    """The CUDA C++ of a module, with the headers of `kernels/` put in where they are first included."""
    return "".join(_inlined(f"{module}.cu", set()))


def _inlined(name: str, seen: set[str]) -> Iterator[str]:
    seen.add(name)
    for line in (KERNELS / name).read_text(encoding="utf-8").splitlines(keepends=True):
        include = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if include is None:
            yield "" if re.match(r"\s*#\s*pragma\s+once", line) else line
        elif include[1] not in seen:
            yield from _inlined(include[1], seen)


def kernel_names(text: str) -> list[str]:
    """The kernels that a source defines."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    pattern = r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\('
    return re.findall(pattern, text)


@cache
def module_of(kernel: str) -> str:
    """The module that defines a kernel."""
    return next(module for module in MODULES if kernel in kernel_names(source(module)))
