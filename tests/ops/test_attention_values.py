"""Attention of NaN, infinities, huge numbers and nothing."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.ops import attention
from tests.attention import (
    BF16,
    FP32,
    Attention,
    check_attention,
    dtypes,
    make_attention,
    run_fastlm,
    run_reference,
    run_torch,
)
from tests.numerics import Outputs, Runner, check_case, forward_backward, kernels_only


@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
@pytest.mark.parametrize("q_len", [3, 70])
def test_nan_is_seen_by_those_who_see_it(isa: str, name: str, q_len: int) -> None:
    case = make_attention(1, 2, q_len, 8, k_len=70, causal="lower_right", mask="float")
    place = (0, 1, 1, 0)
    spoilt = case.map(lambda key, t: t.index_put(tuple(map(torch.tensor, place)), torch.tensor(torch.nan))
                      if key == name else t)  # fmt: skip
    got, clean = run_fastlm(spoilt), run_fastlm(case)
    position = torch.arange(q_len) + 70 - q_len
    hit = position >= 1 if name in ("k", "v") else torch.arange(q_len) == 1
    if name == "v":
        assert got["output"][0, 1, hit, 0].isnan().all()
        assert torch.equal(got["lse"], clean["lse"])
    else:
        assert got["output"][0, 1, hit].isnan().all()
        assert torch.equal(got["lse"][0, 1].isnan(), hit)
    assert torch.equal(got["output"][0, 0], clean["output"][0, 0])


def test_nan_comes_through_backward(isa: str) -> None:
    for q_len in (3, 70):
        case = make_attention(1, 2, q_len, 8, k_len=70)
        spoilt = replace(case, q=case.q.index_fill(2, torch.tensor(1), torch.nan))
        got = forward_backward(run_fastlm, spoilt)
        assert got["grad_q"][:, :, 1].isnan().all()
        assert got["grad_k"].isnan().all()
        assert got["grad_v"].isnan().all()
        assert got["grad_q"][:, :, 0].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("q_len", [3, 70])
def test_infinite_values(value: float, q_len: int) -> None:
    case = make_attention(1, 1, q_len, 8, k_len=70)
    spoilt = case.v.clone()
    spoilt[0, 0, 40, 3] = value
    check_attention(replace(case, v=spoilt), wanted=())


def output_only(run: Runner) -> Runner:
    return lambda case: {"output": run(case)["output"]}


def run_torch_flash(case: Attention) -> Outputs:
    """torch's own fused attention; it too makes weights again from lse, whose rounding shows for large scores."""
    return {"output": F.scaled_dot_product_attention(case.q, case.k, case.v, case.mask, scale=case.scale)}


@dtypes
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores(dtype: torch.dtype, size: float) -> None:
    for q_len in (3, 70):
        case = make_attention(1, 2, q_len, 8, k_len=70, scale=size, dtype=dtype)
        # In multiples of 1/4 products are exact, so that large scores bring no error of their own.
        case = case.map(lambda _, tensor: (4 * tensor).round().clamp(-8, 8) / 4)
        assert all(value.isfinite().all() for value in forward_backward(run_fastlm, case).values())
        check_attention(case, wanted=("v",) if dtype == BF16 else ())
        if dtype == FP32:
            check_case(case, output_only(run_fastlm), run_torch_flash, scale=size)


@pytest.mark.parametrize("base", [10, 1e3, 1e6])
@pytest.mark.parametrize("q_len", [3, 70])
def test_large_scores_apart_by_little(isa: str, base: float, q_len: int) -> None:
    """Exact ones, which rise from part to part of the keys: every part has a largest score of its own."""
    case = make_attention(1, 2, q_len, 8, k_len=1024, scale=1.0)
    k = torch.zeros_like(case.k)
    k[..., 0], k[..., 1] = base, torch.arange(1024) // 128 / 2
    q = torch.zeros_like(case.q)
    q[..., :2] = 1
    # Backward has weights from lse, whose last digit is larger the larger it is.
    check_attention(replace(case, q=q, k=k), wanted=("v",) if base < 1e6 else ())


