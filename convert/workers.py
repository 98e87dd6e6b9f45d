"""Threads that work through tasks, as many as the system gives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers(Generic[Task, Result]):
    """Up to `n` threads that call `work` with what is submitted, in its order. Where no thread can be made (a limit of
    processes, no memory) whoever submits does the work. A context manager: tasks that nobody has begun are dropped at
    its end, and the threads are over."""

    def __init__(self, n: int, work: Callable[[Task], Result]) -> None:
        self._work = work
        self._tasks: SimpleQueue[tuple[Future[Result], Task] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        for _ in range(n):
            thread = Thread(target=self._run, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break
            self._threads.append(thread)

    def submit(self, task: Task) -> Future[Result]:
        """What `work` returns or raises for the task, once it has been done."""
        future: Future[Result] = Future()
        if self._threads:
            self._tasks.put((future, task))
        else:
            self._do(future, task)
        return future

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while True:
                self._tasks.get_nowait()
        except Empty:
            pass
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._do(*task)

    def _do(self, future: Future[Result], task: Task) -> None:
        try:
            future.set_result(self._work(task))
        except BaseException as error:
            future.set_exception(error)
