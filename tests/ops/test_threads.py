"""Results do not depend on threads: how many, who calls, what the process allows."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

from tests.child import check_python
from tests.numerics import Outputs, forward_backward, kernels_only, make_recurrent, run_fastlm

KINDS = ("gru", "lstm")
# Batch split and unit split, below and above the threshold where a second thread joins, uneven shares; blocks of units
# in groups (more slots than fit in the cache), and weight gradients in several goes.
SHAPES = [(T, B, 24, H) for T, B, H in product((1, 12), (1, 2, 3, 5, 8, 16, 33, 90), (17, 256))]
SHAPES += [(130, 1, 5, 96), (30, 40, 7, 272), (1, 30, 33, 100)]

pytestmark = kernels_only


def same(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("fp32", "fp64"))
@pytest.mark.parametrize("kind", KINDS)
def test_one_and_two_threads_give_the_same_bits(isa: str, kind: str, dtype: torch.dtype) -> None:
    for shape, reverse in zip(SHAPES, [False, True] * len(SHAPES), strict=False):
        case = make_recurrent(kind, *shape, dtype=dtype, reverse=reverse)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((forward_backward(run_fastlm, case), run_fastlm(case)))
        for with_grad, without in results[1:]:
            assert same(with_grad, results[0][0]), shape
            assert same(without, results[0][1]), shape


@pytest.mark.parametrize("form", list(product((False, True), repeat=2)))
def test_products_give_the_same_bits(isa: str, form: tuple[bool, bool]) -> None:
    for m, n, k in (
        (1, 700, 300),
        (20, 300, 500),
        (33, 65, 17),
        (90, 200, 300),
        (256, 256, 256),
        (64, 48, 4000),
        (900, 16, 64),
    ):
        a, b = torch.randn((k, m) if form[0] else (m, k)), torch.randn((n, k) if form[1] else (k, n))
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.fastlm.gemm(a, b, *form))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("two_threads")
def test_calls_from_four_python_threads(kind: str) -> None:
    cases = [make_recurrent(kind, 20, batch, 16, 128, seed=batch) for batch in (1, 2, 4, 16)] * 5
    expected = [forward_backward(run_fastlm, case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda case: forward_backward(run_fastlm, case), cases))
    assert all(map(same, got, expected))


SUMS = """
import hashlib
for kind in ("gru", "lstm"):
    for B in (1, 2, 5, 16):
        for value in forward_backward(run_fastlm, make_recurrent(kind, 12, B, 24, 256)).values():
            print(kind, B, hashlib.sha256(value.detach().numpy().tobytes()).hexdigest())
"""


def test_fewer_threads_than_asked_for() -> None:
    """With OMP_THREAD_LIMIT=1 a parallel region gets one participant, whatever torch was told; so do nested regions."""
    expected = check_python("torch.set_num_threads(1)" + SUMS)
    assert check_python("torch.set_num_threads(2)" + SUMS, OMP_THREAD_LIMIT="1") == expected
    assert check_python("torch.set_num_threads(4)" + SUMS, OMP_THREAD_LIMIT="3") == expected


def test_fork_with_one_thread() -> None:
    code = """
import os
torch.set_num_threads(1)
case = make_recurrent("gru", 5, 3, 8, 64)
expected = forward_backward(run_fastlm, case)
child = os.fork()
if child == 0:
    got = forward_backward(run_fastlm, case)
    os._exit(0 if all(torch.equal(got[name], expected[name]) for name in expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    check_python(code)


def test_other_python_threads_run_meanwhile() -> None:
    """With the GIL held they would stand still from just after the start of a call to its end."""
    case = make_recurrent("lstm", 600, 16, 64, 512)
    inside, stop, ticks = threading.Event(), threading.Event(), 0

    def count() -> None:
        nonlocal ticks
        while not stop.wait(0.002):
            ticks += inside.is_set()

    counter = threading.Thread(target=count)
    counter.start()
    inside.set()
    run_fastlm(case)
    inside.clear()
    stop.set()
    counter.join()
    assert ticks >= 5


@pytest.mark.parametrize("steps", [32768, 40000])
def test_a_thread_without_items_in_a_long_sequence(steps: int) -> None:
    """One block of units for two threads, in more rounds than 15 bits count."""
    case = make_recurrent("gru", steps, 1, 24, 8)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(forward_backward(run_fastlm, case))
    assert same(results[1], results[0])
