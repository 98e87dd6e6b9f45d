"""Standard output and standard error while a command runs: both are there, and fail in one way each.

What cannot be written to standard error is lost and does no harm: the answer counts. What cannot be written to standard
output raises `OutputError`. Either happens once: what is still in buffers then must not fail again when Python ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from kvrun.errors import KvrunError


class OutputError(KvrunError):
    """Standard output takes no more. `reader_left`: because whoever read it has had enough."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror or error}")
        self.reader_left = isinstance(error, BrokenPipeError)


class _Stream:
    """A text stream whose `write` and `flush` fail as `_failed` says."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _failed(self, error: OSError) -> None:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):  # it is no file
            self._stream = _nowhere()


class _Output(_Stream):
    def _failed(self, error: OSError) -> NoReturn:
        super()._failed(error)
        raise OutputError(error) from None


@contextmanager
def standard_streams() -> Iterator[None]:
    """`sys.stdout` and `sys.stderr` are as above meanwhile; what is written to a closed one goes nowhere."""
    _occupy_numbers()
    before = sys.stdout, sys.stderr
    sys.stdout = cast(Any, _Output(sys.stdout or _nowhere()))
    sys.stderr = cast(Any, _Stream(sys.stderr or _nowhere()))
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a locale that lacks a character must not end the command
            sys.stdout.reconfigure(errors="replace")
        yield
    finally:
        sys.stdout, sys.stderr = before


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


def _occupy_numbers() -> None:
    """Closed streams lead nowhere: a file opened later must not get the number that something else writes to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
