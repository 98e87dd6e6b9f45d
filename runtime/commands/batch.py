"""`kvrun batch`: a file of prompts, one a line, and a file of their answers, several being made at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from kvrun.commands.answer import check_no_think
from kvrun.commands.arguments import (
    Parser,
    add_answer_options,
    add_cache_options,
    add_device_options,
    add_load_option,
    add_option,
    default_model,
    given,
    joined,
    load_options,
    refuse_empty,
    standard_input,
    stream_options,
    whole,
)
from kvrun.commands.batch_files import Bell, Lines, RecordFile, StandardOutput
from kvrun.commands.batch_lines import Key, Line, read_line
from kvrun.commands.progress import answered
from kvrun.errors import KvrunError, ModelFileError, OptionError
from kvrun.files.safe_file import check_output
from kvrun.model import load
from kvrun.options import AnswerKeywords, CacheKeywords, StreamKeywords, declared, integer, resolve

if TYPE_CHECKING:
    from kvrun.request import GenerationResult, Request
    from kvrun.scheduler import Scheduler

PARALLEL = 8
SUBMITTED = 2
"""Times `--parallel`: most requests that the scheduler has, so that one waits whenever another ends."""
HELD = 32
"""Times `--parallel`: most answers that wait for an earlier one, with `--in-order`."""
PAUSE = 0.2
"""Seconds after which progress is shown anew while nothing happens; and a signal has its effect, should it come just
before the command begins to wait."""

_DESCRIPTION = """\
Answer the prompts of a file, several at once, each as it would be alone.

Each line of IN.jsonl is a JSON object, {"prompt": "text"} or {"messages": [...]}, with options such as
max_tokens, temperature or seed beside it and, if it is to have a name, custom_id. Options of the command
are for lines that have none of their own. Or it is a line of OpenAI's batch format, for chat completions
or completions. - reads standard input, also while it is still written.

Answers are written as they end, one JSON object a line; what is wrong with a line becomes its error there.
Of a file that is there already, lines that have answers in it are passed over, and new ones are added."""


def build_parser() -> argparse.ArgumentParser:
    usage = "kvrun batch [MODEL] IN.jsonl [-o OUT.jsonl] [options]"
    parser = Parser("kvrun batch", _DESCRIPTION, usage=usage)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="model file; without it, the small default model")
    add("input", metavar="IN.jsonl", help="file of prompts; - is standard input")
    add("-o", "--output", metavar="FILE", help="file to add the answers to (standard output)")
    add("--parallel", **whole("parallel"), default=PARALLEL, help=f"most answers made at once ({PARALLEL})")
    add("--in-order", action="store_true", help="write the answers in the order of the prompts")
    add("-q", "--quiet", action="store_true", help="no progress and no statistics")
    add_answer_options(parser)
    prompts = parser.add_argument_group("prompts")
    for name in ("raw", "think"):
        add_option(prompts, declared(AnswerKeywords)[name])
    add_load_option(prompts, "precise")
    add_cache_options(parser)
    memory = parser.add_argument_group("memory and device")
    kept = "MiB of prompts kept for those that begin alike; 0: none (what --parallel answers take, at most 1024)"
    memory.add_argument("--cache-ram", **whole("cache-ram"), help=kept)
    add_load_option(memory, "mmap")
    add_device_options(memory)
    add_load_option(memory, "prefault")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. Errors are raised, for `kvrun.commands.main.main` to state."""
    args = build_parser().parse_intermixed_args(list(joined(argv, {"--stop": "--stop"})))
    path = None if args.output == "-" else args.output
    with _input(args.input) as fd:
        if path is not None:
            check_output(path)
        model = load(args.model or default_model(), **load_options(args))
        defaults = stream_options(args)
        resolve(StreamKeywords, defaults, model.file.sampling)  # what is wrong with them is no line's fault
        if args.think is False:
            check_no_think(model)
        model.draft_model(args.spec)
        lines = Lines(fd, _what(args.input))
        with (
            model.scheduler(args.parallel, None, _prefix_bytes(args), **given(args, CacheKeywords)) as scheduler,
            nullcontext(StandardOutput()) if path is None else closing(RecordFile(path)) as out,
        ):
            _refuse_same(fd, out)
            before = out.answered() if isinstance(out, RecordFile) else set()
            batch = Batch(scheduler, lines, out, defaults, before, in_order=args.in_order)
            shown = not args.quiet and (path is not None or not sys.stdout.isatty())
            with closing(batch), answered(lambda: _count(fd)) if shown else nullcontext() as show:
                batch.run(show)
    return _report(batch, args.quiet)


