"""Rules for the tests themselves."""

import ast

import pytest

from support import ROOT, cases

TESTS = ROOT / "tests"
FILES = sorted(path for path in TESTS.rglob("*.py") if "fixtures" not in path.parts)


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "."
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_is_shared_but_through_support(path):
    """A test file imports no other, and no file beside it by its bare name."""
    others = {other.stem for other in FILES} - {"__init__"}
    assert not [name for name in imported(path) if name.split(".")[0] in others]


def test_the_quick_run_covers_every_value():
    product = [{"level": a, "format": b, "rows": c} for a in "xyz" for b in "12345" for c in "ab"]
    chosen = cases.covering(product)
    assert len(chosen) == 5
    assert {pair for case in product for pair in case.items()} == {p for i in chosen for p in product[i].items()}
    assert cases.covering(product[:1]) == [0] and cases.covering([]) == []


def test_a_cross_in_a_loop_has_every_value():
    values = list(range(10))
    turns = [cases.in_turn(values, turn) for turn in range(3)]
    assert sorted({value for turn in turns for value in turn}) == values and all(turns)
    assert [len(turn) for turn in turns] == cases.either([10, 10, 10], [4, 3, 3])
