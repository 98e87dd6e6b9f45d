"""Busy processes beside a measurement: they are busy, and none is left, however the measurement ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvrun.errors import KvrunError, OptionError
from kvrun.measure import neighbours
from kvrun.measure.neighbours import KINDS, Neighbours, fair_share
from support.cases import some
from support.commands import KVRUN

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes in /proc")


def stat(pid):
    """(state, parent, ticks of CPU time) of a process; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[11]) + int(fields[12])


def running(pid):
    found = stat(pid)
    return found is not None and found[0] not in "ZX"


def children(parent):
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if (found := stat(pid)) and found[1] == parent]


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(neighbours, "STREAMED", 1 << 20)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_busy_meanwhile(kind):
    with Neighbours(2, kind) as others:
        pids = others.pids
        assert len(set(pids)) == 2
        before = [stat(pid)[2] for pid in pids]
        until(lambda: all(stat(pid)[2] > ticks for pid, ticks in zip(pids, before, strict=True)))
        others.check()
        assert all(os.getsid(pid) == os.getsid(0) for pid in pids)
    assert not any(map(running, pids)) and not others.pids


def test_none_need_not_be_started():
    with Neighbours(0) as others:
        others.check()
        assert not others.pids


def test_they_end_after_an_error():
    with pytest.raises(KeyboardInterrupt), Neighbours(2) as others:
        pids = others.pids
        raise KeyboardInterrupt
    assert len(pids) == 2 and not any(map(running, pids))


def test_one_that_has_ended_is_noticed():
    with Neighbours(2) as others:
        os.kill(others.pids[1], signal.SIGKILL)
        os.waitid(os.P_PID, others.pids[1], os.WEXITED | os.WNOWAIT)
        with pytest.raises(KvrunError, match="1 of 2 have ended"):
            others.check()


def test_those_that_cannot_be(monkeypatch):
    with pytest.raises(OptionError, match="neighbour_kind: 'loud' is not one of compute, memory"):
        Neighbours(1, "loud")
    monkeypatch.setattr(neighbours, "STREAMED", 1 << 60)
    with pytest.raises(KvrunError, match="before it began"), Neighbours(1, "memory"):
        pass
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OptionError, match="1 processes cannot be started: No such file"), Neighbours(1):
        pass


@pytest.mark.parametrize(
    "number", some([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]), ids=lambda number: number.name
)
def test_they_end_with_the_command(number, converted):
    command = [*KVRUN, "bench", str(converted("grouped-tied")), "--neighbours", "2", "--seconds", "0.05"]
    process = subprocess.Popen([*command, "--runs", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pids = until(lambda: len(found := children(process.pid)) == 2 and found)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and b"Traceback" not in err
    until(lambda: not any(map(running, pids)))


@pytest.mark.parametrize("kind", KINDS)
def test_they_end_when_the_process_that_started_them_is_killed(kind):
    """It can do nothing for that itself."""
    code = (
        "import sys, time; from kvrun.measure import neighbours; neighbours.STREAMED = 1 << 20\n"
        "with neighbours.Neighbours(2, sys.argv[1]) as others: print(*others.pids, flush=True), time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, kind], stdout=subprocess.PIPE) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(running, pids))
        process.kill()
    try:
        until(lambda: not any(map(running, pids)), seconds=20)
    finally:
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "cpus, threads, n, share",
    [
        (2, 2, 0, 1),
        (2, 2, 1, 2 / 3),
        (2, 2, 6, 1 / 4),
        (2, 1, 1, 1),
        (2, 1, 3, 1 / 2),
        (2, 64, 2, 1 / 2),
        (1, 1, 1, 1 / 2),
    ],
)
def test_a_fair_share(cpus, threads, n, share):
    assert fair_share(cpus, threads, n) == share
