"""Several prompts at once: one thread runs the steps of all running requests together.

A step takes the next token of every request that writes, and a bounded piece of one prompt that is read, so that nobody
waits for someone else's long prompt. Requests come from any thread; first come, first served.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun._core import TILE, Engine, memory
from kvrun.errors import OptionError, SchedulerFullError
from kvrun.history import snapshot_bytes
from kvrun.options import MAX_PARALLEL, integer
from kvrun.prefix_store import WORTH, Prefix, PrefixStore, common
from kvrun.request import Request
from kvrun.session import Session

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from kvrun.backend import StepItem
    from kvrun.model import Model
    from kvrun.options import CacheKeywords, StreamKeywords
    from kvrun.session import Stats, Work

PREFIX_BYTES = 1 << 30
"""Most bytes of caches that are kept after their requests, where no number is given."""
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
class SchedulerStats:
    """What a scheduler does, and has done since it was made.

    `running`, `waiting`: requests now; `ended`: requests, however they ended. `prompt_tokens`, `cached_tokens`,
    `answer_tokens`: sums of those of `kvrun.session.Stats`, running requests included. `prefixes`: texts in the store;
    `prefix_bytes`: what they take. `prefix_hits`: requests whose prompt was not fed from its beginning.
    `requests`: the `Stats` of each that runs, in the order in which they came.
    """

    running: int
    waiting: int
    ended: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    prefixes: int
    prefix_bytes: int
    prefix_hits: int
    requests: tuple[Stats, ...]


@dataclass(frozen=True)
class _Ended:
    """How many requests, and the sums of what they counted."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    hits: int = 0

    def __add__(self, stats: Stats) -> _Ended:
        return _Ended(
            self.requests + 1,
            self.prompt_tokens + stats.prompt_tokens,
            self.cached_tokens + stats.cached_tokens,
            self.answer_tokens + stats.answer_tokens,
            self.hits + (stats.cached_tokens > 0),
        )


class _Running:
    """A request in a session of its own, and the step that it waits for. Before it has `begun` there is none, and the
    session is empty. `ids`: the tokens of its prompt."""

    def __init__(self, request: Request, session: Session) -> None:
        self.request, self.session = request, session
        self.step: StepItem | None = None
        self.begun = False
        self._work: Work = session.steps(request.prompt, **request.options)
        self.ids = np.array(session.prompt_ids, np.int32)
        request.stats = session.stats

    @property
    def writes(self) -> bool:
        """Whether the step is of its answer."""
        return self.step is not None and bool(self.step.decoding)

    def go_on(self, result: np.ndarray | None = None, error: BaseException | None = None) -> None:
        """To the next step, showing what comes before it; None when it has ended. Raises what ends it."""
        self.step, self.begun = None, True
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


def _prefix_bytes(parallel: int, session: Session, most: int | None) -> int:
    """Bytes for what is kept, as many as were asked for if any were. OptionError if the machine has no memory for that
    and so many sessions."""
    on_device = not isinstance(session.model.engine, Engine)  # which has given them their memory already
    each, there = session.kv_bytes, None if on_device else memory.most()
    left = None if there is None else there - parallel * each
    if left is not None and left < (most or 0):
        kept = f", and {most / 1e9:.1f} GB are to be kept" if most else ""
        raise OptionError(
            f"parallel: {parallel} caches of {session.cache.ctx} tokens take {parallel * each / 1e9:.1f} GB{kept}: "
            f"there are {(left + parallel * each) / 1e9:.1f} GB in all"
        )
    usual = min(PREFIX_BYTES, parallel * (each + snapshot_bytes(each)), PREFIX_BYTES if left is None else left)
    return usual if most is None else most


