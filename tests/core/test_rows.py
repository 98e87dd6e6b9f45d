"""What a row of inputs gets from a matrix does not depend on the rows beside it, to the bit: sequences that are decoded
in one step, and tokens of a prompt in whatever chunks, get what each would get alone."""

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import probe

pytestmark = pytest.mark.crossed

LEVELS = _core.isa_available()
COUNTS = [*range(1, 18), 32, 41]
PRODUCTS = [
    (row.name, planes) for row in _core.WEIGHT_TYPES.values() for planes in ((1, 2) if row.takes_int8 else (1,))
]
COLUMNS = [1, 31, 33, 96, 100, 544, 577, 1056]  # odd and even numbers of blocks, more than are prepared together, parts


def awkward(n, cols, rng):
    """float32 [n, cols]: rows of all sizes, zeros, one block that dwarfs the others, blocks of zeros, one sign only."""
    x = (rng.standard_normal((n, cols)) * 10 ** rng.uniform(-3, 3, (n, 1))).astype(np.float32)
    x[1::7] = 0
    x[2::7, : min(32, cols)] *= 1e6
    x[3::7, : cols // 2] = 0
    x[4::7] = np.abs(x[4::7])
    x[5::7] *= 1e-36
    return x


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type, planes", PRODUCTS)
def test_a_row_gets_what_it_gets_alone(type, planes, level, rng):
    multiple = _core.column_multiple(type)
    for cols in COLUMNS if multiple == 1 else range(multiple, 5 * multiple, multiple):
        rows = int(rng.integers(1, 50))
        packed = _core.pack(type, rng.standard_normal((rows, cols)).astype(np.float32))
        x, before = awkward(max(COUNTS), cols, rng), rng.standard_normal((max(COUNTS), rows)).astype(np.float32)
        for out in (None, before):
            alone = np.concatenate(
                [
                    probe.matmul(type, packed, rows, x[i : i + 1], part(out, i, i + 1), planes, level=level)
                    for i in range(len(x))
                ]
            )
            for n in COUNTS:
                first = int(rng.integers(0, len(x) - n + 1))
                some = slice(first, first + n)
                got = probe.matmul(type, packed, rows, x[some], part(out, first, first + n), planes, level=level)
                np.testing.assert_array_equal(got.view(np.uint32), alone[some].view(np.uint32), f"{cols}, {n} rows")


def part(out, start, end):
    return None if out is None else out[start:end]
