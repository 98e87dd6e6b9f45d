"""How many threads a decoding step gets: those that bring something.

A thread may cost more than it brings: the two threads of one core share its arithmetic, memory that is read as fast as
it goes is not read faster by more of them, and a step of a small model is shorter than the way to other cores. Results
do not depend on the number of threads, so others are tried out on steps that are to be run anyway.
"""

from __future__ import annotations

import time
from statistics import median

LEG = 4  # steps in a row that are compared with as many before and after
WAITING = 0.2  # part of a step: who waits longer may have too many others to wait for
GAIN = 0.95  # of the time, at most, is what more threads are taken for
SOON, LATER, SELDOM = 0.1, 0.5, 10.0  # seconds until the next trial


class Pace:
    """Chooses the number of threads, at least 1, for one step after the other of the same kind.

    After each step `took` says how long it was. Fewer threads are kept when steps take no longer with them, more when
    they are clearly faster. While all there may be are used, fewer are tried soon if much is waited for others, and
    seldom otherwise. Later on both are tried again and again.
    """

    def __init__(self) -> None:
        self._kept = 0  # number of threads, 0: as many as there may be
        self._tried = 0  # 0: none is tried
        self._before: list[float] = []  # seconds of steps
        self._during: list[float] = []
        self._after: list[float] = []
        self._down = True
        self._waiting = 0.0
        self._pause = SOON
        self._next = time.monotonic() + SOON

    def threads(self, most: int) -> int:
        """The number for the next step, of at most so many."""
        number = self._tried if self._tried and len(self._during) < LEG else self._kept
        return min(number or most, most)

    def took(self, threads: int, most: int, seconds: float, waiting: float) -> None:
        """A step has taken so long with so many threads of at most `most`; waiting: the part of it, 0 to 1, in which
        the calling thread waited for the others."""
        self._waiting += (waiting - self._waiting) / 8
        if threads != self.threads(most):  # there were fewer to be had
            self._begin_anew()
        elif not self._tried:
            self._before = [*self._before[1 - LEG :], seconds]
            if len(self._before) == LEG and time.monotonic() >= self._next:
                self._try_another(threads, most)
        elif len(self._during) < LEG:
            self._during.append(seconds)
        else:
            self._after.append(seconds)
            if len(self._after) == LEG:
                self._decide(threads, most)

    def _try_another(self, now: int, most: int) -> None:
        self._down = now == most or (now > 1 and self._down)
        step = max(1, now // 4)
        self._tried = max(now - step, 1) if self._down else min(now + step, most)
        if self._tried == now:  # the only one
            self._begin_anew()

    def _decide(self, now: int, most: int) -> None:
        limit = min(median(self._before), median(self._after)) * (1 if self._down else GAIN)
        if median(self._during) <= limit:
            self._kept, self._pause, wait = self._tried % most, SOON, 0.0
        else:
            wait = min(self._pause, LATER) if now < most else self._pause if self._waiting > WAITING else SELDOM
            self._pause, self._down = min(2 * self._pause, SELDOM), not self._down
        self._begin_anew()
        self._next = time.monotonic() + wait

    def _begin_anew(self) -> None:
        self._tried, self._before, self._during, self._after = 0, [], [], []
