"""Methods of a session that exclude each other, in one thread or several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kvrun import _core
from kvrun.errors import SessionBusyError

if TYPE_CHECKING:
    from typing import Concatenate

    from typing_extensions import ParamSpec

    Given = ParamSpec("Given")

Result = TypeVar("Result")


class Used(Protocol):
    """Something with a lock that `one_at_a_time` has made."""

    _use: _core.Exclusive


Self = TypeVar("Self", bound=Used)


def one_at_a_time() -> _core.Exclusive:
    """A lock for a session. A second user gets SessionBusyError."""
    return _core.Exclusive(SessionBusyError, "this session is in use by another thread; give each thread its own")


def exclusive(method: Callable[Concatenate[Self, Given], Result]) -> Callable[Concatenate[Self, Given], Result]:
    """One such method of an object runs at a time, and no step of its `Pieces` beside it; SessionBusyError."""

    @functools.wraps(method)
    def call(self: Self, /, *args: Given.args, **options: Given.kwargs) -> Result:
        return self._use.run(method, self, *args, **options)

    return call


class Pieces(Generator[str, None, None]):
    """The pieces of an answer, each made while nothing else uses the session."""

    def __init__(self, use: _core.Exclusive, pieces: Generator[str, None, None]) -> None:
        self._use, self._pieces = use, pieces

    def send(self, value: None) -> str:
        return self._use.run(self._pieces.send, value)

    def throw(self, *error: Any) -> str:
        return self._use.run(self._pieces.throw, *error)

    def close(self) -> None:
        self._use.run(self._pieces.close)