def _prefix_bytes(args: argparse.Namespace) -> int | None:
    return None if args.cache_ram is None else integer("cache-ram", args.cache_ram, low=0, high=1 << 40) << 20


@contextmanager
def _input(path: str) -> Iterator[int]:
    """The file's descriptor."""
    if path == "-":
        yield standard_input().fileno()
        return
    with open(path, "rb", buffering=0) as file:
        yield file.fileno()


def _what(path: str) -> str:
    return "standard input" if path == "-" else path


def _refuse_same(fd: int, out: Output) -> None:
    if isinstance(out, RecordFile) and os.path.sameopenfile(fd, out.fd):
        raise OptionError(f"--output: {out.path} is the file of the prompts; give the answers another")


def _count(fd: int) -> int | None:
    """Lines of a file; None if it can be read only once."""
    if not os.path.isfile(fd) or os.lseek(fd, 0, os.SEEK_CUR):
        return None
    count, last = 0, b""
    while data := os.read(fd, 1 << 20):
        count, last = count + data.count(b"\n"), data[-1:]
    os.lseek(fd, 0, os.SEEK_SET)
    return count + (last not in (b"", b"\n"))


# --- the batch ------------------------------------------------------------------------------------


class Output(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...


class _Pending:
    """A line whose record has not been written: its request, or why there is none."""

    def __init__(self, line: Line, request: Request | KvrunError) -> None:
        self.line, self._request = line, request

    @property
    def done(self) -> bool:
        return isinstance(self._request, KvrunError) or self._request.done

    @property
    def answer_tokens(self) -> int:
        """Those that are there so far."""
        return 0 if isinstance(self._request, KvrunError) else self._request.stats.answer_tokens

    def cancel(self) -> None:
        if not isinstance(self._request, KvrunError):
            self._request.cancel()

    def result(self) -> GenerationResult:
        """Raises what has ended it."""
        if isinstance(self._request, KvrunError):
            raise self._request
        return self._request.result()


class Batch:
    """Lines on their way through a scheduler, and the counts of those that are through.

    `defaults`: options of `Session.stream` for lines that have none of their own. `answered`: lines that have their
    answers already, and are passed over. `too_long`: prompts that did not fit into the cache.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lines: Lines,
        out: Output,
        defaults: dict[str, Any],
        answered: Container[Key] = (),
        in_order: bool = False,
    ) -> None:
        self._scheduler, self._lines, self._out = scheduler, lines, out
        self._defaults, self._answered, self._in_order = defaults, answered, in_order
        self._pending: list[_Pending] = []
        self._bell = Bell()  # an answer has ended
        self._lines_of: dict[Key, int] = {}
        self.answers = self.errors = self.answered_before = self.blank = 0
        self.prompt_tokens = self.cached_tokens = self.answer_tokens = self.too_long = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self._began = time.monotonic()
        self.seconds = 0.0

    @property
    def n_lines(self) -> int:
        """Lines that are through, but for blank ones."""
        return self.answers + self.errors + self.answered_before

    def run(self, show: Callable[[int, str], None] | None = None) -> None:
        """Until all lines have their records. `show` is told how many lines are done, and how fast it goes.

        OptionError and KvrunError if lines cannot be read or records written, ModelFileError if the model cannot be
        used any more.
        """
        try:
            while not self._lines.ended or self._pending:
                self._go_on()
                if show is not None:
                    show(self.n_lines + self.blank, f"{self._speed():.1f} tok/s")
        except BaseException:
            for one in self._pending:
                one.cancel()
            raise
        self.seconds = time.monotonic() - self._began

    def close(self) -> None:
        """No answer that ends from now on is of interest."""
        self._bell.close()

    def _go_on(self) -> None:
        """Take a line if there is room and one comes before an answer ends, and write what is done."""
        if self._has_room():
            data = self._lines.next(self._bell, PAUSE)
            if data is not None:
                self._take(data)
        elif self._pending:
            self._bell.wait(PAUSE)
        self._write_done()

    def _has_room(self) -> bool:
        parallel = self._scheduler.parallel
        submitted = sum(not one.done for one in self._pending)
        return not self._lines.ended and submitted < SUBMITTED * parallel and len(self._pending) < HELD * parallel

    def _take(self, data: bytes) -> None:
        if not data.strip():
            self.blank += 1
            return
        number = self._lines.number
        line = Line(number, {})
        try:
            line = read_line(data, number)
            first = self._lines_of.setdefault(line.key, number)
            if first != number:
                raise OptionError(f"line {number} has the custom_id of line {first}")
            if line.key in self._answered:
                self.answered_before += 1
            else:
                self._pending.append(_Pending(line, self._submitted(line)))
        except KvrunError as error:
            self._pending.append(_Pending(line, error))

    def _submitted(self, line: Line) -> Request:
        prompt, own = line.request()
        options = {**self._defaults, **{name: value for name, value in own.items() if value is not None}}
        if isinstance(prompt, str):
            refuse_empty(prompt, options["raw"] is True)
        request = self._scheduler.submit(prompt, **options)
        request.add_done_callback(self._bell.ring)
        return request

    def _write_done(self) -> None:
        """The records of all that are done, or with `--in-order` of the first ones that are."""
        waiting: list[_Pending] = []
        for one in self._pending:
            if (waiting and self._in_order) or not one.done:
                waiting.append(one)
            else:
                self._out.write(self._record(one))
        self._pending = waiting

    def _record(self, one: _Pending) -> dict[str, Any]:
        try:
            result = one.result()
        except ModelFileError:  # no line's fault
            raise
        except KvrunError as error:
            self.errors += 1
            return one.line.error(str(error))
        self.answers += 1
        self.prompt_tokens += result.stats.prompt_tokens + result.stats.cached_tokens
        self.cached_tokens += result.stats.cached_tokens
        self.answer_tokens += result.stats.answer_tokens
        self.drafted_tokens += result.stats.drafted_tokens
        self.accepted_tokens += result.stats.accepted_tokens
        self.too_long += result.stats.prompt_overflow > 0
        return one.line.answer(result, self._scheduler.model.description.name)

    def _speed(self) -> float:
        """Tokens of answers a second, those under way included."""
        under_way = sum(one.answer_tokens for one in self._pending)
        return (self.answer_tokens + under_way) / max(1e-9, time.monotonic() - self._began)


def _report(batch: Batch, quiet: bool) -> int:
    """Say how it went; the exit status."""
    if batch.too_long:
        what = "1 prompt has" if batch.too_long == 1 else f"{batch.too_long:,} prompts have"
        print(
            f"kvrun: {what} more tokens than the cache keeps: the oldest were left out; a larger --ctx keeps more",
            file=sys.stderr,
        )
    if not quiet:
        before = f", {batch.answered_before:,} answered before" if batch.answered_before else ""
        read = f", {batch.cached_tokens:,} of them read before" if batch.cached_tokens else ""
        parts = [
            f"{_counted(batch.answers, 'answer')}, {_counted(batch.errors, 'error')}{before}",
            f"prompts {batch.prompt_tokens:,} tokens{read}",
            f"answers {batch.answer_tokens:,} tokens, {batch.answer_tokens / max(1e-9, batch.seconds):.1f} tok/s",
        ]
        if batch.drafted_tokens:
            parts.append(f"{batch.accepted_tokens:,} of {batch.drafted_tokens:,} drafted tokens accepted")
        print("[" + "; ".join(parts) + "]", file=sys.stderr)
    if batch.errors:
        print(f"kvrun: {batch.errors:,} of {_counted(batch.n_lines, 'line')} have errors", file=sys.stderr)
    return 1 if batch.errors else 0


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
