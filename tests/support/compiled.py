"""C compiled for tests, kept in build/test-cache by a hash of the command and of all that it reads."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support import ROOT

FOLDER = ROOT / "build" / "test-cache"


def kept(command: Sequence[str], content: bytes, suffix: str) -> Path:
    """What `command ... -o FILE` writes; runs only if no earlier run had the same command and content."""
    key = hashlib.sha256("\0".join(command).encode() + content).hexdigest()[:20]
    path = FOLDER / (key + suffix)
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}{suffix}")
        subprocess.run([*command, "-o", str(part)], check=True)
        part.rename(path)  # whole or not at all, also beside another run
    return path


def objects(commands: Iterable[tuple[Sequence[str], Path]]) -> list[Path]:
    """The objects of (compiler and flags, source), compiled at the same time."""

    def compile_one(command: Sequence[str], source: Path) -> Path:
        read = subprocess.run([*command, "-E", str(source)], check=True, capture_output=True).stdout
        return kept([*command, str(source)], read, ".o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, *zip(*commands, strict=True)))


def program(command: Sequence[str], parts: Sequence[Path], libraries: Sequence[str]) -> Path:
    """The program linked from these objects."""
    return kept([*command, *map(str, parts), *libraries], b"", "")
