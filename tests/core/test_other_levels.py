"""The kernels of the levels that this CPU does not run, against the scalar ones (test_kernels.py has the others).

``levels/check.c`` is built with the kernels of one level and run: for AVX-512 on an x86 CPU without it with the
intrinsics written in C, for NEON under qemu-aarch64 (packages gcc-aarch64-linux-gnu and qemu-user).
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from kvrun import _core

HERE = Path(__file__).parent / "levels"
KERNELS = Path(__file__).parents[2] / "_core" / "kernels"
SOURCES = (
    "vector",
    "weights/matmul",
    "weights/kquants",
    "table",
    *(f"cache/{source.stem}" for source in sorted(KERNELS.glob("cache/*.c"))),
)
X86 = platform.machine() in ("x86_64", "AMD64")

# level: (compiler, its flags, how the program is run)
WAYS = {
    "avx512": ("gcc", ["-include", str(HERE / "avx512_in_c.h"), "-Wno-psabi"], []),
    "neon": ("aarch64-linux-gnu-gcc", ["-march=armv8.2-a+dotprod"], ["qemu-aarch64"]),
}


def build(level, compiler, flags, folder):
    common = [compiler, "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}"]
    objects = []
    for source in SOURCES:
        for name, extra in (("scalar", []), (level, flags)):
            objects.append(str(folder / f"{Path(source).name}.{name}.o"))
            subprocess.run(
                [
                    *common,
                    *extra,
                    f"-DKV_LEVEL={name}",
                    f"-DKV_LEVEL_{name.upper()}",
                    "-c",
                    str(KERNELS / f"{source}.c"),
                    "-o",
                    objects[-1],
                ],
                check=True,
            )
    program = folder / "check"
    subprocess.run(
        [
            *common,
            f"-DCHECKED={level}",
            "-static",
            str(HERE / "check.c"),
            str(KERNELS / "weights/pack.c"),
            str(KERNELS / "weights/kpack.c"),
            *objects,
            "-lm",
            "-o",
            str(program),
        ],
        check=True,
    )
    return program


@pytest.mark.parametrize("level", WAYS)
def test_level_agrees_with_scalar(level, tmp_path):
    compiler, flags, runner = WAYS[level]
    if level in _core.isa_available():
        pytest.skip("this CPU runs it: test_kernels.py")
    if level == "avx512" and not X86:
        pytest.skip("the intrinsics in C build on x86 only")
    for tool in [compiler, *runner]:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    program = build(level, compiler, flags, tmp_path)
    for seed in ("1", str(hash(tmp_path) % 2**32)):
        result = subprocess.run([*runner, str(program), seed], capture_output=True, text=True)
        assert result.returncode == 0, f"seed {seed}: {result.stdout}{result.stderr}"
        assert f"{level}: 0 differences" in result.stdout
