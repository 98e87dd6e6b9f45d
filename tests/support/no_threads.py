"""A library that lets a program make only so many threads more, as a limit of processes does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support import compiled, needs

SOURCE = Path(__file__).with_suffix(".c")


def environment(left: int | None = None) -> dict[str, str]:
    """Variables for a program that can make `left` threads from its start; None: as many as it says itself, in the int
    `threads_left` of the library LD_PRELOAD. Skips where this cannot be had."""
    if sys.platform != "linux":
        pytest.skip("needs LD_PRELOAD")
    needs.program("cc", "gcc")
    library = compiled.kept(["cc", "-shared", "-fPIC", str(SOURCE), "-ldl"], SOURCE.read_bytes(), ".so")
    limit = {} if left is None else {"THREADS_LEFT": str(left)}
    return {**os.environ, "LD_PRELOAD": str(library), **limit}
