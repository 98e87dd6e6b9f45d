"""Files of `kvrun batch`: lines that are read as they come, and records that are written whole."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from contextlib import suppress
from typing import Any

from kvrun.commands.arguments import LONGEST_TEXT
from kvrun.commands.batch_lines import Key, answered_key
from kvrun.commands.signals import finishing
from kvrun.errors import KvrunError, OptionError
from kvrun.files.safe_file import check_output, lock


class Bell:
    """What one thread rings, and another waits for, besides for a file. Ringing it after it was closed does nothing."""

    def __init__(self) -> None:
        self._rung, self._ring = socket.socketpair()
        for end in (self._rung, self._ring):
            end.setblocking(False)

    def ring(self, *_: object) -> None:
        with suppress(OSError):  # it rings already, or is closed
            self._ring.send(b".")

    def wait(self, seconds: float, fd: int | None = None) -> bool:
        """Until it has rung, or the file can be read, but not longer than so many seconds; whether the file can."""
        files: list[Any] = [self._rung, *([] if fd is None else [fd])]
        ready = select.select(files, [], [], seconds)[0]
        if self._rung in ready:
            with suppress(BlockingIOError):
                while len(self._rung.recv(4096)) == 4096:
                    pass
        return fd in ready

    def close(self) -> None:
        self._ring.close()
        self._rung.close()


class Lines:
    """Lines of a file, a pipe or a terminal, which may still be written. `number`: of those handed out.

    `ended`: there are no more. A line that is too long is cut off one byte behind `LONGEST_TEXT`.
    """

    def __init__(self, fd: int, what: str) -> None:
        self._fd, self._what = fd, what
        self._data, self._seen, self._end_of_file = bytearray(), 0, False
        self.number, self.ended = 0, False

    def next(self, bell: Bell, seconds: float) -> bytes | None:
        """The next line without its end, None if none comes before the bell rings, or within so many seconds.
        OptionError if it cannot be read."""
        while (line := self._line()) is None and not self.ended:
            if not self._read(bell, seconds):
                return None
            seconds = 0.0
        return line

    def _read(self, bell: Bell, seconds: float) -> bool:
        """Whether there was something to read, if only the end."""
        try:
            if not bell.wait(seconds, self._fd):
                return False
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return False
        except OSError as error:
            raise OptionError(f"{self._what} cannot be read: {error.strerror}") from None
        del self._data[LONGEST_TEXT + 1 :]
        self._seen = len(self._data)
        self._data += data
        self._end_of_file = not data
        return True

    def _line(self) -> bytes | None:
        end = self._data.find(b"\n", self._seen)
        if end < 0:
            self._seen = len(self._data)
            if not self._end_of_file:
                return None
            self.ended = not self._data
            end = len(self._data)
        line = None if self.ended else bytes(self._data[: min(end, LONGEST_TEXT + 1)])
        del self._data[: end + 1]
        self._seen = 0
        if line is not None:
            self.number += 1
            line = line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line
        return line


class StandardOutput:
    """Records on standard output."""

    def write(self, record: dict[str, Any]) -> None:
        with finishing(stopped=False):  # a whole line or none
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()


class RecordFile:
    """Records at the end of a file, which nobody else may write to meanwhile. A record is the system's to keep as soon
    as it is written: whatever becomes of the process, it is there."""

    def __init__(self, path: str) -> None:
        self.path = path
        target = check_output(path)
        try:
            self.fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._failed(error) from None
        if lock(self.fd) is False:
            self.close()
            raise KvrunError(f"{path}: cannot write: another process does")

    def answered(self) -> set[Key]:
        """The lines that the file has answers for. A last record of which only a part is there, since the process or
        the machine was stopped, is cut off. KvrunError, with nothing changed, if it holds anything but records."""
        found: set[Key] = set()
        end = 0
        with open(self.fd, "rb", closefd=False) as file:
            for number, data in enumerate(file, 1):
                whole = data.endswith(b"\n")
                try:
                    key = answered_key(data) if data.strip() else None
                except (OptionError, ValueError) as error:
                    if whole or isinstance(error, OptionError) or not data.startswith(b"{"):
                        raise self._no_record(number) from None
                    os.ftruncate(self.fd, end)
                    break
                if key is not None:
                    found.add(key)
                if not whole:
                    os.write(self.fd, b"\n")
                end += len(data)
        return found

    def _no_record(self, number: int) -> KvrunError:
        return KvrunError(
            f"{self.path}: line {number} is no record of kvrun batch, which would be added to; give the answers "
            "another file"
        )

    def close(self) -> None:
        os.close(self.fd)

    def write(self, record: dict[str, Any]) -> None:
        """Add a record. KvrunError if it cannot be written; then nothing of it is there."""
        data = json.dumps(record).encode("ascii") + b"\n"
        with finishing(stopped=False):
            end = os.fstat(self.fd).st_size
            try:
                while data:
                    data = data[os.write(self.fd, data) :]
            except OSError as error:
                os.ftruncate(self.fd, end)
                raise self._failed(error) from None

    def _failed(self, error: OSError) -> KvrunError:
        return KvrunError(f"{self.path}: cannot write: {error.strerror or error}")
