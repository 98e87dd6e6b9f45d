"""The command `kvrun` in a process of its own, on pipes or on a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time

KVRUN = [sys.executable, "-m", "kvrun"]


def command(*arguments, stdin=b"", env=None, **options):
    """(exit status, standard output, standard error as text)"""
    done = subprocess.run(
        [*KVRUN, *map(os.fspath, arguments)],
        input=stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        **options,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def refused(result, *words, status=1):
    """One line on standard error, nothing on standard output."""
    assert result[0] == status and not result[1], result
    assert re.fullmatch(r"kvrun: [^\n]+\n", result[2]), result[2]
    for word in words:
        assert word in result[2], result[2]


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.environ["TERM"] = "xterm"
            os.execv(KVRUN[0], [*KVRUN, *arguments])
        self.seen = ""

    def read(self, pattern, seconds=60):
        """Wait until what has come since the last match matches."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                text = os.read(self.fd, 65536).decode("utf-8", "replace")
                if "\x1b[6n" in text:  # asks where the cursor is
                    os.write(self.fd, b"\x1b[1;1R")
                self.seen += text
        self.seen = self.seen[match.end() :]
        return match

    def type(self, text):
        os.write(self.fd, text.encode())

    def status(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if select.select([self.fd], [], [], 0.2)[0] and not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
