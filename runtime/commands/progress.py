"""Progress bars of long commands, on a terminal only. They are drawn when something is done, by no thread of their own,
which the system may not give."""

from __future__ import annotations

import sys
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
