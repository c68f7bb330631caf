"""What a call keeps."""

from pathlib import Path

import pytest

from fastlm import _native
from tests.numerics import bytes_saved, forward_backward, make_recurrent, run_fastlm, run_torch

KINDS = ("gru", "lstm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(50, 16, 64, 64), (20, 4, 32, 128), (100, 1, 16, 32)])
def test_kept_for_backward_at_most_what_torch_keeps(kind: str, shape: tuple[int, ...]) -> None:
    case = make_recurrent(kind, *shape, requires_grad=True)
    ours, theirs = (bytes_saved(lambda run=run: run(case)) for run in (run_fastlm, run_torch))
    assert 0 < ours <= theirs


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_no_growth_over_many_calls(kind: str) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    case = make_recurrent(kind, 3, 2, 16, 32)
    calls = 10_000 if _native.module else 1_000
    for _ in range(calls // 10):
        forward_backward(run_fastlm, case)
    before = resident()
    for _ in range(calls):
        forward_backward(run_fastlm, case)
    # The smallest thing a call could lose, a state of 256 bytes, would come to 2.5 MB.
    assert resident() - before < 2 * 2**20