class Scheduler:
    """Answers up to `parallel` prompts at once. Every answer is the same, to the bit, as in a session alone.

    Each running request has a cache of its own, with the options that are given for all; their memory is taken as they
    are used. `max_waiting`: requests that may wait for one to end (None: any number). `prefix_bytes`: bytes of caches
    that are kept after their requests, for prompts that begin alike; 0: nothing is, and none begins with what another
    has read (None: as much as `parallel` sessions take at most, and no more than `PREFIX_BYTES`). When memory is short
    they are given up.
    A context manager: leaving it waits for all requests, or cancels them if there was an exception. OptionError for
    options that make no cache, and for caches that could outgrow the memory of the machine.
    """

    def __init__(
        self,
        model: Model,
        parallel: int = 8,
        max_waiting: int | None = None,
        prefix_bytes: int | None = None,
        **cache: Unpack[CacheKeywords],
    ) -> None:
        self.model = model
        self.parallel = integer("parallel", parallel, low=1, high=MAX_PARALLEL)
        self.max_waiting = None if max_waiting is None else integer("max_waiting", max_waiting, low=0)
        most = None if prefix_bytes is None else integer("prefix_bytes", prefix_bytes, low=0)
        self._idle = [Session(model, **cache) for _ in range(self.parallel)]
        self._store = PrefixStore(model.engine, _prefix_bytes(self.parallel, self._idle[0], most))
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._ended = _Ended()
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

    def stats(self) -> SchedulerStats:
        """What it is doing, and has done; for any thread."""
        with self._changed:
            requests = tuple(one.request.stats for one in self._running)
            waiting, ended = len(self._waiting), self._ended
        total = ended
        for stats in requests:
            total += stats
        return SchedulerStats(
            running=len(requests),
            waiting=waiting,
            ended=ended.requests,
            prompt_tokens=total.prompt_tokens,
            cached_tokens=total.cached_tokens,
            answer_tokens=total.answer_tokens,
            prefixes=len(self._store),
            prefix_bytes=self._store.nbytes,
            prefix_hits=total.hits,
            requests=requests,
        )

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
            self._store.clear()
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
            waiting = [*self._waiting]
        for request in waiting:
            if self._given_up(request):
                self._end(request)
            elif self._idle:
                self._start(request)
        return True

    def _given_up(self, request: Request) -> bool:
        if self._cancelling:
            request.cancel()
        return request.given_up

    def _start(self, request: Request) -> None:
        session = self._idle[-1]
        try:
            session.reset()
            one = _Running(request, session)
        except Exception as error:
            self._end(request, error)
            return
        with self._changed:
            self._waiting.remove(request)
            self._running.append(one)
            self._idle.pop()

    def _advance(self, one: _Running, result: np.ndarray | None = None, error: BaseException | None = None) -> None:
        """One request's way to its next step, or its end."""
        one.session.chunk = self._chunk()
        one.session.drafting = all(other is one for other in self._running)  # several fill their steps themselves
        try:
            one.go_on(result, error)
        except Exception as failure:
            self._leave(one, failure)
            return
        if one.step is None:
            self._leave(one)

    def _chunk(self) -> int | None:
        """Most tokens of a prompt in the next step; None: as many as the engine takes."""
        return self._piece.tokens if any(one.writes for one in self._running) else None

    def _leave(self, one: _Running, error: BaseException | None = None) -> None:
        if error is None:
            self._keep(one.session)
        self._end(one.request, error, one)

    def _end(self, request: Request, error: BaseException | None = None, one: _Running | None = None) -> None:
        """It has ended, running as `one` or waiting."""
        with self._changed:
            if one is None:
                self._waiting.remove(request)
            else:
                self._running.remove(one)
                self._idle.append(one.session)
            self._ended += request.stats
        request.end(error)

    def _drop_given_up(self) -> None:
        for one in [one for one in self._running if self._given_up(one.request)]:
            one.stop()
            self._leave(one)

    def _next_steps(self) -> list[_Running]:
        """All that write, and the first of those that read. The others wait for it, and begin, when it is their turn,
        with what they have in common with what has been read by then."""
        while True:
            reading = next((one for one in self._running if not one.writes), None)
            if reading is None or reading.begun:
                break
            self._begin(reading)
        writing = [one for one in self._running if one.writes]
        return writing if reading is None else [*writing, reading]

    def _do(self, steps: list[_Running]) -> None:
        items = [one.step for one in steps if one.step is not None]
        read = sum(len(item.tokens) for item in items if not item.decoding)
        began = time.perf_counter()
        try:
            results = self.model.engine.step(items)
        except Exception as error:  # nothing has changed: whose fault it is shows when each is alone
            if isinstance(error, MemoryError) and self._store.clear():
                self._do(steps)
            elif len(steps) == 1:
                self._advance(steps[0], error=error)
            else:
                for one in steps:
                    self._do([one])
            return
        written = [len(item.tokens) for item in items if item.decoding]
        if written and max(written) == 1:  # how long a step with a draft takes says nothing about others
            self._piece.took(time.perf_counter() - began, read)
        for one, result in zip(steps, results, strict=True):
            self._advance(one, result)

    # --- what texts have in common ----------------------------------------------------------------

    def _begin(self, one: _Running) -> None:
        """It is one's turn to read."""
        one.session.places = ()
        if self._store.most:
            longest = self._share(one)
            one.session.places = self._places(one, longest)
        self._advance(one)

    def _share(self, one: _Running) -> int:
        """Have it begin with the most that it can have of another text; how many tokens it has in common with any."""
        ids = one.ids[:-1]  # the last is fed in any case, for its logits
        best: Prefix | None = None
        place = longest = 0
        for prefix in (*(other.session.prefix() for other in self._running if other.begun), *self._store):
            n = common(ids, prefix.tokens)
            longest = max(longest, n)
            if n > place and prefix.place(n) > place:
                best, place = prefix, prefix.place(n)
        if best is not None and place >= WORTH:
            try:
                one.session.begin_with(best.fork(place))
                self._store.used(best)
            except (MemoryError, OptionError):
                self._store.clear()
        return longest

    def _places(self, one: _Running, longest: int) -> list[int]:
        """Where to cut its prompt, since others will begin there: where texts before it and those that wait differ from
        it, and where its last message begins. Of those that one snapshot leads back to, the last."""
        there, end, cache = one.session.n_tokens, len(one.ids), one.session.cache
        waiting = [other for other in self._running if not other.begun and other is not one]
        places = {longest, *(common(one.ids[:-1], other.ids[:-1]) for other in waiting)}
        if end - there > TILE:
            places.add(one.session.last_message())
        useful = sorted(place for place in places if max(there, WORTH) <= place < end)
        return list({max(0, place - cache.sinks - cache.window) // TILE: place for place in useful}.values())

    def _keep(self, session: Session) -> None:
        """What a session has read, in the store, which then has its cache."""
        prefix = session.prefix()
        if self._store.wants(prefix):
            try:
                session.renew()
                self._store.add(prefix)
            except (MemoryError, OptionError):
                self._store.clear()
