"""Processes that compete with a measurement for the CPUs, or for the memory, of this machine.

Each keeps one CPU busy (`busy.py`), has the affinity, the control groups and the priority of this process, and stays in
its session: a session of its own would be a scheduling group of its own, of which Linux gives each the same time
(autogroup), however many processes it has.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

from kvrun.errors import KvrunError, OptionError

KINDS = ("compute", "memory")
MAX_NEIGHBOURS = 256
STREAMED = 1 << 28
"""Bytes that a neighbour of kind "memory" goes through: several times the last-level cache of most machines."""
BUSY = Path(__file__).with_name("busy.py")


def fair_share(cpus: int, threads: int, neighbours: int) -> float:
    """The part of its speed alone that `threads` threads should keep on `cpus` CPUs beside so many processes that keep
    a CPU busy each, if all get the same time: cpus / (cpus + neighbours) with a thread for each CPU. Threads beyond the
    number of CPUs are no claim to a larger part, and while there are CPUs for all nothing is lost."""
    return min(1.0, cpus / (min(threads, cpus) + neighbours))


class Neighbours:
    """A context in which `n` processes of a kind are busy; they have begun when it is entered, and are gone when it is
    left. However this process ends, they end too.

    Raises OptionError if the system has no room for so many, KvrunError if they do not begin.
    """

    def __init__(self, n: int, kind: str = "compute") -> None:
        if kind not in KINDS:
            raise OptionError(f"neighbour_kind: {kind!r} is not one of {', '.join(KINDS)}")
        self.n, self.kind = n, kind
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def __enter__(self) -> Neighbours:
        arguments = [str(STREAMED)] if self.kind == "memory" else []
        command = [sys.executable, "-I", "-S", str(BUSY), self.kind, *arguments]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            for _ in range(self.n):
                self._processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null))
            for process in self._processes:
                assert process.stdout is not None
                if not process.stdout.readline():
                    raise KvrunError(
                        f"neighbours: a process has ended before it began (status {process.wait()}): there is no "
                        f"memory for it, or {sys.executable} cannot run {BUSY}"
                    )
        except OSError as error:
            self._end()
            raise OptionError(f"neighbours: {self.n} processes cannot be started: {error.strerror}") from None
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def check(self) -> None:
        """KvrunError if one has ended, so that what was measured beside them is worth nothing."""
        ended = [process.returncode for process in self._processes if process.poll() is not None]
        if ended:
            raise KvrunError(
                f"neighbours: {len(ended)} of {self.n} have ended (status {ended[0]}) before the measurement did; "
                "fewer, or those that compute, take less memory"
            )

    def _end(self) -> None:
        """All are told before any is waited for."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait()
        self._processes.clear()
