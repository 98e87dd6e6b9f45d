"""How many CPUs this process may use: its affinity, and the quota of the container that it runs in.

Linux's control groups limit the time of a group's processes, and of all groups within it: version 2 in ``cpu.max``
(kernel documentation, admin-guide/cgroup-v2), version 1 in ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``
(scheduler/sched-bwc). Threads beyond that quota only make the system stop all of them for the rest of a period.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_FRESH = 0.2  # seconds
_known = (-_FRESH, 1)  # when, and how many


def max_threads() -> int:
    """The number of threads by default: the CPUs of this process's affinity or the whole CPUs of its quota, whichever
    is less, and at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def usable() -> int:
    """What ``max_threads`` says, or said a moment ago: it may change while a process runs, and more threads than that
    bring nothing."""
    global _known
    if time.monotonic() - _known[0] > _FRESH:
        _known = time.monotonic(), max_threads()
    return _known[1]


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the control groups of this process grant it, the least of all that it is in; None if there is no limit
    or none that can be read. ``root`` has ``proc/self`` and the mounted groups."""
    quotas = [quota for folder, version in control_groups(root) if (quota := _quota(folder, version)) is not None]
    return min(quotas, default=None)


def control_groups(root: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of each group for CPU time that this process is in, its own first, up to the mounted one."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, group = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        version = 2 if number == "0" and not controllers else 1
        if not group or (version == 1 and "cpu" not in controllers.split(",")):
            continue
        for mounted, point in _mounts(root, version):
            # A container may see its group's path as the host has it, and only its own group mounted.
            path, top = PurePosixPath(group), PurePosixPath(mounted)
            inside = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
            folder = root / point.relative_to("/")
            for level in (inside, *inside.parents):
                if ".." not in level.parts:
                    yield folder / level, version


def _mounts(root: Path, version: int) -> Iterator[tuple[str, PurePosixPath]]:
    """(the group, where it is mounted) of the hierarchy of that version that limits CPU time."""
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, (kind, *_, options) = left.split(), right.split() or ("", "")
        if len(fields) < 5 or not fields[4].startswith("/"):
            continue
        if kind == "cgroup2" if version == 2 else kind == "cgroup" and "cpu" in options.split(","):
            yield fields[3], PurePosixPath(fields[4])


def _quota(folder: Path, version: int) -> float | None:
    """CPUs that one group grants; None without a limit."""
    if version == 2:
        numbers = next(_lines(folder / "cpu.max"), "").split()
    else:
        numbers = [next(_lines(folder / f"cpu.cfs_{name}_us"), "") for name in ("quota", "period")]
    try:
        quota, period = map(int, numbers)
    except ValueError:  # "max", or no such file: the group at the top has none
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(path: Path) -> Iterator[str]:
    """Lines of a small file of the system; none if it cannot be read."""
    try:
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
