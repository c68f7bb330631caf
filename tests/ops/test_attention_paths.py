"""Ways through attention that must agree: decoding, parts of the keys, threads; and what memory they take."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.attention import (
    FP64,
    check_attention,
    dtypes,
    make_attention,
    make_varlen,
    run_fastlm,
    run_torch,
)
from tests.child import check_python
from tests.numerics import Outputs, bytes_saved, check, forward_backward, kernels_only


@pytest.mark.parametrize("k_len", [511, 512, 513, 1600])
def test_decoding_is_prefill(isa: str, k_len: int) -> None:
    """The last queries of a long sequence alone, against a cache: in several items, heads that share keys."""
    case = make_attention(2, 6, 20, 24, kv_heads=2, k_len=k_len, causal="lower_right", slopes="heads")
    whole, truth = run_fastlm(case), run_torch(case.to(FP64))
    same = run_torch(case)
    for queries in (1, 2, 4):
        last = run_fastlm(replace(case, q=case.q[:, :, -queries:]))
        for name, value in last.items():
            part = (slice(None), slice(None), slice(-queries, None))
            check(f"{name} of decoding", value, same[name][part], truth[name][part])
            check(f"{name} of prefill", whole[name][part], same[name][part], truth[name][part])


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"softcap": 2.0}, {"window": (600, 0)}], ids=str)
@pytest.mark.parametrize("lengths", [None, [1300, 0], [513, 512]], ids=str)
def test_long_cache(lengths: list[int] | None, options: dict) -> None:
    case = make_attention(
        2, 4, 3, 16, kv_heads=1, k_len=1300, kv_lengths=lengths, causal="lower_right", slopes="batch", **options
    )
    check_attention(case)


def test_largest_score_in_any_part() -> None:
    """Partial results of decoding meet, whichever part has the largest score, or sees nothing."""
    for part in range(3):
        case = make_attention(1, 1, 2, 8, k_len=1300)
        bias = torch.zeros(1300)
        bias[part * 512 : part * 512 + 100] = 80.0
        bias[(part + 1) % 3 * 512 : (part + 1) % 3 * 512 + 512] = -torch.inf
        check_attention(replace(case, mask=bias), wanted=("q", "k", "v"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 1},
        {"mask": "float", "mask_shape": (1, 1100)},
        {"mask": "float", "mask_shape": (70, 1)},
        {"mask": "float", "mask_shape": (1, 2, 1, 1100)},
        {"mask": "float", "mask_shape": (2, 1, 70, 1100)},
        {"mask": "bool"},
        {"kv_lengths": [1100, 30]},
        {"window": (100, 3)},
        {"dropout_p": 0.3},
        {"softcap": 1.0, "slopes": "heads"},
    ],
    ids=str,
)
def test_backward_in_parts(options: dict) -> None:
    """Few heads and many keys: the keys of a head are cut into parts, whose gradients of q meet."""
    check_attention(make_attention(2, 2, 70, 8, k_len=1100, causal="lower_right", **options), scale=8.0)


@kernels_only
@dtypes
def test_threads_give_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    cases = [
        make_attention(2, 4, 150, 33, kv_heads=2, causal="upper_left", dtype=dtype),
        make_attention(1, 2, 70, 16, kv_heads=1, k_len=1600, dtype=dtype),
        make_attention(1, 1, 300, 16, k_len=1100, mask="float", mask_shape=(1, 1100), dtype=dtype),
        make_attention(2, 8, 1, 64, kv_heads=2, k_len=1600, kv_lengths=[1600, 700], dtype=dtype),
        make_attention(3, 4, 60, 16, dropout_p=0.4, slopes="batch", dtype=dtype),
        make_varlen([90, 0, 33], [120, 5, 33], 4, 16, kv_heads=2, past=3, causal="lower_right", dtype=dtype),
    ]
    for case in cases:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_backward(run_fastlm, case))
        assert all(same_bits(result, results[0]) for result in results[1:]), case.arguments().keys()


def same_bits(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name].nan_to_num(9), value.nan_to_num(9)) for name, value in expected.items())


# Memory.

PEAK = """
import re
from pathlib import Path
from tests.attention import make_attention, run_fastlm
torch.set_num_threads(1)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

for options in (
    {"causal": "upper_left", "dropout_p": 0.1, "slopes": "heads", "softcap": 5.0},
    {"mask": "float", "mask_shape": (1, 4096)},
    {"kv_heads": 1},
):
    case = make_attention(1, 2, 4096, 16, **options)
    if options.get("dropout_p"):
        forward_backward(run_fastlm, case.map(lambda _, t: t[:, :, :300]))
        before = peak()
    forward_backward(run_fastlm, case)
print(peak() - before)
"""


@kernels_only
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_nothing_of_all_scores_is_stored() -> None:
    """The scores of one head would take 64 MiB."""
    assert int(check_python(PEAK)) < 24 * 2**20


def test_kept_for_backward() -> None:
    """The inputs, output and lse, and nothing else."""
    case = make_attention(2, 4, 70, 16, kv_heads=2, mask="float", mask_shape=(1, 70), requires_grad=True)
    outputs = run_fastlm(case)
    allowed = sum(t.untyped_storage().nbytes() for t in (*case.tensors().values(), *outputs.values()))
    assert 0 < bytes_saved(lambda: run_fastlm(case)) <= allowed
