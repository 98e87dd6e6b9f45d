"""A request to a scheduler: a prompt and its answer, for threads and asyncio tasks that wait for it."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrun.errors import KvrunError
from kvrun.session import Stats

if TYPE_CHECKING:
    import asyncio

    from kvrun.options import StreamKeywords


@dataclass(frozen=True)
class GenerationResult:
    """An answer: its text, why it ended ("stop", "length" or "cancelled"), and its counts and times."""

    text: str
    finish_reason: str
    stats: Stats


class Request:
    """A prompt and its answer. Any thread may iterate for its pieces, or ask for the `result`; in asyncio, `async for`
    does the one and `await` the other. Each piece goes to one of those who iterate, the result to all who ask.

    A task that is cancelled while it waits leaves the request as it is: `cancel` ends it.
    """

    def __init__(self, prompt: str | Sequence[Any], options: StreamKeywords, deadline: float | None) -> None:
        self.stats = Stats()
        self._prompt, self._options, self._deadline = prompt, options, deadline
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._text: list[str] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._ended = threading.Event()
        self._lock = threading.Lock()  # of what follows, and of the moment when it ends
        self._callbacks: list[Callable[[Request], object]] = []
        self._tasks: dict[asyncio.Future[None], bool] = {}  # that wait, and whether for a piece too or only the end

    def cancel(self) -> None:
        """End it with the next step, also while its prompt is read; what it has written stays."""
        self._cancelled = True

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def __iter__(self) -> Iterator[str]:
        """The pieces that have not been taken yet, as they come. Raises what has ended the request."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for whoever asks again
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> GenerationResult:
        """The whole answer. Raises what has ended the request, TimeoutError after so many seconds."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the request has not ended within {timeout} seconds")
        if self._error is not None:
            raise self._error
        reason = self.stats.finish_reason or "cancelled"
        return GenerationResult("".join(self._text), reason, self.stats)

    def add_done_callback(self, function: Callable[[Request], object]) -> None:
        """Have function(request) called when it has ended: by the scheduler's thread, which does nothing else
        meanwhile, or if it has ended already, at once. What the function raises goes to `threading.excepthook`."""
        with self._lock:
            if not self.done:
                self._callbacks.append(function)
                return
        self._call(function)

    def _call(self, function: Callable[[Request], object]) -> None:
        try:
            function(self)
        except Exception:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    # --- asyncio ----------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[str]:
        """As `__iter__`, for a task."""
        while (piece := await self._next_piece()) is not None:
            yield piece
        if self._error is not None:
            raise self._error

    async def _next_piece(self) -> str | None:
        while True:
            with suppress(queue.Empty):
                return self._piece_now()
            with self._told(of_pieces=True) as told:
                with suppress(queue.Empty):  # one may have come before there was anybody to tell
                    return self._piece_now()
                await told

    def _piece_now(self) -> str | None:
        """The next piece, None if there are no more. Raises queue.Empty if it has not come yet."""
        done = self.done  # then all pieces are there, and where there is none somebody else has the last
        try:
            piece = self._pieces.get_nowait()
        except queue.Empty:
            if done:
                return None
            raise
        if piece is None:
            self._pieces.put(None)
        return piece

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        """As `result`, for a task."""
        return self._awaited().__await__()

    async def _awaited(self) -> GenerationResult:
        with self._told(of_pieces=False) as told:
            if not self.done:
                await told
        return self.result()

    @contextmanager
    def _told(self, of_pieces: bool) -> Iterator[asyncio.Future[None]]:
        """A future of the running loop that has a result at the end, or already with the next piece."""
        import asyncio

        told = asyncio.get_running_loop().create_future()
        with self._lock:
            self._tasks[told] = of_pieces
        try:
            yield told
        finally:
            with self._lock:
                self._tasks.pop(told, None)

    def _tell(self) -> None:
        """Those who wait for what there is now."""
        if not self._tasks:
            return
        with self._lock:
            tasks = [task for task, of_pieces in self._tasks.items() if of_pieces or self.done]
            for task in tasks:
                del self._tasks[task]
        for task in tasks:
            with suppress(RuntimeError):  # a loop that is closed; nobody waits in it
                task.get_loop().call_soon_threadsafe(_settle, task)

    # --- for the scheduler ------------------------------------------------------------------------

    @property
    def prompt(self) -> str | Sequence[Any]:
        return self._prompt

    @property
    def options(self) -> StreamKeywords:
        return self._options

    @property
    def given_up(self) -> bool:
        """Whether it is to end now: it was cancelled, or its time is over."""
        if self._deadline is not None and time.monotonic() > self._deadline and not self._cancelled:
            self._error, self._cancelled = KvrunError("the request has not ended within its time limit"), True
        return self._cancelled

    def show(self, piece: str) -> None:
        self._text.append(piece)
        self._pieces.put(piece)
        self._tell()

    def end(self, error: BaseException | None = None) -> None:
        self._error = self._error or error
        with self._lock:
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        self._pieces.put(None)
        self._tell()
        for function in callbacks:
            self._call(function)


def _settle(task: asyncio.Future[None]) -> None:
    if not task.done():
        task.set_result(None)