@pytest.mark.parametrize("size", [1e9, 1e30])
@pytest.mark.parametrize("q_len", [3, 70])
def test_enormous_scores(isa: str, size: float, q_len: int) -> None:
    """Every query takes the value of one key, and that is the right one."""
    case = make_attention(1, 2, q_len, 16, k_len=70)
    case = replace(case, q=case.q * size)
    torch.testing.assert_close(run_fastlm(case)["output"], run_torch(case)["output"])


LOW = {"-1e4": -1e4, "-1e9": -1e9, "finfo.min": torch.finfo(FP32).min}
lows = pytest.mark.parametrize("low", LOW.values(), ids=LOW)


@lows
def test_masks_of_large_numbers_instead_of_infinities(low: float) -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        mask = torch.where(torch.rand(q_len, 70) < 0.5, low, 0.0)
        mask[:, :65] = low  # a whole block
        mask[:, -1] = 0
        check_attention(replace(case, mask=mask), wanted=("q", "k", "v"))


def all_low(low: float) -> Attention:
    case = make_attention(2, 2, 70, 8)
    return replace(case, mask=torch.zeros(70, 70).index_fill(0, torch.tensor([0, 69]), low))


@lows
def test_rows_of_large_numbers_alone(low: float) -> None:
    """Such a row averages what it sees, as in torch."""
    check_attention(all_low(low), wanted=())
    check_case(all_low(low), run_reference, run_torch, wanted=())


@kernels_only
@lows
def test_gradients_of_rows_of_large_numbers_alone(low: float) -> None:
    check_case(all_low(low), output_only(run_fastlm), run_torch_flash, wanted=("q", "k", "v"))


@lows
def test_padded_rows_of_large_numbers_do_not_hurt_others(low: float) -> None:
    """Their results are not used, as padding's are not: the rest stays right."""

    def others(run: Runner) -> Runner:
        return lambda case: {"output": run(case)["output"][:, :, 1:-1]}

    check_case(all_low(low), others(run_fastlm), others(run_torch), wanted=("q", "k", "v"), scale=1.0)


def test_mask_of_infinities() -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        mask = torch.where(torch.rand(q_len, 70) < 0.5, -torch.inf, 0.0)
        mask[:, :65] = -torch.inf  # a whole block, and whole rows
        check_attention(replace(case, mask=mask))
        check_attention(replace(case, mask=mask == 0))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_huge_and_tiny_gradients(size: float) -> None:
    case = make_attention(1, 2, 20, 8)
    check_attention(case, arriving=lambda out: {"output": torch.full_like(out["output"], size)}, scale=size)


EMPTY = {
    "batch": {"batch": 0},
    "heads": {"q_heads": 0},
    "no keys": {"k_len": 0},
    "no queries": {"q_len": 0, "k_len": 4},
    "neither": {"q_len": 0},
}


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in EMPTY.items()),
        pytest.param({"dim": 0, "v_dim": 3}, id="no width"),
        pytest.param({"v_dim": 0}, id="no value"),
    ],
)
def test_empty(options: dict) -> None:
    one_number = {"mask": "float", "mask_shape": (1, 1, 1, 1)}
    for more in (
        {},
        {"sinks": True},
        {"mask": "float"},
        one_number,
        {"mask": "bool", "causal": "lower_right"},
        {"dropout_p": 0.5},
    ):
        # Without width every score is 0, whatever the scale, which is not 1 / sqrt(0).
        check_attention(make_attention(**{"q_len": 3, "scale": 1.0, **options, **more}))


@pytest.mark.parametrize("backend", ["reference", None])
def test_sinks_that_are_off(backend: str | None) -> None:
    """A sink of -inf takes nothing, from rows that see nothing either."""
    q, sinks = torch.randn(1, 2, 3, 4), torch.full((2,), -torch.inf, requires_grad=True)
    options = {"causal": "lower_right", "kv_lengths": [2], "return_lse": True}
    with contextlib.nullcontext() if backend is None else fastlm.backend(backend):
        plain, lse = attention(q, q, q, **options)
        output, lse_beside = attention(q, q, q, sinks=sinks, **options)
    assert not output[:, :, 0].any()
    assert torch.equal(lse_beside, lse)
    torch.testing.assert_close(output, plain)
    (grad,) = torch.autograd.grad(output.sum() + lse_beside[..., 1:].sum(), sinks)
    assert not grad.any()
