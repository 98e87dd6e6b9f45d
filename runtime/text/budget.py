"""What a chat template may use up: steps and bytes, counted before they are spent.

A template comes from a checkpoint and runs in the user's process, where nothing can end it from outside. So loops count
their turns before they begin, and whatever makes text or lists says first how large that will be. Sizes are bounds:
they count what is shared as often as it would be written.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from sys import getsizeof
from typing import Any
from weakref import WeakKeyDictionary

STEPS, STEPS_PER_MESSAGE = 3_000_000, 100_000
"""Nodes of the syntax tree that are gone through, those that take longer counted several times; about 0.1 us each."""
ROOM, COPIES = 48 << 20, 80
"""Bytes that all values of one rendering may take together: at least, and so many copies of the conversation."""
COPIES_PER_MESSAGE, MOST_PER_MESSAGE = 40, 2 << 30
"""Some templates add each message to the text of those before it, several times: copies for each message, and the bytes
that these may take together. Nearly all of them are dropped at once."""
LARGEST_NUMBER = 8192
"""Bits of an integer."""
DEEPEST = 100
"""Containers in each other, and generators that go through each other."""
LONGEST_NUMERAL = 400
"""Characters of a number as text, at most, unless a width makes it longer."""
WRITTEN = 10
"""Bytes of a character in quotes, which may be written as an escape."""


_EMPTY: dict[Any, Any] = {}
_CONTAINERS: tuple[type, ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    *map(type, (_EMPTY.items(), _EMPTY.keys(), _EMPTY.values())),
)


class LimitError(Exception):
    """A template needs more work or memory than any conversation should."""


def text_bytes(text: str) -> int:
    """Bytes of a text in memory, at most."""
    return len(text) if text.isascii() else 4 * len(text)


class Budget:
    """What is left for one rendering of `messages`."""

    def __init__(self, messages: Any) -> None:
        # Container (kept, so that its id stays its own), size and depth.
        self._known: dict[int, tuple[Any, int, int]] = {}
        self._lazy: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how many generators one is made of
        self.steps = self.room = 1 << 62
        size = self.size(messages)
        self.steps = STEPS + STEPS_PER_MESSAGE * len(messages) + size
        copy = size // WRITTEN
        self.room = ROOM + COPIES * copy + min(COPIES_PER_MESSAGE * len(messages) * copy, MOST_PER_MESSAGE)

    def step(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise LimitError("it takes too many steps")

    def need(self, size: int) -> None:
        """That many bytes will be made; LimitError if there is no room for them."""
        if size > self.room:
            raise LimitError("it makes too much text")

    def spend(self, size: int) -> None:
        self.need(size)
        self.room -= size

    def size(self, value: Any) -> int:
        """Bytes of a value as text, shared parts counted each time. LimitError if there is no room for that, or it is
        nested so deeply that hashing it could exhaust the stack."""
        return self._size_and_depth(value)[0]

    def _size_and_depth(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str):
            return (len(value) if value.isascii() else 4 * len(value)), 0
        if isinstance(value, _CONTAINERS):
            known = self._known.get(id(value))
            if known is None:
                self._known[id(value)] = known = (value, *self._of_parts(value))
            return known[1:]
        return (LONGEST_NUMERAL if isinstance(value, (int, float)) and not isinstance(value, bool) else 64), 0

    def _of_parts(self, value: Any) -> tuple[int, int]:
        size, depth = 64, 0
        for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            if isinstance(part, str):
                size += 16 + WRITTEN * len(part)
            else:
                inner, below = self._size_and_depth(part)
                size, depth = size + 16 + inner, max(depth, below)
        self.need(size)
        if depth >= DEEPEST:
            raise LimitError("it nests values too deeply")
        return size, depth + 1

    def look(self, value: Any) -> Any:
        """A value that is about to be compared, hashed or searched; the work of that is counted."""
        self.step(len(value) if isinstance(value, range) else 1 + self.size(value) // 256)
        return value

    def shown(self, value: Any) -> Any:
        """A value that is about to be written."""
        self.spend(16 + self.size(value))
        return value

    def made(self, value: Any) -> Any:
        """A value that was made; its own bytes are counted."""
        if isinstance(value, str):
            self.spend(getsizeof(value))
        elif isinstance(value, (list, tuple)):
            self.spend(64 + 16 * len(value))
        elif isinstance(value, (dict, set)):
            self.spend(64 + 100 * len(value))
        elif isinstance(value, int) and value.bit_length() > LARGEST_NUMBER:
            raise LimitError("it makes too large a number")
        return value

    def turns(self, values: Any, steps: int, size: int = 0) -> Any:
        """What a loop goes through, each turn of which takes so many steps and bytes."""
        if isinstance(values, Iterator):
            return self._counted(values, steps, size)
        try:
            n = len(values)
        except TypeError:
            return values
        self.step(n * steps)
        self.spend(n * size)
        return values

    def _counted(self, values: Iterator[Any], steps: int, size: int) -> Generator[Any, None, None]:
        for value in values:
            self.step(steps)
            self.spend(size)
            yield value

    def lazy(self, values: Any, source: Any = None) -> Any:
        """A result; if it is made while it is gone through, it is counted then. `source`: what it goes through."""
        if not isinstance(values, Iterator):
            return self.made(values)
        depth = self._lazy.get(source, 0) + 1 if isinstance(source, Generator) else 1
        if depth > DEEPEST:
            raise LimitError("it nests values too deeply")
        counted = self._made_each(values)
        self._lazy[counted] = depth
        return counted

    def _made_each(self, values: Iterator[Any]) -> Generator[Any, None, None]:
        for value in values:
            self.step(8)
            self.spend(16)
            yield self.made(value)


_running = threading.local()


@contextmanager
def limited(budget: Budget) -> Iterator[None]:
    """What this thread renders uses up `budget`."""
    before = getattr(_running, "budget", None)
    _running.budget = budget
    try:
        yield
    finally:
        _running.budget = before


def current() -> Budget:
    """The budget of the rendering that this thread is in. LimitError while a template is compiled, where nothing is to
    be computed."""
    budget: Budget | None = getattr(_running, "budget", None)
    if budget is None:
        raise LimitError("nothing is being rendered")
    return budget
