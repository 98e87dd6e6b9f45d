"""The default number of threads: affinity, and quotas of control groups as Linux shows them."""

import os
from pathlib import Path

import pytest

from kvrun import _core
from kvrun._core import cpus

V1_MOUNT = "33 25 0:28 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
V2_MOUNT = "29 24 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
OTHER_MOUNT = "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw,errors=remount-ro"
MEMORY_MOUNT = "34 25 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def system(root: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A file system with what /proc says of the process, and these files of the groups."""
    written = {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": "\n".join([OTHER_MOUNT, MEMORY_MOUNT, *mounts]),
        **files,
    }
    for name, text in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/cpu,cpuacct/"


def v1(folder: str, quota: int, period: int = 100000) -> dict[str, str]:
    return {f"{V1}{folder}cpu.cfs_quota_us": str(quota), f"{V1}{folder}cpu.cfs_period_us": str(period)}


CASES = {
    "2: a limit": ("0::/", [V2_MOUNT], {f"{V2}cpu.max": "150000 100000"}, 1.5),
    "2: no limit": ("0::/", [V2_MOUNT], {f"{V2}cpu.max": "max 100000"}, None),
    "2: the group at the top has no file": ("0::/", [V2_MOUNT], {}, None),
    "2: the least of those above": (
        "0::/a/b/c",
        [V2_MOUNT],
        {f"{V2}a/cpu.max": "200000 100000", f"{V2}a/b/cpu.max": "max 100000", f"{V2}a/b/c/cpu.max": "500000 100000"},
        2.0,
    ),
    "2: a path that leads out of the namespace": ("0::/../other", [V2_MOUNT], {f"{V2}cpu.max": "50000 100000"}, 0.5),
    "2: part of the tree mounted": (
        "0::/docker/x/inner",
        [V2_MOUNT.replace("{root}", "/docker/x")],
        {f"{V2}inner/cpu.max": "300000 100000"},
        3.0,
    ),
    "1: a limit": ("4:cpu,cpuacct:/", [V1_MOUNT], v1("", 250000), 2.5),
    "1: another period": ("4:cpu,cpuacct:/", [V1_MOUNT], v1("", 20000, 10000), 2.0),
    "1: no limit": ("4:cpu,cpuacct:/", [V1_MOUNT], v1("", -1), None),
    "1: the host's path in a container": ("4:cpu,cpuacct:/docker/x", [V1_MOUNT], v1("", 100000), 1.0),
    "1: the group above": ("4:cpu,cpuacct:/a/b", [V1_MOUNT], v1("a/b/", -1) | v1("a/", 400000), 4.0),
    "both: the CPU's is of version 1": (
        "4:cpu,cpuacct:/\n3:cpuset:/\n0::/",
        [V1_MOUNT, V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")],
        v1("", 100000),
        1.0,
    ),
    "other controllers only": ("5:cpuset:/\n6:memory:/", [V1_MOUNT], v1("", 100000), None),
    "numbers that are none": ("0::/", [V2_MOUNT], {f"{V2}cpu.max": "lots 100000"}, None),
    "a period of 0": ("4:cpu:/", [V1_MOUNT], v1("", 100000, 0), None),
    "lines that are none": ("nothing\n::\n0:", [V2_MOUNT, "x - ", "1 2 3 4 5 - cgroup2"], {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_quota(tmp_path, case):
    groups, mounts, files, quota = CASES[case]
    assert cpus.cpu_quota(system(tmp_path, groups, [m.replace("{root}", "/") for m in mounts], files)) == quota


def test_no_proc(tmp_path):
    assert cpus.cpu_quota(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
@pytest.mark.parametrize("quota, threads", [(None, 3), (0.4, 1), (1.0, 1), (1.5, 1), (2.9, 2), (64.0, 3)])
def test_the_smaller_of_affinity_and_quota(monkeypatch, quota, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert _core.max_threads() == threads
