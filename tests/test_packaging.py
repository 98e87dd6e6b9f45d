"""What pyproject.toml installs is what the folders hold: a file that it forgets is missed only by those who install."""

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
