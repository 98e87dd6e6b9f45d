"""What Python and the kernels agree on: sources, structures passed by value, arguments, launches.

Knows no device: the one of CuPy and those of the tests take the same launches.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvrun import _core

KERNELS = Path(__file__).with_name("kernels")
CORE_KERNELS = Path(_core.__file__).with_name("kernels")
MODULES = ("step", "matrix", "chunk", "experts", "cache", "attention", "attention_chunk", "bandwidth")
EARLY = frozenset(
    ("matvec", "matvec_gated", "norm_heads", "append", "attend", "choose", "experts_gated", "experts_down", "add_chunk")
)
"""Kernels that may start before the one before them has ended: before they read what it writes, they wait for it. Not
the first of a step, which follows a copy, so that all of them find the step written."""


TYPE_IDS = {name: row.number for name, row in _core.WEIGHT_TYPES.items()}
"""Names of weight types, and their numbers in the kernels."""


# What the sources say ------------------------------------------------------------------------------------------------


def source(module: str) -> str:
    """The CUDA C++ of a module, in one piece."""
    return with_headers(f"{module}.cu")


def with_headers(file: str) -> str:
    """A file of `kernels/`, with the headers there and of the core put in where they are first included."""
    return "".join(_inlined(file, set()))


def _inlined(name: str, seen: set[str]) -> Iterator[str]:
    seen.add(name)
    path = KERNELS / name
    for line in (path if path.exists() else CORE_KERNELS / name).read_text(encoding="utf-8").splitlines(keepends=True):
        include = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if include is None:
            yield "" if re.match(r"\s*#\s*pragma\s+once", line) else line
        elif include[1] not in seen:
            yield from _inlined(include[1], seen)


def _code(text: str) -> str:
    """A source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def kernel_names(text: str) -> list[str]:
    """The kernels that a source defines."""
    pattern = r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\('
    return re.findall(pattern, _code(text))


@cache
def module_of(kernel: str) -> str:
    """The module that defines a kernel."""
    return next(module for module in MODULES if kernel in kernel_names(source(module)))


@cache
def constants(file: str) -> dict[str, int]:
    """The whole numbers that a source, headers included, gives names to: by enumerations and #define at the margin.

    Those that depend on what a module is compiled for are left out. The numbers of weight types are the core's table's.
    """
    text = _code(with_headers(file))
    found = {f"KV_{name.upper()}": number for name, number in TYPE_IDS.items()}
    pattern = re.compile(r"^#define (\w+) +(\d+) *$|^enum(?: \w+)? \{([^}]*)\}", re.MULTILINE)
    for define, value, enumerators in pattern.findall(text):
        if define:
            found[define] = int(value)
            continue
        following: int | None = 0
        for enumerator in filter(None, (part.strip() for part in enumerators.split(","))):
            name, equals, expression = (part.strip() for part in enumerator.partition("="))
            value_here = _evaluated(expression, found) if equals else following
            if value_here is None or not name.isidentifier():
                break
            found[name], following = value_here, value_here + 1
    return found


_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.LShift: operator.lshift,
    ast.BitOr: operator.or_,
}


def _evaluated(expression: str, names: Mapping[str, int]) -> int | None:
    """The value of a constant expression; None if it has a name, or an operator, that is not known."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name):
            return names[node.id]
        return int(ast.literal_eval(node))

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (KeyError, SyntaxError):
        return None


_SCALARS = {"int": "i4", "int64_t": "i8", "float": "f4"}


@cache
def structures() -> dict[str, np.dtype]:
    """The structures of abi.cuh by name, aligned like C's. ValueError for a field that is not understood."""
    text, found = _code((KERNELS / "abi.cuh").read_text(encoding="utf-8")), dict[str, np.dtype]()
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        fields: list[Any] = []
        for line in filter(None, (part.strip() for part in body.split(";"))):
            match = re.fullmatch(r"(?:const )?(\w+) (.+)", line)
            if match is None:
                raise ValueError(f"abi.cuh: {name}: {line!r} is no field that is understood here")
            for declarator in match[2].split(","):
                part = re.fullmatch(r"(\*?)(\w+)(?:\[(\w+)\])?", declarator.strip())
                kind: Any = "u8" if part and part[1] else _SCALARS.get(match[1]) or found.get(match[1])
                if part is None or kind is None:
                    raise ValueError(f"abi.cuh: {name}: {line!r} is no field that is understood here")
                count = (int(constants("abi.cuh").get(part[3], part[3])),) if part[3] else ()
                fields.append((part[2], kind, *count))
        found[name] = np.dtype(fields, align=True)
    return found


MATRIX, NORM = structures()["Matrix"], structures()["Norm"]
LAYOUT, STEP, ROPES = (structures()[name] for name in ("CacheLayout", "Step", "Ropes"))
BLOCK, PANEL, TILE, WARP = (constants("abi.cuh")[name] for name in ("BLOCK", "PANEL", "TILE", "WARP"))
ACTIVATIONS = {name: constants("abi.cuh")[f"KV_{name.upper()}"] for name in ("silu", "gelu", "gelu_tanh")}
"""Names of activations, and their numbers in the kernels."""


# What is asked of a device -------------------------------------------------------------------------------------------


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
