"""Several prompts at once: one thread runs the steps of all running requests together.

A step takes the next token of every request that writes, and a bounded piece of one prompt that is read, so that nobody
waits for someone else's long prompt. Requests come from any thread; first come, first served.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrun.errors import KvrunError, OptionError, SchedulerFullError
from kvrun.options import MAX_PARALLEL, integer
from kvrun.session import Session, Stats

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from typing_extensions import Self, Unpack

    from kvrun.backend import StepItem
    from kvrun.model import Model
    from kvrun.options import CacheKeywords, StreamKeywords
    from kvrun.session import Work

PAUSE = 3.0
"""A piece of a prompt may take so many times as long as a step in which nothing is read."""
PIECE, LEAST = 32, 8
"""Tokens of the first piece, before it is known how long they take; pieces are whole multiples of the latter."""


class _Piece:
    """How many tokens of a prompt a step has in which others write: so few that those get their next token soon, so
    many that the prompt does not take much longer than alone. Seconds are averages over the last steps."""

    def __init__(self) -> None:
        self._writing = 0.0  # of a step in which nothing is read
        self._token = 0.0  # that a token of a prompt adds

    def took(self, seconds: float, read: int) -> None:
        if not read:
            self._writing += (seconds - self._writing) / (4 if self._writing else 1)
        elif self._writing:
            token = max(seconds - self._writing, 0) / read
            self._token += (token - self._token) / (4 if self._token else 1)

    @property
    def tokens(self) -> int:
        if not self._token:
            return PIECE
        return max(LEAST, int(PAUSE * self._writing / self._token) // LEAST * LEAST)


@dataclass(frozen=True)
class GenerationResult:
    """An answer: its text, why it ended ("stop", "length" or "cancelled"), and its counts and times."""

    text: str
    finish_reason: str
    stats: Stats


class Request:
    """A prompt and its answer, which any thread may wait for: iterate for its pieces, or ask for the `result`."""

    def __init__(self, prompt: str | Sequence[Any], options: StreamKeywords, deadline: float | None) -> None:
        self.stats = Stats()
        self._prompt, self._options, self._deadline = prompt, options, deadline
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._text: list[str] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._ended = threading.Event()

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

    def end(self, error: BaseException | None = None) -> None:
        self._error = self._error or error
        self._ended.set()
        self._pieces.put(None)


class _Running:
    """A request in a session of its own, and the step that it waits for."""

    def __init__(self, request: Request, session: Session) -> None:
        self.request, self.session = request, session
        self.step: StepItem | None = None
        self._work: Work = session.steps(request.prompt, **request.options)
        request.stats = session.stats

    @property
    def reads(self) -> bool:
        """Whether the step is of its prompt."""
        return self.step is not None and not self.step.decoding

    def go_on(self, result: np.ndarray | None = None, error: BaseException | None = None) -> None:
        """To the next step, showing what comes before it; None when it has ended. Raises what ends it."""
        self.step = None
        try:
            item = self._work.send(result) if error is None else self._work.throw(error)
            while isinstance(item, str):
                self.request.show(item)
                item = self._work.send(None)
            self.step = item
        except StopIteration:
            pass

    def stop(self) -> None:
        self._work.close()


class Scheduler:
    """Answers up to `parallel` prompts at once. Every answer is the same, to the bit, as in a session alone.

    Each running request has a cache of its own, with the options that are given for all; their memory is taken as they
    are used. `max_waiting`: requests that may wait for one to end (None: any number).
    A context manager: leaving it waits for all requests, or cancels them if there was an exception. OptionError for
    options that make no cache.
    """

    def __init__(
        self, model: Model, parallel: int = 8, max_waiting: int | None = None, **cache: Unpack[CacheKeywords]
    ) -> None:
        self.model = model
        self.parallel = integer("parallel", parallel, low=1, high=MAX_PARALLEL)
        self.max_waiting = None if max_waiting is None else integer("max_waiting", max_waiting, low=0)
        self._idle = [Session(model, **cache) for _ in range(self.parallel)]
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._piece = _Piece()
        self._changed = threading.Condition()
        self._closing = self._cancelling = False
        self._thread = threading.Thread(target=self._run, name="kvrun scheduler", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: str | Sequence[Any], time_limit: float | None = None, **options: Unpack[StreamKeywords]
    ) -> Request:
        """Have a prompt answered; it and its options are those of `Session.stream`. time_limit: seconds until it is
        ended with an error, waiting included. SchedulerFullError when too many wait; what is wrong with the prompt or
        the options is raised by the request."""
        deadline = None if time_limit is None else time.monotonic() + time_limit
        request = Request(prompt, options, deadline)
        with self._changed:
            if self._closing:
                raise OptionError("this scheduler is closed")
            full = len(self._running) + len(self._waiting) >= self.parallel
            if self.max_waiting is not None and full and len(self._waiting) >= self.max_waiting:
                raise SchedulerFullError(f"{len(self._waiting)} requests wait already: try again later")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def close(self, cancel: bool = False) -> None:
        """Wait for all requests, or cancel them, and end the thread."""
        with self._changed:
            self._closing, self._cancelling = True, self._cancelling or cancel
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._admit():
                self._drop_given_up()
                steps = self._next_steps()
                if steps:
                    self._do(steps)
        except BaseException as error:  # a fault of ours: nobody is to wait for ever
            with self._changed:
                self._closing = True
                left = [*self._waiting, *(one.request for one in self._running)]
                self._waiting.clear()
            for request in left:
                request.end(error)
            raise

    def _admit(self) -> bool:
        """Lets in who waits as far as there is room; waits while there is nothing to do. False: all is done."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closing:
                    return False
                self._changed.wait()
            news: list[Request] = []
            while self._waiting and len(self._running) + len(news) < self.parallel:
                news.append(self._waiting.popleft())
            for request in [waiting for waiting in self._waiting if self._given_up(waiting)]:
                self._waiting.remove(request)
                request.end()
        for request in news:
            self._start(request)
        return True

    def _given_up(self, request: Request) -> bool:
        if self._cancelling:
            request.cancel()
        return request.given_up

    def _start(self, request: Request) -> None:
        if self._given_up(request):
            request.end()
            return
        session = self._idle.pop()
        try:
            session.reset()
            session.chunk = self._chunk()
            one = _Running(request, session)
        except Exception as error:
            self._idle.append(session)
            request.end(error)
            return
        self._advance(one)
        if one.step is not None:
            self._running.append(one)

    def _advance(self, one: _Running, result: np.ndarray | None = None, error: BaseException | None = None) -> None:
        """One request's way to its next step, or its end."""
        one.session.chunk = self._chunk()
        try:
            one.go_on(result, error)
        except Exception as failure:
            self._leave(one, failure)
            return
        if one.step is None:
            self._leave(one)

    def _chunk(self) -> int | None:
        """Most tokens of a prompt in the next step; None: as many as the engine takes."""
        return self._piece.tokens if any(not one.reads for one in self._running) else None

    def _leave(self, one: _Running, error: BaseException | None = None) -> None:
        if one in self._running:
            self._running.remove(one)
        self._idle.append(one.session)
        one.request.end(error)

    def _drop_given_up(self) -> None:
        for one in [one for one in self._running if self._given_up(one.request)]:
            one.stop()
            self._leave(one)

    def _next_steps(self) -> list[_Running]:
        """All that write, and the first of those that read."""
        writing = [one for one in self._running if not one.reads]
        reading = next((one for one in self._running if one.reads), None)
        return writing if reading is None else [*writing, reading]

    def _do(self, steps: list[_Running]) -> None:
        items = [one.step for one in steps if one.step is not None]
        read = sum(len(item.tokens) for item in items if not item.decoding)
        began = time.perf_counter()
        try:
            results = self.model.engine.step(items)
        except Exception as error:  # nothing has changed: whose fault it is shows when each is alone
            if len(steps) == 1:
                self._advance(steps[0], error=error)
            else:
                for one in steps:
                    self._do([one])
            return
        if any(item.decoding for item in items):
            self._piece.took(time.perf_counter() - began, read)
        for one, result in zip(steps, results, strict=True):
            self._advance(one, result)
