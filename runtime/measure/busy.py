"""A process that keeps a CPU busy until its standard input ends: the script of `kvrun.measure.neighbours`.

    python busy.py compute                 arithmetic that needs no memory
    python busy.py memory BYTES            copies one half of so many bytes to the other, over and over

It writes a line when it begins, with its memory at hand. Its standard input is a pipe that whoever started it holds
open: however that process ends, the pipe is closed, and this one ends. It needs the standard library alone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

PIECE = 1 << 24  # bytes copied at once: between two pieces Python looks at its other thread


def end_with_input() -> NoReturn:
    """Ends the process when standard input does."""
    while os.read(0, 4096):
        pass
    os._exit(0)


def begin() -> None:
    os.write(1, b"busy\n")


def compute() -> NoReturn:
    begin()
    x = 1
    while True:
        x = (x * 1103515245 + 12345) & 0x7FFFFFFF


def stream(n_bytes: int) -> NoReturn:
    half = max(1, n_bytes // 2)
    data = memoryview(bytearray(b"\1") * (2 * half))  # written: pages that nobody has written are all one page
    begin()
    while True:
        for start in range(0, half, PIECE):
            end = min(start + PIECE, half)
            data[half + start : half + end] = data[start:end]


def main(kind: str, n_bytes: str = "0") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that started this one
    threading.Thread(target=end_with_input, daemon=True).start()
    if kind == "memory":
        stream(int(n_bytes))
    compute()


if __name__ == "__main__":
    main(*sys.argv[1:])
