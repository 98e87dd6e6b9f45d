"""JSON values of every kind, and the places of a document to put them in."""

import copy
import json

from support import cases

WRONG = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "one": "1",
    "negative": "-1",
    "odd": "7",
    "large": "4097",
    "int32": str(2**31),
    "int64": str(2**64),
    "enormous": "9" * 400,
    "endless": "9" * 5000,
    "fraction": "0.5",
    "negative fraction": "-2.5",
    "smallest": "5e-324",
    "largest": "1.7e308",
    "too large": "1e999",
    "not a number": "NaN",
    "infinite": "-Infinity",
    "text": '"x"',
    "no text": '""',
    "digits": '"3"',
    "half a character": r'"\ud800"',
    "control": r'"\u0000\u001b[2J\n"',
    "long text": json.dumps("x" * 10_000),
    "no list": "[]",
    "list": "[1]",
    "list of lists": "[[[]]]",
    "no object": "{}",
    "object": '{"type": 1}',
    "deep": "[" * 500 + "]" * 500,
    "endlessly deep": "[" * 100_000 + "]" * 100_000,
}
"""Values as they stand in JSON."""


def places(value, at=()):
    """The ways to every value within a JSON value, lists by their first entry."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*at, key))


def places_for(wrong, value):
    """The places that a wrong value, by its name, is tried in: all; in the quick run every third, for the next name
    others."""
    return cases.in_turn(places(value), list(WRONG).index(wrong))


def with_value(value, place, text):
    """The JSON of `value` with `text` at a place."""
    marked = copy.deepcopy(value)
    *way, last = place
    inner = marked
    for key in way:
        inner = inner[key]
    inner[last] = "@@@"
    return json.dumps(marked).replace('"@@@"', text, 1)
