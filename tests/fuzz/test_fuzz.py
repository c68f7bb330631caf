"""Random calls of the public operations, valid and invalid; the rest of tests/fuzz says how."""

import pytest

from tests.fuzz import calls

TOTAL, PARTS = 20000, 40


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part: int) -> None:
    count = TOTAL // PARTS
    *_, seen = calls.run(part * count, count)
    assert seen.total() == count
    assert seen["valid"] > count / 2
    assert seen["invalid"] > count / 10
