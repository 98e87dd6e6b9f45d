"""What a chat template may use up: steps and bytes, counted before they are spent.

A template comes from a checkpoint and runs in the user's process, where nothing can end it from outside. So loops count
their turns before they begin, and whatever makes text or lists says first how large that will be. Sizes are bounds:
they count what is shared as often as it would be written.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STEPS, STEPS_PER_MESSAGE = 3_000_000, 100_000
"""Nodes of the syntax tree that are gone through, some counted four times; about 0.1 microseconds each."""
ROOM, COPIES = 48 << 20, 80
"""Bytes that all values of one rendering may take together: at least, and so many copies of the conversation. For each
message two more, since templates add one to the text of those before it."""
LARGEST_NUMBER = 8192
"""Bits of an integer."""
LONGEST_NUMERAL = 400
"""Characters of a number as text, at most, unless a width makes it longer."""
WRITTEN = 10
"""Bytes of a character in quotes, which may be written as an escape."""
_SPEC = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?[hlL]?.", re.DOTALL)


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
        self._known: dict[int, tuple[Any, int]] = {}  # container (kept, so that its id stays its own) and its size
        self.steps = self.room = 1 << 62
        size = self.size(messages)
        self.steps = STEPS + STEPS_PER_MESSAGE * len(messages) + size
        self.room = ROOM + (COPIES + 2 * len(messages)) * (size // WRITTEN)

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
        """Bytes of a value as text, shared parts counted each time. LimitError if there is no room for that."""
        if isinstance(value, str):
            return len(value) if value.isascii() else 4 * len(value)
        if isinstance(value, _CONTAINERS):
            known = self._known.get(id(value))
            if known is None:
                size = self._size_of_parts(value)
                self.need(size)
                self._known[id(value)] = known = (value, size)
            return known[1]
        return LONGEST_NUMERAL if isinstance(value, (int, float)) and not isinstance(value, bool) else 64

    def _size_of_parts(self, value: Any) -> int:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return 64 + sum(16 + (WRITTEN * len(part) if isinstance(part, str) else self.size(part)) for part in parts)

    def look(self, value: Any) -> Any:
        """A value that is about to be compared, hashed or searched; the work of that is counted."""
        self.step(1 + self.size(value) // 256)
        return value

    def shown(self, value: Any) -> Any:
        """A value that is about to be written."""
        self.spend(16 + self.size(value))
        return value

    def made(self, value: Any) -> Any:
        """A value that was made; its own bytes are counted."""
        if isinstance(value, str):
            self.spend(64 + text_bytes(value))
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

    def lazy(self, values: Any) -> Any:
        """A result; if it is made while it is gone through, it is counted then."""
        if isinstance(values, Iterator):
            return (self.made(value) for value in self._counted(values, 8, 16))
        return self.made(values)


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


# --- how large a result will be -------------------------------------------------------------------


def _text(value: Any) -> str:
    """A value as filters make it text. What has no room as text is refused."""
    if isinstance(value, str):
        return value
    budget = current()
    budget.need(budget.size(value))
    return str(value)


def _replaced(value: Any, old: Any = "", new: Any = "", count: Any = None, *_: Any) -> int:
    text, old, new = _text(value), _text(old), _text(new)
    times = text.count(old)
    times = min(times, count) if isinstance(count, int) and count >= 0 else times
    return 4 * (len(text) + times * len(new)) if not (text + new).isascii() else len(text) + times * len(new)


def _wide(value: Any, width: Any = 80, fill: Any = " ", *_: Any) -> int:
    return text_bytes(_text(value)) + 4 * (width if isinstance(width, int) else 0)


def _tabs(value: Any, size: Any = 8, *_: Any) -> int:
    text = _text(value)
    return text_bytes(text) + 4 * text.count("\t") * (abs(size) if isinstance(size, int) else 0)


def _cut(value: Any, separator: Any = None, *_: Any) -> int:
    text = _text(value)
    most = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    return text_bytes(text) + 64 * (most + 1)


def _lines(value: Any, *_: Any) -> int:
    return text_bytes(_text(value)) + 64 * (len(_text(value)) + 1)


def _same(value: Any, *_: Any) -> int:
    return 4 * len(_text(value))


def _indented(value: Any, width: Any = 4, *_: Any) -> int:
    text = _text(value)
    wide = width if isinstance(width, int) else len(_text(width))
    return 4 * (len(text) + (text.count("\n") + 1) * max(0, wide))


def _wrapped(value: Any, width: Any = 79, long: Any = True, mark: Any = "\n", *_: Any) -> int:
    text = _text(value)
    current().step(4 * len(text))
    return 4 * len(text) * (1 + len(mark or "\n"))


def _escaped(value: Any, *_: Any) -> int:
    text = _text(value)
    current().step(len(text) // 8)
    return 12 * len(text)


def _searched(value: Any, *_: Any) -> int:
    """Regular expressions go through it, some of them more than once from the same place."""
    text = _text(value)
    current().step(len(text) * (1 + len(text) // 256))
    return 64 * len(text)


def _listed(value: Any = (), *_: Any) -> int:
    return (80 if isinstance(value, str) else 16) * (len(value) if hasattr(value, "__len__") else 0)


def _shared_out(value: Any, parts: Any = 1, *_: Any) -> int:
    return 64 * (abs(parts) if isinstance(parts, int) else 0)


def _json(value: Any, *options: Any) -> int:
    widths = [option if isinstance(option, int) else len(str(option)) for option in options if option is not None]
    if max(widths, default=0) > 64:
        raise LimitError("tojson: it indents or separates by more than 64 characters")
    size = current().size(value)
    current().step(size // 32)
    return 16 * size


def _rounded(value: Any, precision: Any = 0, *_: Any) -> int:
    if isinstance(precision, int) and abs(precision) > LONGEST_NUMERAL:
        raise LimitError("it rounds to too many digits")
    return 64


def _number(value: Any, *_: Any) -> int:
    if isinstance(value, str) and len(value) > LARGEST_NUMBER:
        raise LimitError("it makes too large a number")
    return 64


def _ended(value: Any, length: Any = 255, whole: Any = False, end: Any = "...", *_: Any) -> int:
    return 4 * (len(_text(value)) + len(_text(end)))


def _printed(value: Any, *_: Any) -> int:
    size = current().size(value)
    current().step(size)
    return 16 * size


def percent(form: Any, values: Any) -> int:
    """Bytes of `form % values`."""
    largest = LONGEST_NUMERAL + WRITTEN * current().size(values)
    stars = max((abs(v) for v in values if isinstance(v, int)), default=0) if isinstance(values, tuple) else 0
    size = 4 * len(form)
    for width, precision in _SPEC.findall(form):
        size += largest + sum(4 * (stars if n == "*" else int(n[:12] or 0)) for n in (width, precision))
    return size


def braces(form: str, values: Any) -> int:
    """Bytes of `form.format(*values)`: each field as wide as any number in the form, or in a value, says."""
    budget = current()
    size = budget.size(values)
    widths = [int(n[:12]) for n in re.findall(r"\d+", form)]
    if re.search(r"\{[^{}]*\{", form):  # a width may be a value
        widths += [int(n[:12]) for n in re.findall(r"\d+", repr(values))]
    return 4 * len(form) + form.count("{") * (LONGEST_NUMERAL + WRITTEN * size + 4 * max(widths, default=0))


def added(left: Any, right: Any) -> int:
    if isinstance(left, str) and isinstance(right, str):
        return (1 if left.isascii() and right.isascii() else 4) * (len(left) + len(right))
    both = isinstance(left, (list, tuple)) and isinstance(right, (list, tuple))
    return 16 * (len(left) + len(right)) if both else 0


def multiplied(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return _digits(left.bit_length() + right.bit_length())
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, (str, list, tuple)):
            return (text_bytes(value) if isinstance(value, str) else 16 * len(value)) * max(0, times)
    return 0


def raised(left: Any, right: Any) -> int:
    both = isinstance(left, int) and isinstance(right, int)
    return _digits(left.bit_length() * max(1, right)) if both else 0


def _digits(bits: int) -> int:
    if bits > LARGEST_NUMBER:
        raise LimitError("it makes too large a number")
    return 64


def remainder(left: Any, right: Any) -> int:
    return percent(left, right) if isinstance(left, str) else 0


Sizer = Callable[..., int]

METHODS: Mapping[type, Mapping[str, Sizer | None]] = {
    str: {
        **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _same),
        **dict.fromkeys(("strip", "lstrip", "rstrip", "removeprefix", "removesuffix"), _same),
        **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _wide),
        **dict.fromkeys(("split", "rsplit"), _cut),
        **dict.fromkeys(("count", "find", "rfind", "index", "rindex", "startswith", "endswith"), None),
        **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"), None),
        **dict.fromkeys(("isnumeric", "isprintable", "isspace", "istitle", "isupper"), None),
        **dict.fromkeys(("partition", "rpartition"), _same),
        "expandtabs": _tabs,
        "join": None,  # see `joined`
        "replace": _replaced,
        "splitlines": _lines,
    },
    list: {"copy": _listed, "count": None, "index": None},
    tuple: {"count": None, "index": None},
    dict: {"copy": None, "get": None, "items": None, "keys": None, "values": None},
    int: {"bit_length": None},
    float: {"is_integer": None},
}
"""The methods of built-in types that a template may call, and how large their result will be."""

FILTERS: Mapping[str, Sizer] = {
    **dict.fromkeys(("capitalize", "lower", "title", "trim", "upper", "string", "safe", "reverse"), _same),
    **dict.fromkeys(("e", "escape", "forceescape", "urlencode", "xmlattr"), _escaped),
    **dict.fromkeys(("striptags", "urlize", "wordcount"), _searched),
    **dict.fromkeys(("batch", "slice"), _shared_out),
    **dict.fromkeys(("sort", "unique", "groupby", "dictsort", "min", "max", "list"), _listed),
    **dict.fromkeys(("int", "float"), _number),
    "center": _wide,
    "format": lambda form, *values: percent(_text(form), values),
    "indent": _indented,
    "pprint": _printed,
    "replace": _replaced,
    "round": _rounded,
    "tojson": _json,
    "truncate": _ended,
    "wordwrap": _wrapped,
}
"""How large the result of a filter will be, for those that make more than they are given."""


def date(form: str) -> int:
    """Bytes of a date in that form, at most: strftime gives up at that size."""
    return 1024 * len(_text(form))


def joined(values: Iterable[Any], separator: str) -> list[Any]:
    """What is to be joined, as a list; LimitError if the result would have no room."""
    budget = current()
    listed = list(budget.turns(values, 1, 16))
    size = sum(budget.size(value) for value in listed)
    budget.need(4 * len(separator) * len(listed) + size)
    return listed
