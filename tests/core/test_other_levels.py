"""The kernels of the levels that this CPU does not run, against the scalar ones (test_kernels.py has the others).

``levels/check.c`` is built with the kernels of one level and run: for AVX-512 on an x86 CPU without it with the
intrinsics written in C, for NEON under qemu-aarch64.
"""

import platform
import subprocess
from pathlib import Path

import pytest

from kvrun import _core
from support import ROOT, compiled, needs

HERE = Path(__file__).parent / "levels"
KERNELS = ROOT / "_core" / "kernels"
WEIGHTS = sorted(KERNELS.glob("weights/*.c"))  # compiled for each level, and without one for what is portable
LEVEL_SOURCES = [KERNELS / "vector.c", *sorted(KERNELS.glob("cache/*.c")), *WEIGHTS, KERNELS / "table.c"]
PORTABLE_SOURCES = [KERNELS / "weights.c", *WEIGHTS]
X86 = platform.machine() in ("x86_64", "AMD64")

# level: (compiler, its flags, how the program is run, the packages of these tools)
WAYS = {
    "avx512": ("gcc", ["-include", str(HERE / "avx512_in_c.h"), "-Wno-psabi"], [], "gcc"),
    "neon": (
        "aarch64-linux-gnu-gcc",
        ["-march=armv8.2-a+dotprod"],
        ["qemu-aarch64"],
        "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user",
    ),
}


def build(level, compiler, flags):
    """The program that compares this level with the scalar one."""
    common = [compiler, "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}"]
    levels = {"scalar": [], level: flags}
    objects = [
        ([*common, *extra, f"-DKV_LEVEL={name}", f"-DKV_LEVEL_{name.upper()}", "-c"], source)
        for source in LEVEL_SOURCES
        for name, extra in levels.items()
    ]
    objects += [([*common, "-c"], source) for source in PORTABLE_SOURCES]
    objects += [([*common, f"-DCHECKED={level}", "-c"], HERE / "check.c")]
    return compiled.program([compiler, "-static"], compiled.objects(objects), ["-lm"])


@pytest.mark.thorough
@pytest.mark.parametrize("level", WAYS)
def test_level_agrees_with_scalar(level, seed):
    compiler, flags, runner, packages = WAYS[level]
    if level in _core.isa_available():
        pytest.skip("this CPU runs it: test_kernels.py")
    if level == "avx512" and not X86:
        pytest.skip("the intrinsics in C build on x86 only")
    for tool in (compiler, *runner):
        needs.program(tool, packages)
    program = build(level, compiler, flags)
    for number in (1, seed):
        result = subprocess.run([*runner, str(program), str(number)], capture_output=True, text=True)
        assert result.returncode == 0, f"seed {number}: {result.stdout}{result.stderr}"
        assert f"{level}: 0 differences" in result.stdout
