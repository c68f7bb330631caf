"""What a call keeps, and the memory of large results, which is used again."""

import copy
import io
import threading
from pathlib import Path

import pytest
import torch

from fastlm import _native
from fastlm.ops.gemm import gemm
from tests.child import check_python
from tests.numerics import bytes_saved, forward_backward, make_recurrent, run_fastlm, run_torch

KINDS = ("gru", "lstm")
kept = pytest.mark.skipif(
    not _native.module or not Path("/proc/self/statm").exists(), reason="the extension, on Linux, keeps memory"
)


def large_result(value: float = 1.0, megabytes: int = 48) -> torch.Tensor:
    """So large a product, value everywhere."""
    return gemm(torch.full((megabytes * 256, 1), value), torch.ones(1, 1024), False, False)


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


@kept
def test_memory_of_a_large_result_is_used_again() -> None:
    first = large_result(1.0)
    second = large_result(2.0)
    assert first.eq(1).all()
    assert second.eq(2).all()
    addresses = {first.data_ptr(), second.data_ptr()}
    assert len(addresses) == 2
    view = first[5:]
    del first
    third = large_result(3.0)  # the first result's memory is in use as long as a view of it is
    assert view.eq(1).all()
    assert third.data_ptr() not in addresses
    del second, view
    assert {large_result(4.0).data_ptr(), large_result(4.0, megabytes=40).data_ptr()} <= addresses
    assert large_result(5.0, megabytes=100).data_ptr() not in addresses


@kept
def test_idle_memory_makes_room_for_other_sizes() -> None:
    printed = check_python(
        "from tests.ops.test_memory import large_result\n"
        "for megabytes in (400, 33, 150, 70, 350, 40, 300): large_result(1.0, megabytes)\n"
        "print(int(open('/proc/self/statm').read().split()[1]) * 4096)\n"
    )
    base = check_python("print(int(open('/proc/self/statm').read().split()[1]) * 4096)")
    assert int(printed) - int(base) < 500 * 2**20  # 1,343 MB if each were kept


@kept
def test_large_results_are_tensors_like_others() -> None:
    result = large_result()
    assert result.is_contiguous()
    assert not result.is_inference()
    with torch.inference_mode():
        assert large_result().is_inference()
    saved = io.BytesIO()
    torch.save(result[:2], saved)
    assert torch.equal(copy.deepcopy(result), result)
    assert result.numpy().sum() == result.numel()
    shared = large_result(7.0).share_memory_()
    assert shared.is_shared()
    assert shared.eq(7).all()
    assert large_result(3.0).resize_(10, 10).eq(3).all()
    result.requires_grad_().mul(2).sum().backward()
    assert result.grad is not None
    assert result.grad.eq(2).all()


def test_a_result_larger_than_memory() -> None:
    """Torch's error, which tells the size; nobody has 576 TB of addresses."""
    column = torch.ones(12_000_000, 1)
    with pytest.raises(RuntimeError, match=r"allocate memory.* 576000000000000 bytes"):
        gemm(column, column, False, True)


@kept
def test_large_results_of_many_threads() -> None:
    wrong: list[float] = []

    def work(value: float) -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            result = large_result(value, megabytes=33)
            wrong.extend([value] * int(result.ne(value).any()))

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
