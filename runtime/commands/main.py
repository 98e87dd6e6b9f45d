"""The command `kvrun`: which command runs, and the one way in which commands end.

A command is a module with `main(argv) -> int`. It raises what goes wrong; here that becomes one line on standard error
and an exit status: 0 done, 1 a stated error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from kvrun.errors import KvrunError, one_line

ANSWER = "kvrun.commands.answer"
COMMANDS = {
    "bench": "kvrun.commands.bench",
    "convert": "kvrun.convert.cli",
    "inspect": "kvrun.commands.inspect",
    "perplexity": "kvrun.commands.perplexity",
}
"""Subcommand: its module. Without one, `ANSWER` runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the process by default); returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    module = COMMANDS.get(arguments[0]) if arguments else None
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a locale that lacks a character must not end the command
            sys.stdout.reconfigure(errors="replace")
        status: int = importlib.import_module(module or ANSWER).main(arguments[1:] if module else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KvrunError as error:
        return _fail(str(error))
    except SystemExit as stop:  # argparse, after --help or wrong usage; a signal that is let unwind
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except MemoryError as error:
        return _fail(f"not enough memory{f': {error}' if str(error) else ''}")


def _fail(message: str) -> int:
    if sys.stderr is not None:
        print("kvrun:", one_line(message), file=sys.stderr)
    return 1
