"""A control group that grants its processes so much CPU time, as a container's does (`docker run --cpus`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvrun._core import cpus

PERIOD = 100_000  # microseconds, as containers have it
LIMITS = {1: "cpu.cfs_quota_us", 2: "cpu.max"}  # the file with the limit, by version


class NoQuota(Exception):
    """There is no group that could be made; says why."""


@contextmanager
def granted(n_cpus: float, pids: list[int], root: Path = Path("/")) -> Iterator[Path]:
    """A new group with these processes in it, and a limit of n_cpus. Afterwards they are back in this process's group,
    and the new one is gone. NoQuota if this process may not make one."""
    home, folder, version = _made(root)
    before = home / "cgroup.procs"
    try:
        try:
            _limit(folder, version, n_cpus)
            for pid in pids:
                (folder / "cgroup.procs").write_text(f"{pid}\n")
        except OSError as error:
            raise NoQuota(f"{folder}: {error.strerror}") from None
        yield folder
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended
                before.write_text(f"{pid}\n")
        _remove(folder)


def _made(root: Path) -> tuple[Path, Path, int]:
    """(this process's own group, an empty new one, version): the new one in its own or, since in version 2 a group that
    has processes has no groups with limits, in one further up."""
    homes: dict[int, Path] = {}
    reason = "no control groups for CPU time are mounted"
    for parent, version in cpus.control_groups(root):
        home, folder = homes.setdefault(version, parent), parent / f"kvrun-benchmark-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            reason = f"{parent}: {error.strerror}"
            continue
        if (folder / LIMITS[version]).exists():
            return home, folder, version
        folder.rmdir()
        reason = f"{parent}: groups made in it have no limits of CPU time"
    raise NoQuota(reason)


def _limit(folder: Path, version: int, n_cpus: float) -> None:
    quota = round(n_cpus * PERIOD)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {PERIOD}\n")
    else:
        (folder / "cpu.cfs_period_us").write_text(f"{PERIOD}\n")
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")


def _remove(folder: Path) -> None:
    """Processes that have just ended may be counted for a moment more. OSError if they still are after that."""
    for _ in range(100):
        with suppress(OSError):
            return folder.rmdir()
        time.sleep(0.02)
    return folder.rmdir()
