"""What ends a command from outside: Ctrl-C, SIGTERM and SIGHUP all unwind it, so that sessions are saved and temporary
files removed, and its exit status is 128 and the signal's number.

Ctrl-C (SIGINT) is Python's KeyboardInterrupt. The two others raise `Ended`; where they were ignored when the command
started, as SIGHUP is under nohup, they still are. One that comes again ends the command at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
TOGETHER = 0.5
"""Seconds after a signal in which others belong to it: timeout sends its signal twice, a terminal that is closed
SIGHUP, systemd SIGTERM and SIGHUP. They must not take for impatience what nobody meant."""


class Ended(SystemExit):
    """A signal ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class _Watch:
    """Since when the command is ending for a signal."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    @property
    def ending(self) -> bool:
        return self._since is not None

    def first(self, number: int) -> bool:
        """Whether this signal is the first; False also for one that belongs to it. Raises for one that comes again."""
        if self._since is None:
            self.begin()
            return True
        if time.monotonic() - self._since > TOGETHER:
            signal.signal(number, signal.SIG_DFL)  # for the next, should what this one interrupts hang
            raise _exception(number)
        return False


_watch = _Watch()


@contextmanager
def endable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Ended` meanwhile."""
    global _watch

    def end(number: int, frame: Any) -> None:
        if _watch.first(number):
            raise Ended(number)

    _watch = _Watch()
    in_main_thread = threading.current_thread() is threading.main_thread()
    ending = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL] if in_main_thread else []
    with _handled(end, ending):
        yield


@contextmanager
def finishing(stopped: bool) -> Iterator[None]:
    """What is done meanwhile, such as saving, is finished before a signal takes effect, unless it comes again.
    `stopped`: the command is already ending for a signal."""
    came: list[int] = []

    def wait(number: int, frame: Any) -> None:
        if _watch.first(number):
            came.append(number)

    if stopped:
        _watch.begin()
    with _handled(wait, _handled_by_us()):
        yield
    if came:
        raise _exception(came[0])


@contextmanager
def loading() -> Iterator[None]:
    """Modules are imported meanwhile, and nothing is lost: a signal ends the process itself. An exception in the middle
    of an import may arrive as another, or not at all."""

    def leave(number: int, frame: Any) -> None:
        os._exit(128 + number)

    with _handled(leave, _handled_by_us()):
        yield


def nothing_to_lose() -> None:
    """The command is done: a signal may end what Python still clears up, but not change the status after another."""
    for number in _handled_by_us():
        signal.signal(number, signal.SIG_IGN if _watch.ending else signal.SIG_DFL)


def _handled_by_us() -> list[int]:
    """Not those that are ignored. Python handles signals in the main thread alone: in others none."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in (signal.SIGINT, *ENDING) if callable(signal.getsignal(number))]


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Ended(number)


@contextmanager
def _handled(handler: Any, numbers: list[int]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, previous)
