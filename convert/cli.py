"""`kvrun convert`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvrun.errors import KvrunError, one_line


def build_parser() -> argparse.ArgumentParser:
    from kvrun.convert.weight_types import TYPES, types_help

    parser = argparse.ArgumentParser(
        prog="kvrun convert",
        description="Make a model file from a Hugging Face checkpoint folder or a GGUF file.",
        epilog=types_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, or a .gguf file")
    parser.add_argument("-o", "--output", metavar="MODEL", required=True, help="the model file to write")
    parser.add_argument(
        "--type",
        metavar="T",
        default="same",
        type=_weight_type,
        help=f"same (default), or {', '.join(kind for kind in TYPES if kind != 'same')}",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out (token ids only)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the summary even when piped")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 stated error, 2 wrong usage, 130 interrupted."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    from kvrun.convert.pipeline import convert

    try:
        with _terminable(), _progress_bar() as progress:
            result = convert(
                args.checkpoint, args.output, args.type, tokenizer=not args.no_tokenizer, progress=progress
            )
        if args.verbose or sys.stdout.isatty():
            _print_summary(result)
    except KvrunError as error:
        print("kvrun:", one_line(error), file=sys.stderr)
        return 1
    except MemoryError:
        print(f"kvrun: {args.checkpoint}: not enough memory to convert it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _weight_type(value: str) -> str:
    from kvrun.convert.weight_types import TYPES

    if value not in TYPES:
        raise argparse.ArgumentTypeError(f"unknown type {value!r} (choose from {', '.join(TYPES)})")
    return value


def _print_summary(result: Any) -> None:
    model = result.model
    types: dict[str, int] = {}
    for weight in model.weights.values():
        types[weight.type] = types.get(weight.type, 0) + 1
    lines = [
        f"{model.path}: {model.description.name} ({model.description.architecture})",
        *result.notes,
        f"{model.nbytes / 1e6:.1f} MB, {result.n_weights / 1e6:.1f} M weights at "
        f"{result.bits_per_weight:.2f} bits: " + ", ".join(f"{count} {name}" for name, count in sorted(types.items())),
        f"read back: all {len(model.tensor_nbytes)} checksums match; {result.seconds:.1f} s",
    ]
    try:
        print("\n".join(map(one_line, lines)), flush=True)
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from failing once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that the temporary file is removed."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """A `Progress` that draws a bar on a terminal; None when piped."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield update


if __name__ == "__main__":
    sys.exit(main())
