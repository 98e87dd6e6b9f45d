"""Which cases the quick run has, and which only a run with --all has.

Two markers tell: a `thorough` test or case is left out of the quick run; of a `crossed` test, parametrized more
than once, the quick run has every value of every parameter in some case, not all combinations. A test named by its id
runs in any case (conftest.py). The functions here do the same for the values of one parameter, and for what a test goes
through in a loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

_all = False  # set by conftest.py, before test files are imported


def run_all() -> bool:
    """Whether this is a run with --all: for tests that go through many cases in a loop."""
    return _all


def set_run_all(everything: bool) -> None:
    """For conftest.py."""
    global _all
    _all = everything


def examples(n: int) -> int:
    """How many examples hypothesis tries: n with --all, a fifth of them in the quick run."""
    return n if _all else max(10, n // 5)


def either(everything: Any, quick: Any) -> Any:
    """`everything` with --all, `quick` in the quick run."""
    return everything if _all else quick


def in_turn(values: Iterable[Any], turn: int, every: int = 3) -> list[Any]:
    """All values with --all. In the quick run one of so many, others for each of as many turns: of a cross that is gone
    through in a loop, every value of both once."""
    values = list(values)
    return values if _all else values[turn % every :: every]


def some(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """`values` of one argument for parametrize, those that are not in `quick` marked as thorough."""
    values, quick = list(values), list(quick)
    assert all(value in values for value in quick), "a value that is not one of all"
    return [value if value in quick else pytest.param(value, marks=pytest.mark.thorough) for value in values]


def covering(cases: Sequence[Mapping[str, str]]) -> list[int]:
    """Which cases, each {parameter: value}, together have every value that occurs in any of them.

    Always the case next that has the most values not seen yet: about as many as the longest parameter has values.
    """
    missing = {pair for case in cases for pair in case.items()}
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(missing.intersection(cases[i].items())))
        chosen.append(best)
        missing.difference_update(cases[best].items())
    return sorted(chosen)
