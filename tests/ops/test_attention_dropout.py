"""Dropout of attention: independent coins, the same in every implementation."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.ops.reference import dropout_factors
from tests.attention import FP64, Attention, make_attention, run_fastlm, run_reference, same_to_the_bit
from tests.numerics import check_all, forward_backward


def kept_weights(case: Attention) -> Tensor:
    """Which weights remain: values are the unit matrix, so that the output is the weights."""
    k_len = case.k.shape[2]
    unit = torch.eye(k_len).expand(*case.k.shape[:2], -1, -1)
    return run_fastlm(replace(case, v=unit))["output"] != 0


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_how_many_weights_are_dropped(dropout_p: float) -> None:
    """Over all, over rows, columns and heads, and for neighbours together: as of independent coins."""
    kept = kept_weights(make_attention(2, 4, 100, 8, k_len=200, dropout_p=dropout_p)).double()
    p = 1 - dropout_p

    def deviations(sample: Tensor, mean: float, variance: float, count: int) -> float:
        return float(((sample - mean) / (variance / count) ** 0.5).abs().max())

    coin = p * (1 - p)
    assert deviations(kept.mean(), p, coin, kept.numel()) < 4.5
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3), (3,)):
        count = kept.numel() // kept.mean(dims).numel()
        assert deviations(kept.mean(dims), p, coin, count) < 5.5, dims
    for dim, distance in product(range(4), (1, 2, 16)):
        size = kept.shape[dim]
        if distance >= size:
            continue
        both = kept.narrow(dim, 0, size - distance) * kept.narrow(dim, distance, size - distance)
        # Pairs overlap, which adds 2 p^3 (1 - p) at most to the variance of a product of two coins.
        variance = p**2 * (1 - p**2) + 2 * p**3 * (1 - p)
        assert deviations(both.mean(), p**2, variance, both.numel()) < 4.5, (dim, distance)


def test_dropout_of_all_and_of_none(isa: str) -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        gone = forward_backward(run_fastlm, replace(case, dropout_p=1.0))
        expected = forward_backward(run_fastlm, case)
        assert not gone["output"].any()
        assert not gone["grad_v"].any()
        assert torch.equal(gone["lse"], expected["lse"])
        assert same_to_the_bit(replace(case, dropout_p=0), case)
    state = torch.get_rng_state()
    run_fastlm(case)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_follows_the_seed(isa: str) -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70, dropout_p=0.5)
        arguments = case.arguments()
        torch.manual_seed(1)
        first, second = fastlm.ops.attention(**arguments), fastlm.ops.attention(**arguments)
        torch.manual_seed(1)
        assert torch.equal(fastlm.ops.attention(**arguments), first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("q_len", [3, 70])
def test_dropout_is_the_references(isa: str, q_len: int) -> None:
    """The same weights fall in every implementation, forward and backward."""
    case = make_attention(2, 4, q_len, 8, kv_heads=2, k_len=130, dropout_p=0.4, causal="lower_right")
    truth = forward_backward(run_reference, case.to(FP64))
    check_all(forward_backward(run_fastlm, case), forward_backward(run_reference, case), truth, 1.0)
    unit = replace(case, mask=None, causal=None, k=case.k[:, :, :70], v=case.v[:, :, :70])
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, ())
    assert torch.equal(kept_weights(unit), dropout_factors(seed, 0.4, unit.q.shape[:3], 70) > 0)


def test_dropout_gradients_are_finite_differences(isa: str) -> None:
    for q_len, k_len in ((2, 5), (14, 3)):
        case = make_attention(1, 1, q_len, 3, k_len=k_len, dropout_p=0.4, dtype=FP64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *qkv, c=case: run_fastlm(
            replace(c, **dict(zip("qkv", qkv, strict=True))))["output"], (case.q, case.k, case.v))  # fmt: skip
