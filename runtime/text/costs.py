"""How large the results of what chat templates call will be: methods, filters and operators.

Each function takes the arguments of what it is named for and gives a bound of the result's bytes. Work that grows
faster than the result is counted in the budget as steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kvrun.text.budget import DEEPEST, LARGEST_NUMBER, LONGEST_NUMERAL, LimitError, current, text_bytes

_NUMERAL = re.compile(r"\d+")


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


def _json(value: Any, ascii_only: Any = False, indent: Any = None, separators: Any = None, *_: Any) -> int:
    widths = [option if isinstance(option, int) else len(_text(option)) for option in (indent, separators) if option]
    if max(widths, default=0) > 64:
        raise LimitError("it indents or separates JSON by more than 64 characters")
    size = current().size([value])
    current().step(size // 32)
    return 2 * size + sum(widths) * (size // 16) * (DEEPEST if indent else 1)


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


def percent(form: str, values: Any) -> int:
    """Bytes of `form % values`: each field as wide as any number in the form says, and with `*` any value."""
    stars = [abs(v) for v in values if isinstance(v, int)] if "*" in form and isinstance(values, tuple) else []
    wide = max([*_numerals(form), *stars], default=0)
    fields: int = form.count("%")
    return 4 * len(form) + fields * (LONGEST_NUMERAL + current().size([values]) + 8 * wide)


def braces(form: str, values: Any) -> int:
    """Bytes of `form.format(*values)`: each field as wide as any number in the form, or in a value, says."""
    size = current().size(values)
    named = _numerals(repr(values)) if re.search(r"\{[^{}]*\{", form) else ()  # a width may be a value
    wide = max([*_numerals(form), *named], default=0)
    return 4 * len(form) + form.count("{") * (LONGEST_NUMERAL + size + 4 * wide)


def _numerals(text: str) -> Iterator[int]:
    current().step(len(text) // 8)
    return (int(numeral[:12]) for numeral in _NUMERAL.findall(text))


def added(left: Any, right: Any) -> int:
    if isinstance(left, str) and isinstance(right, str):
        return (1 if left.isascii() and right.isascii() else 4) * (len(left) + len(right))
    both = isinstance(left, (list, tuple)) and isinstance(right, (list, tuple))
    return 16 * (len(left) + len(right)) if both else 0


def subtracted(left: Any, right: Any) -> int:
    """Keys of a dict less others are a set."""
    keys: int = len(left) if hasattr(left, "__len__") else 0
    return 100 * keys


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
    **dict.fromkeys(("e", "escape", "forceescape", "urlencode", "wordcount", "xmlattr"), _escaped),
    **dict.fromkeys(("striptags", "urlize"), _searched),
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
    budget.need(4 * len(separator) * len(listed) + concatenated(listed))
    return listed


def concatenated(parts: Iterable[Any]) -> int:
    """Bytes of the texts of values together: a character outside ASCII makes all of them larger."""
    sizes = [(current().size(part), isinstance(part, str) and part.isascii()) for part in parts]
    return sum(size for size, _ in sizes) * (1 if all(plain for _, plain in sizes) else 4)
