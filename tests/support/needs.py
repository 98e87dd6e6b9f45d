"""What a test needs beside the package: it is skipped without, but fails in CI, where all has to be there."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Ends the test. `what`: what is missing, and how to get it."""
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}", pytrace=False)
    pytest.skip(f"needs {what}")


def program(name: str, package: str) -> None:
    """A program, and the package of Debian and Ubuntu that has it."""
    if shutil.which(name) is None:
        missing(f"{name} (Debian, Ubuntu: apt-get install {package})")


def module(name: str, package: str) -> ModuleType:
    """A Python module, and the package that has it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"the module {name} (pip install {package})")
