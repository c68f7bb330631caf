"""attention_varlen: packed sequences."""

from dataclasses import replace

import pytest
import torch

import fastlm
from tests.attention import BF16, FP64, check_attention, equal, full, make_attention, make_varlen, run_fastlm
from tests.numerics import forward_backward

PACKED = {
    "one": ([5], [5]),
    "three": ([5, 17, 2], [5, 17, 2]),
    "empty ones": ([0, 5, 0, 7, 0], [3, 0, 0, 9, 0]),
    "all empty": ([0, 0], [0, 0]),
    "none": ([], []),
    "decoding": ([1, 1, 2], [40, 600, 3]),
    "long": ([130, 70], [140, 65]),
}


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), PACKED.values(), ids=PACKED)
def test_packed(q_lengths: list[int], k_lengths: list[int], past: int) -> None:
    for options in ({}, {"causal": "lower_right"}, {"causal": "upper_left", "sinks": True, "slopes": "batch"}):
        check_attention(make_varlen(q_lengths, k_lengths, 4, kv_heads=2, past=past, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"window": (3, 1)},
        {"window": (6, -1), "causal": "lower_right", "slopes": "heads"},
        {"softcap": 2.0},
        {"dropout_p": 0.4},
        {"scale": -0.5},
        {"dtype": FP64},
        {"dtype": BF16, "causal": "lower_right", "slopes": "heads", "sinks": True},
        {"v_dim": 3},
    ],
    ids=str,
)
def test_packed_options(options: dict) -> None:
    check_attention(make_varlen([7, 0, 30, 1], [9, 4, 25, 1], 4, kv_heads=1, past=2, **options))


def test_packed_keys_in_parts_with_rows_past_the_last() -> None:
    """Gradients of q are then kept by part: the rows past the last sequence have places among them."""
    check_attention(make_varlen([30], [1100], 2, past=900), wanted=("q", "k", "v"), scale=8.0)


@full
def test_packed_over_many_lengths() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths = [torch.randint(0, 200, (6,), generator=generator).tolist() for _ in range(2)]
        for causal in (None, "upper_left", "lower_right"):
            check_attention(make_varlen(*lengths, 4, 16, kv_heads=2, past=seed % 3, causal=causal))


def test_packed_starts_in_every_form() -> None:
    case = make_varlen([5, 0, 3], [4, 2, 3])
    expected = run_fastlm(case)
    for form in (torch.tensor, lambda starts: torch.tensor(starts, dtype=torch.int32)):
        starts = {name: form(getattr(case, name)) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        assert equal(run_fastlm(replace(case, **starts)), expected)
    rows = (case.q, case.k, case.v, case.cu_seqlens_q, case.cu_seqlens_k)
    assert torch.equal(fastlm.ops.attention_varlen(*rows, 5, 4), expected["output"])


def test_packed_is_padded(isa: str) -> None:
    """The same sequences in a batch of one length, to the bit."""
    padded = make_attention(3, 4, 20, 8, kv_heads=2, causal="upper_left", slopes="heads")
    starts = [0, 20, 40, 60]
    packed = replace(
        padded.map(lambda _, tensor: tensor.transpose(1, 2).flatten(0, 1)), cu_seqlens_q=starts, cu_seqlens_k=starts
    )
    expected, got = run_fastlm(padded), run_fastlm(packed)
    assert torch.equal(got["output"], expected["output"].transpose(1, 2).flatten(0, 1))
    assert torch.equal(got["lse"], expected["lse"].transpose(0, 1).flatten(1))


def test_packed_layouts(isa: str) -> None:
    """Heads outside, rows of a wider matrix, as slices of one projection."""
    case = make_varlen([7, 9], [7, 9], 4, 8)
    expected = forward_backward(run_fastlm, case)
    fused = torch.cat((case.q, case.k, case.v), -1)
    slices = dict(zip(("q", "k", "v"), fused.split(8, -1), strict=True))
    outside = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in case.tensors().items()}
    for given in (slices, outside):
        assert equal(forward_backward(run_fastlm, case.map(lambda name, _, g=given: g[name])), expected)
