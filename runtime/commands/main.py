"""The command `kvrun`: which command runs, and the one way in which commands end.

A command is a module with `main(argv) -> int`. It raises what goes wrong; here that becomes one line on standard error
and an exit status: 0 done, 1 a stated error, 2 wrong usage, 128 and the number of a signal that ended it (130: Ctrl-C).

An interruption while all this still loads ends in the same way, so nothing that takes long is imported here.
"""

from __future__ import annotations

import importlib
import os
import sys

from kvrun.errors import KvrunError, one_line

TYPE_CHECKING = False  # as in typing
if TYPE_CHECKING:
    from collections.abc import Sequence

ANSWER = "kvrun.commands.answer"
COMMANDS = {
    "batch": "kvrun.commands.batch",
    "bench": "kvrun.commands.bench",
    "convert": "kvrun.convert.cli",
    "inspect": "kvrun.commands.inspect",
    "perplexity": "kvrun.commands.perplexity",
}
"""Subcommand: its module. Without one, `ANSWER` runs."""
SILENT = ("convert",)
"""Their result is not on standard output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the process by default); returns the exit status."""
    # NumPy's BLAS, of which no command uses more than a little, would start threads as it loads, and end the process
    # where the system gives none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from kvrun.commands import signals
        from kvrun.commands.streams import standard_streams

        with_output = sys.stdout is not None
        try:
            with standard_streams(), signals.endable():
                return _stated(list(sys.argv[1:] if argv is None else argv), with_output)
        finally:
            if argv is None:
                signals.nothing_to_lose()
    except KeyboardInterrupt:
        return 130


def _stated(arguments: list[str], with_output: bool) -> int:
    """The exit status of a command; errors are stated."""
    from kvrun.commands.streams import OutputError

    try:
        try:
            return _run(arguments, with_output)
        finally:
            sys.stdout.flush()
    except OutputError as error:
        return 0 if error.reader_left else _fail(str(error))
    except KvrunError as error:
        return _fail(str(error))
    except SystemExit as stop:  # argparse, after --help or wrong usage; a signal
        return stop.code if isinstance(stop.code, int) else 2
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename or repr('')}: "
        return _fail(f"{where}{error.strerror or error}")
    except MemoryError as error:
        return _fail(f"not enough memory{f': {error}' if str(error) else ''}")


def _run(arguments: list[str], with_output: bool) -> int:
    from kvrun.commands.signals import loading

    name = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if not with_output and name not in SILENT:
        raise KvrunError("standard output is closed")
    with loading():
        command = importlib.import_module(COMMANDS[name] if name else ANSWER)
    status: int = command.main(arguments[1:] if name else arguments)
    return status


def _fail(message: str) -> int:
    print("kvrun:", one_line(message), file=sys.stderr)
    return 1
