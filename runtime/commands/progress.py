"""Progress bars of long commands, on a terminal only. They are drawn when something is done, by no thread of their own,
which the system may not give."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def _on_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


@contextmanager
def announced_steps(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error: the function that is yielded says what the next of `total` steps does."""
    if not _on_terminal(sys.stderr):
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(what: str) -> None:
            nonlocal started
            bar.update(task, advance=int(started), description=what, refresh=True)
            started = True

        yield step


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error: the function that is yielded adds a number to those done, of `total`."""
    if not _on_terminal(sys.stderr):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, advance=done, refresh=True)


@contextmanager
def answered(count: Callable[[], int | None]) -> Iterator[Callable[[int, str], None] | None]:
    """A bar of lines on standard error: the function that is yielded takes how many are done, and a word on them.
    `count` says how many there are, None if that is not known. None where standard error is no terminal."""
    if not _on_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("lines, {task.description}"), TimeElapsedColumn())
    # Standard output is for the answers: redirected, they would be shown above the bar, on standard error.
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task, drawn = bar.add_task("", total=count()), 0.0

        def show(done: int, what: str) -> None:
            nonlocal drawn
            if time.monotonic() - drawn > 0.1:
                drawn = time.monotonic()
                bar.update(task, completed=done, description=what, refresh=True)

        yield show


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None] | None]:
    """Bars on standard output, one for each stage: the function that is yielded takes a stage's name, the bytes done
    and the bytes in all. None where standard output is no terminal."""
    if not _on_terminal(sys.stdout):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, auto_refresh=False) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, refresh=True)

        yield update
