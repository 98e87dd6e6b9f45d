"""What pyproject.toml cannot say: Cython extensions, and one static kernel library per instruction-set level.

The same C sources in ``_core/kernels`` are compiled once for each level in ``LEVELS``; ``kvrun._core.kernels``
links them all and picks the best one the CPU has when it is imported.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = "_core/kernels"
KERNEL_FILES = sorted(str(p) for p in Path(KERNELS).rglob("*.[ch]"))
HEADERS = [path for path in KERNEL_FILES if path.endswith(".h")]
COMMON_FLAGS = [
    f"-I{KERNELS}",
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-g0",
]

# level: (machines, compiler flags)
X86, ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")
LEVELS: dict[str, tuple[tuple[str, str] | None, list[str]]] = {
    "scalar": (None, []),
    "avx2": (X86, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (
        X86,
        [
            "-mavx2",
            "-mfma",
            "-mf16c",
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512vnni",
            "-mprefer-vector-width=512",
        ],
    ),
    "neon": (ARM, ["-march=armv8.2-a+dotprod"]),
}
# Every file of a weight type is compiled for each level, and once more, without one, for what is portable.
WEIGHT_SOURCES = sorted(str(p) for p in Path(KERNELS, "weights").glob("*.c"))
CACHE_SOURCES = sorted(str(p) for p in Path(KERNELS, "cache").glob("*.c"))
LEVEL_SOURCES = [*WEIGHT_SOURCES, *CACHE_SOURCES, f"{KERNELS}/vector.c", f"{KERNELS}/table.c"]
BASE_SOURCES = WEIGHT_SOURCES + [f"{KERNELS}/{name}.c" for name in ("weights", "team", "levels")]


PROGRAM = "int main(void) { return 0; }\n"


def refusal(compiler: Any, source: str, flags: Sequence[str]) -> str | None:
    """Why ``compiler`` does not compile ``source`` with these flags; None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.c")
        path.write_text(source)
        try:
            compiler.compile([str(path)], output_dir=folder, extra_postargs=list(flags))
        except CompileError as error:
            reason = str(error)
            return reason if len(reason) < 100 else "what it says is above"  # the rest is the whole command
    return None


def check_compiler(compiler: Any) -> None:
    """Stops, before anything is built, when nothing could be."""
    refused = refusal(compiler, PROGRAM, COMMON_FLAGS)
    if refused:
        raise CompileError(f"kvrun needs a C compiler, GCC or Clang (CC names another than the usual one): {refused}")
    refused = refusal(compiler, f"#include <Python.h>\n{PROGRAM}", COMMON_FLAGS)
    if refused:
        raise CompileError(
            "kvrun needs the headers of the Python that runs it, and there is no Python.h that compiles "
            f"(Debian, Ubuntu: apt-get install python3-dev): {refused}"
        )


def buildable_levels(compiler: Any) -> list[str]:
    """The levels that this compiler builds on this machine; says what is left out. Stops if there is none."""
    levels, refusals = [], []
    for level, (machines, flags) in LEVELS.items():
        if machines is not None and platform.machine() not in machines:
            continue
        refused = refusal(compiler, PROGRAM, COMMON_FLAGS + flags)
        if refused:
            print(f"kvrun: this compiler has no flags for {level}: building without that level")
            refusals.append(f"{level}: {refused}")
        else:
            levels.append(level)
    if not levels:
        raise CompileError(f"kvrun: this compiler builds no level of the kernels ({'; '.join(refusals)})")
    print(f"kvrun: kernel levels: {', '.join(levels)}")
    return levels


def level_flags(level: str) -> list[str]:
    return [f"-DKV_LEVEL={level}", f"-DKV_LEVEL_{level.upper()}"] + LEVELS[level][1]


class build_extensions(build_ext):
    """Builds the kernel libraries first, objects of each level in a folder of its own, then the extensions."""

    def build_extensions(self) -> None:
        check_compiler(self.compiler)
        levels = buildable_levels(self.compiler)
        have = [f"-DKV_HAVE_{level.upper()}" for level in levels]
        libraries = {"base": (BASE_SOURCES, ["-ffp-contract=off"] + have)}
        libraries |= {level: (LEVEL_SOURCES, level_flags(level)) for level in levels}
        base, *kernels = self.kernel_libraries(libraries)
        for extension in self.extensions:
            extension.extra_objects = [base] + (kernels if extension.name.endswith(".kernels") else [])
            extension.extra_link_args = ["-pthread"]
        self.parallel = self.parallel or os.cpu_count()
        super().build_extensions()

    def kernel_libraries(self, libraries: Mapping[str, tuple[list[str], list[str]]]) -> list[str]:
        """Paths of the static libraries that {name: (sources, flags)} describes; a compiler runs on each CPU."""
        folders = {name: os.path.join(self.build_temp, "kernels", name) for name in libraries}

        def compiled(name: str, source: str, flags: list[str]) -> list[str]:
            options: dict[str, Any] = {"extra_postargs": COMMON_FLAGS + flags, "depends": KERNEL_FILES}
            objects: list[str] = self.compiler.compile([source], output_dir=folders[name], **options)
            return objects

        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            objects = {
                name: [pool.submit(compiled, name, source, flags) for source in sources]
                for name, (sources, flags) in libraries.items()
            }
            for name, parts in objects.items():
                paths = [path for part in parts for path in part.result()]
                self.compiler.create_static_lib(paths, f"kvrun_{name}", output_dir=folders[name])
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing more is compiled
        return [self.compiler.library_filename(f"kvrun_{name}", output_dir=folders[name]) for name in libraries]


def extension(name: str) -> Extension:
    linked = (KERNEL_FILES if name == "kernels" else HEADERS + BASE_SOURCES) + sorted(
        map(str, Path("_core").glob("*.h"))
    )
    return Extension(
        f"kvrun._core.{name}",
        [f"_core/{name}.pyx"],
        include_dirs=[KERNELS],
        depends=linked,
        extra_compile_args=["-O2", "-std=gnu11", "-fno-math-errno", "-g0"],
    )


def declarations() -> str:
    """A folder laid out like the installed packages, where Cython looks up ``cimport``: it knows no package_dir."""
    root = Path("build", "cython")
    package = root / "kvrun" / "_core"
    package.mkdir(parents=True, exist_ok=True)
    for folder in (package.parent, package):
        (folder / "__init__.pxd").touch()
    for source in Path("_core").glob("*.pxd"):
        target = package / source.name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)
    return str(root)


MODULES = [p.stem for p in sorted(Path("_core").glob("*.pyx"))]
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "embedsignature": True,
}

setup(
    ext_modules=cythonize(
        [extension(name) for name in MODULES], compiler_directives=DIRECTIVES, include_path=[declarations()]
    ),
    cmdclass={"build_ext": build_extensions},
)
