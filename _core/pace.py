"""How many threads a decoding step gets: those that bring something.

A thread may cost more than it brings: the two threads of one core share its arithmetic, memory that is read as fast as
it goes is not read faster by more of them, and a step of a small model is shorter than the way to other cores. Results
do not depend on the number of threads, so others are tried out on steps that are to be run anyway.
"""

from __future__ import annotations

import time
from statistics import median

STEPS, SECONDS = 4, 0.05  # a leg: so many steps, and so long, that the system has given every thread its place
WAITING = 0.2  # part of a step: who waits longer may have too many others to wait for
GAIN = 0.95  # of the time, at most: what is worth a change
SOON, LATER, SELDOM = 0.1, 0.5, 10.0  # seconds until the next trial


class Pace:
    """Chooses the number of threads, at least 1, for one step after the other of the same kind.

    After each step `took` says how long it was. A leg of steps with another number is compared with one before and one
    after it. While as many threads as there may be are used, fewer are tried soon if much is waited for others, and
    kept when steps take no longer; else seldom, and kept when they are clearly faster. While fewer are used, other
    numbers are tried again and again, and more are kept when they are clearly faster.
    """

    def __init__(self) -> None:
        self._kept = 0  # number of threads, 0: as many as there may be
        self._tried = 0  # 0: none is tried
        self._legs: list[float] = []  # seconds of a step: before the trial, during it, after it
        self._leg: list[float] = []  # of each step of the one under way, and of all
        self._spent = 0.0
        self._down = True
        self._waiting = 0.0
        self._pause = SOON
        self._last = time.monotonic()  # trial

    def threads(self, most: int) -> int:
        """The number for the next step, of at most so many."""
        number = self._tried if self._tried and len(self._legs) == 1 else self._kept
        return min(number or most, most)

    def took(self, threads: int, most: int, seconds: float, waiting: float) -> None:
        """A step has taken so long with so many threads of at most `most`; waiting: the part of it, 0 to 1, in which
        the calling thread waited for the others."""
        self._waiting += (waiting - self._waiting) / 8
        if threads != self.threads(most):  # there were fewer to be had
            self._tried, self._legs, self._leg, self._spent = 0, [], [], 0.0
            return
        self._leg.append(seconds)
        self._spent += seconds
        if len(self._leg) < STEPS or self._spent < SECONDS:
            return
        self._legs.append(median(self._leg))
        self._leg, self._spent = [], 0.0
        if not self._tried:
            del self._legs[:-1]
            if time.monotonic() >= self._last + self._until_next(threads, most):
                self._tried = self._another(threads, most)
        elif len(self._legs) == 3:
            self._decide(threads, most)

    def _until_next(self, now: int, most: int) -> float:
        if now < most:
            return min(self._pause, LATER)
        return self._pause if self._waiting > WAITING else SELDOM

    def _another(self, now: int, most: int) -> int:
        """The number to try; 0 if there is no other."""
        self._down = now == most or (now > 1 and self._down)
        step = max(1, now // 3)
        number = max(now - step, 1) if self._down else min(now + step, most)
        return number if number != now else 0

    def _decide(self, now: int, most: int) -> None:
        before, during, after = self._legs
        no_slower = self._down and (now < most or self._waiting > WAITING)
        if during <= min(before, after) * (1 if no_slower else GAIN):
            self._kept, self._pause, self._last = self._tried % most, SOON, 0.0
        else:
            self._pause, self._last = min(2 * self._pause, SELDOM), time.monotonic()
            self._down = not self._down
        self._tried, self._legs = 0, []
