"""What pyproject.toml installs is what the folders hold: a file that it forgets is missed only by those who install."""

import os
import subprocess
import sys

import pytest

from support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there as well

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]
DATA = {ROOT / FOLDERS[name]: patterns for name, patterns in SETUPTOOLS["package-data"].items()}
# A header of the core is installed if a CUDA kernel includes it: NVRTC gets the sources at run time.
NEEDED = [
    *sorted((ROOT / "runtime").rglob("py.typed")),
    *sorted((ROOT / "_core").glob("*.pyi")),
    *sorted((ROOT / "runtime").rglob("*.cu")),
    *sorted((ROOT / "runtime").rglob("*.cuh")),
    ROOT / "_core" / "kernels" / "abi.h",
]


def package_of(folder):
    """The name that a folder with Python files has as a package."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(("kvrun", *(parts[1:] if parts[0] == "runtime" else parts)))


def test_every_package_is_installed():
    roots = [ROOT / name for name in ("runtime", "_core", "convert")]
    found = {file.parent for root in roots for file in root.rglob("__init__.py")}
    assert {package_of(folder): str(folder.relative_to(ROOT)) for folder in found} == FOLDERS
    assert sorted(SETUPTOOLS["packages"]) == sorted(FOLDERS)


@pytest.mark.parametrize("path", NEEDED, ids=lambda path: str(path.relative_to(ROOT)))
def test_data_files_are_installed(path):
    assert any(path in folder.glob(pattern) for folder, patterns in DATA.items() for pattern in patterns)


def test_no_pattern_is_for_nothing():
    unused = [pattern for folder, patterns in DATA.items() for pattern in patterns if not any(folder.glob(pattern))]
    assert not unused


def test_headers_from_the_core_that_kernels_include_are_installed():
    core = ROOT / "_core" / "kernels"
    text = "".join(path.read_text(encoding="utf-8") for path in NEEDED if path.suffix in (".cu", ".cuh"))
    for header in core.glob("*.h"):
        own = (ROOT / "runtime" / "cuda" / "kernels" / header.name).exists()
        assert own or f'#include "{header.name}"' not in text or header in NEEDED


# --- building ---------------------------------------------------------------------------------------

BUILD = """
import runpy, sys, sysconfig, types
sys.modules["Cython"] = types.ModuleType("Cython")
sys.modules["Cython.Build"] = build = types.ModuleType("Cython.Build")
build.cythonize = lambda *arguments, **options: []
import setuptools
from distutils.ccompiler import new_compiler
from distutils.sysconfig import customize_compiler
setuptools.setup = lambda **options: None
setup = runpy.run_path("setup.py")
compiler = new_compiler()
customize_compiler(compiler)
compiler.set_include_dirs([sysconfig.get_paths()["include"], sysconfig.get_paths()["platinclude"]])
try:
    setup["check_compiler"](compiler)
    print("levels:", *setup["buildable_levels"](compiler))
except setup["CompileError"] as error:
    sys.exit(f"error: {error}")
"""


def building(cc):
    """(exit status, the last line) of setup.py's look at a compiler."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=ROOT,
        env={**os.environ, "CC": str(cc)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.fixture
def wrapper(tmp_path):
    """wrapper(script): a compiler that is a shell script."""

    def write(script):
        path = tmp_path / "cc"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        return path

    return write


@pytest.fixture(scope="module")
def compiler():
    """The usual one; setup.py runs in the tests with setuptools, but without Cython."""
    pytest.importorskip("setuptools")
    status, line = building("cc")
    if status:
        pytest.skip(f"no compiler here: {line}")
    return "cc"


def test_levels_that_a_compiler_does_not_know_are_left_out(compiler, wrapper):
    assert "scalar" in building(compiler)[1].split()
    refuses_m = 'for a in "$@"; do case $a in -m*) exit 1;; esac; done\nexec cc "$@"\n'
    assert building(wrapper(refuses_m)) == (0, "levels: scalar")


def test_a_compiler_that_builds_nothing_ends_the_installation(compiler, wrapper):
    """It says why, rather than install a core without kernels."""
    for cc, says in (("no-such-compiler", "no-such-compiler"), (wrapper("exit 1\n"), "")):
        status, line = building(cc)
        assert status == 1 and line.startswith("error: kvrun needs a C compiler, GCC or Clang") and says in line


def test_missing_headers_end_the_installation(compiler, wrapper):
    without = 'for a in "$@"; do case $a in -I*) ;; *) set -- "$@" "$a";; esac; shift; done\nexec cc "$@"\n'
    status, line = building(wrapper(without))
    assert status == 1 and line.startswith("error: kvrun needs the headers of the Python") and "python3-dev" in line


def test_no_level_ends_the_installation(compiler, wrapper):
    """Nor does one that compiles programs, but none for any level."""
    counted = 'n=$(cat "$0.n" 2>/dev/null || echo 0)\necho $((n + 1)) > "$0.n"\n[ $n -lt 2 ] && exec cc "$@"\nexit 1\n'
    status, line = building(wrapper(counted))
    assert status == 1 and "builds no level of the kernels (scalar: " in line
