"""NaN, infinities and saturation go through as in torch."""

import math
from dataclasses import replace

import pytest
import torch

from tests.numerics import (
    Outputs,
    Recurrent,
    check_case,
    check_recurrent,
    forward_backward,
    make_recurrent,
    run_fastlm,
    run_reference,
    run_torch,
)

KINDS = ("gru", "lstm")
VALUES = (float("nan"), float("inf"), -float("inf"))


def spoil(case: Recurrent, name: str, value: float) -> Recurrent:
    """The case with one element of one input replaced."""

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if key == name:
            tensor.view(-1)[tensor.numel() // 3] = value
        return tensor

    return case.map(change)


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in make_recurrent(kind, 1, 1, 1, 1).tensors()]
)
def test_one_value_that_is_not_finite(kind: str, name: str, value: float) -> None:
    for shape, reverse in (((4, 5, 7, 9), False), ((3, 9, 8, 17), True)):
        check_recurrent(spoil(make_recurrent(kind, *shape, reverse=reverse), name, value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("fp32", "fp64"))
@pytest.mark.parametrize(("name", "exponent"), [("x", 10), ("x", 14), ("b_ih", 10), ("b_ih", 100), ("h0", 10)])
def test_saturated_gates(kind: str, dtype: torch.dtype, name: str, exponent: int) -> None:
    """In multiples of 1/4 the large products are exact, so a gate is saturated or untouched, whoever adds up."""
    case = make_recurrent(kind, 1 if name == "h0" else 4, 3, 6, 18, dtype=dtype)
    case = case.map(lambda _, tensor: (4 * tensor).round() / 4)
    check_recurrent(case.map(lambda key, tensor: tensor * 2.0**exponent if key == name else tensor))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "end"), [(torch.float32, 115.0), (torch.float64, 760.0)], ids=("fp32", "fp64"))
def test_gates_over_the_whole_range_of_exp(kind: str, dtype: torch.dtype, end: float) -> None:
    """Every gate's pre-activation is x itself, which runs through the last normal, denormal and infinite exp."""
    case = make_recurrent(kind, 80, 50, 1, 2, dtype=dtype, bias="none")
    inputs = {
        "x": torch.linspace(-end, end, 80 * 50, dtype=dtype).view(80, 50, 1),
        "w_ih": torch.ones_like(case.w_ih),
        "w_hh": torch.zeros_like(case.w_hh),
    }
    # Not the weights: their gradients are sums of 4000 large terms that cancel.
    wanted = ["x", "h0"] if kind == "gru" else ["x", "h0", "c0"]
    check_recurrent(case.map(lambda name, tensor: inputs.get(name, tensor)), wanted=wanted)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_cell_states(size: float) -> None:
    case = make_recurrent("lstm", 4, 3, 5, 9)
    check_recurrent(case.map(lambda name, tensor: tensor * size if name == "c0" else tensor))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_gate_at_infinity(kind: str, sign: int) -> None:
    case = make_recurrent(kind, 3, 2, 4, 9)
    check_recurrent(case.map(lambda name, t: torch.full_like(t, sign * float("inf")) if name == "b_ih" else t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("fp32", "fp64"))
def test_denormals_in_the_reference(kind: str, dtype: torch.dtype) -> None:
    """To the kernels they are zeros: test_subnormals.py."""
    tiny = torch.finfo(dtype).tiny / 64
    case = make_recurrent(kind, 4, 3, 5, 9, dtype=dtype, bias="none")
    for names in (("x", "h0", "c0"), ("w_hh",)):
        scaled = case.map(lambda name, tensor, names=names: tensor * tiny if name in names else tensor)
        check_case(scaled, run_reference, run_torch)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_and_tiny_gradients(kind: str) -> None:
    case = make_recurrent(kind, 5, 3, 5, 9)
    for size in (1e30, 1e-30):
        check_recurrent(
            case,
            arriving=lambda outputs, size=size: {name: torch.full_like(out, size) for name, out in outputs.items()},
        )


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("where", ["output", "h_n"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_not_finite(isa: str, kind: str, where: str, value: float) -> None:
    def arriving(outputs: Outputs) -> Outputs:
        grads = {name: torch.ones_like(out) for name, out in outputs.items()}
        grads[where].view(-1)[4] = value
        return grads

    case = make_recurrent(kind, 4, 5, 6, 9)
    got, expected = (forward_backward(run, case, arriving=arriving) for run in (run_fastlm, run_torch))
    for name, tensor in got.items():
        # Torch writes grad * (1 - z) as grad - grad * z, so an infinity of ours may be a NaN of torch's.
        assert torch.equal(tensor.isfinite(), expected[name].isfinite()), name
        assert math.isinf(value) or torch.equal(tensor.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_exact_values(isa: str, kind: str) -> None:
    """Nothing in, nothing out: sigmoid(0) is 1/2 and tanh(0) is 0 to the bit."""
    case = make_recurrent(kind, 3, 2, 4, 17).map(lambda _, tensor: torch.zeros_like(tensor))
    for out in run_fastlm(case).values():
        assert torch.equal(out, torch.zeros_like(out))
    one = case.map(lambda name, tensor: tensor + 1 if name in ("h0", "c0") else tensor)
    got = run_fastlm(one)
    states = got["output"] if kind == "gru" else got["c_n"]
    expected = torch.tensor([0.5, 0.25, 0.125]) if kind == "gru" else torch.tensor(0.125)
    assert torch.equal(states, expected.reshape(-1, 1, 1).expand(3, 2, 17) if kind == "gru" else expected.expand(2, 17))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_what_lies_beside_a_row_plays_no_part(isa: str, kind: str, dtype: torch.dtype) -> None:
    """Odd sizes, filled up to whole vectors and pairs; memory that an earlier call left full of NaN."""
    for shape in ((20, 1, 33, 65), (20, 2, 65, 63), (30, 3, 17, 33)):
        case = make_recurrent(kind, *shape, dtype=dtype)
        expected = forward_backward(run_fastlm, case)
        forward_backward(run_fastlm, case.map(lambda _, tensor: torch.full_like(tensor, torch.nan)))
        for name, got in forward_backward(run_fastlm, case).items():
            assert torch.equal(got, expected[name]), (shape, name)


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_in_bfloat16(isa: str, kind: str) -> None:
    case = make_recurrent(kind, 20, 2, 33, 65, dtype=torch.bfloat16)
    x = case.x.clone()
    x[0, 0, 0] = torch.inf
    case = replace(case, x=x)
    got, expected = run_fastlm(case)["output"], run_torch(case)["output"]
    assert torch.equal(got.isnan(), expected.isnan())
