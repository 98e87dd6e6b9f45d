"""Which cases the quick run has, and which only a run with --all has.

Two markers tell: a `thorough` test or case is left out of the quick run; of a `crossed` test, parametrized more
than once, the quick run has every value of every parameter in some case, not all combinations. A test named by its id
runs in any case (conftest.py).
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
