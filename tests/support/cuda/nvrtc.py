"""NVRTC without CuPy or a GPU: the kernels compiled as CuPy does it, and what ptxas says of each.

Run by itself it prints the registers, local memory and spills of every kernel on every architecture.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvrun.cuda import abi
from kvrun.cuda import launch as launches
from kvrun.cuda.abi import TYPE_IDS
from support import ROOT

FOLDER = ROOT / "build" / "test-cache" / "nvrtc"
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
# Head sizes and formats (enum kv_format_id) that attention is compiled for.
CACHES = [(64, 1, 1), (80, 0, 0), (128, 1, 1), (128, 2, 2), (128, 3, 4), (128, 4, 4), (256, 3, 3)]
# Sets of weight types that one token's products are compiled for: one bit for each number of enum kv_weight_type.
_SETS = (*((kind,) for kind in TYPE_IDS), ("q4_k", "q6_k"), ("q4_0", "q8_0"), ("q4_0", "q6_k"), tuple(TYPE_IDS))
WEIGHT_TYPES = [sum(1 << TYPE_IDS[kind] for kind in kinds) for kinds in _SETS]
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


class Usage(NamedTuple):
    """Of a thread, but for `shared`: static shared memory of a block. Local memory and spills in bytes."""

    registers: int
    local: int
    spilled: int
    shared: int


def library_path() -> Path | None:
    """NVRTC 13 of the package nvidia-cuda-nvrtc, if that is installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else ()
    found = [path for folder in folders or () for path in Path(folder).glob("*/lib/libnvrtc.so.13")]
    return found[0] if found else None


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


def _log(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    assert _library().nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert _library().nvrtcGetProgramLog(program, text) == 0
    return text.value.decode()


def compile_module(module: str, architecture: str, options: tuple[str, ...] = ()) -> tuple[bool, str]:
    """Whether it compiles, and NVRTC's log with what ptxas says. Of what does compile, the log is kept in
    build/test-cache by a hash of all that it depends on."""
    all_options = ["--std=c++17", *options, "-ftz=true", f"-arch={architecture}"]  # CuPy's
    all_options += ["--ptxas-options=-v", "-diag-suppress=177"]  # 177: what a header has and a module does not use
    text = abi.source(module)
    key = hashlib.sha256(
        "\0".join((importlib.metadata.version("nvidia-cuda-nvrtc"), module, *all_options, text)).encode()
    ).hexdigest()[:20]
    kept = FOLDER / f"{module}.{key}.log"
    if kept.exists():
        return True, kept.read_text(encoding="utf-8")
    compiled, log = _compile(f"{module}.cu", text, all_options)
    if compiled:
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(log, encoding="utf-8")
        part.rename(kept)
    return compiled, log


def _compile(name: str, text: str, options: list[str]) -> tuple[bool, str]:
    values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    program, nvrtc = ctypes.c_void_p(), _library()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None) == 0
    try:
        return nvrtc.nvrtcCompileProgram(program, len(values), values) == 0, _log(program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def usage(log: str) -> dict[str, Usage]:
    """By kernel."""
    return {
        name: Usage(int(registers), int(local), max(int(stored), int(loaded)), int(shared or 0))
        for name, local, stored, loaded, registers, shared in _ENTRY.findall(log)
    }


def variants(module: str) -> list[tuple[str, ...]]:
    """What options a module is compiled with."""
    if module == "matrix":
        return [(f"-DKV_WEIGHT_TYPES={mask}",) for mask in WEIGHT_TYPES]
    if module in ("attention", "attention_chunk"):
        names = ("head_dim", "k_format", "v_format")
        return [launches.attention.defines(dict(zip(names, values, strict=True))) for values in CACHES]
    return [()]


def main() -> None:
    print(f"{'kernel':24}{'compiled for':48}{'registers':>10}{'local':>8}{'spilled':>9}{'shared':>8}")
    for module in abi.MODULES:
        for options in variants(module):
            for architecture in ARCHITECTURES:
                compiled, log = compile_module(module, architecture, options)
                if not compiled:
                    raise SystemExit(f"{module}.cu for {architecture}:\n{log}")
                for kernel, used in usage(log).items():
                    about = " ".join([architecture, *(option.removeprefix("-DKV_").lower() for option in options)])
                    print(f"{kernel:24}{about:48}{used.registers:>10}{used.local:>8}{used.spilled:>9}{used.shared:>8}")


if __name__ == "__main__":
    main()
