"""Derivatives of every order and kind, by value."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

from tests.numerics import Recurrent, Runner, check, make_recurrent, run_fastlm, run_torch, with_sequences

KINDS = ("gru", "lstm")


def as_function(run: Runner, case: Recurrent):
    """(function of the case's tensors in order, these tensors)."""
    names = list(case.tensors())

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        return tuple(run(case.map(lambda name, _: given[name])).values())

    return function, tuple(case.tensors().values())


def scalar(run: Runner, case: Recurrent, name: str):
    """A smooth scalar of all outputs, as a function of one input."""

    def function(value: Tensor) -> Tensor:
        outputs = run(case.map(lambda key, tensor: value if key == name else tensor))
        return sum((out * out).sum() + out.sum() for out in outputs.values())

    return function


def vector(run: Runner, case: Recurrent, name: str):
    """All outputs, flat, as a function of one input."""

    def function(value: Tensor) -> Tensor:
        outputs = run(case.map(lambda key, tensor: value if key == name else tensor))
        return torch.cat([out.flatten() for out in outputs.values()])

    return function


def names_of(kind: str) -> list[str]:
    return list(make_recurrent(kind, 1, 1, 1, 1).tensors())


BY_INPUT = pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in names_of(kind)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
@pytest.mark.parametrize("optional", [False, True], ids=("bare", "all_inputs"))
def test_gradcheck(isa: str, kind: str, optional: bool, reverse: bool) -> None:
    given = "both" if optional else "none"
    case = make_recurrent(
        kind, 3, 2, 2, 3, dtype=torch.float64, bias=given, state=given, reverse=reverse, requires_grad=True
    )
    function, tensors = as_function(run_fastlm, case)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
@pytest.mark.parametrize("form", ["lengths", "packed", "resets", "both"])
def test_gradcheck_of_sequences(isa: str, kind: str, form: str, reverse: bool) -> None:
    case = with_sequences(make_recurrent(kind, 3, 3, 2, 3, dtype=torch.float64, reverse=reverse), form)
    case = replace(case, all_states=kind == "lstm").map(lambda _, tensor: tensor.detach().requires_grad_())
    function, tensors = as_function(run_fastlm, case)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    if form == "both":
        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_forward_mode_and_batched_gradients(kind: str) -> None:
    function, tensors = as_function(
        run_fastlm, make_recurrent(kind, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    )
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_forward_grad=True)


@BY_INPUT
def test_func_grad(kind: str, name: str) -> None:
    case = make_recurrent(kind, 3, 2, 4, 5)
    got, same, truth = (
        torch.func.grad(scalar(run_fastlm, case, name))(case.tensors()[name]),
        *(jacobian(scalar(run_torch, given, name), given.tensors()[name]) for given in (case, case.to(torch.float64))),
    )
    check(f"grad {name}", got, same, truth, "gradient")


@BY_INPUT
def test_jacrev_and_jvp(kind: str, name: str) -> None:
    case = make_recurrent(kind, 3, 2, 2, 3)
    double = case.to(torch.float64)
    value = case.tensors()[name]
    same, truth = (jacobian(vector(run_torch, given, name), given.tensors()[name]) for given in (case, double))
    check(f"jacrev {name}", torch.func.jacrev(vector(run_fastlm, case, name))(value), same, truth, "gradient")
    check(f"jacfwd {name}", torch.func.jacfwd(vector(run_fastlm, case, name))(value), same, truth, "gradient")

    tangent = torch.randn_like(value)
    output, got = torch.func.jvp(vector(run_fastlm, case, name), (value,), (tangent,))
    with forward_ad.dual_level():
        dual = vector(run_fastlm, case, name)(forward_ad.make_dual(value, tangent))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, got)
    dims = value.dim()
    products = (torch.tensordot(jac, tangent.to(jac.dtype), dims=dims) for jac in (same, truth))
    check(f"jvp {name}", got, *products, "gradient")
    check(f"jvp {name} output", output, *(vector(run_torch, given, name)(t) for given, t in
                                          ((case, value), (double, value.double()))))  # fmt: skip


@BY_INPUT
def test_hessian(kind: str, name: str) -> None:
    case = make_recurrent(kind, 3, 1, 2, 3)
    value = case.tensors()[name]
    same, truth = (
        hessian(scalar(run_torch, given, name), given.tensors()[name]) for given in (case, case.to(torch.float64))
    )
    check(
        f"torch.func.hessian {name}", torch.func.hessian(scalar(run_fastlm, case, name))(value), same, truth, "gradient"
    )
    check(
        f"hessian through double backward {name}",
        hessian(scalar(run_fastlm, case, name), value),
        same,
        truth,
        "gradient",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_grad_gives_gradients_per_sample(kind: str) -> None:
    case = make_recurrent(kind, 3, 4, 4, 5, state="none")

    def loss(run: Runner, given: Recurrent):
        def function(w_hh: Tensor, x: Tensor) -> Tensor:
            one = given.map(lambda key, tensor: {"w_hh": w_hh, "x": x.unsqueeze(1)}.get(key, tensor))
            return sum((out * out).sum() for out in run(one).values())

        return function

    got = torch.func.vmap(torch.func.grad(loss(run_fastlm, case)), in_dims=(None, 1))(case.w_hh, case.x)
    same, truth = (
        torch.stack([jacobian(lambda w, b=b, given=given: loss(run_torch, given)(w, given.x[:, b]), given.w_hh)
                     for b in range(4)])
        for given in (case, case.to(torch.float64))
    )  # fmt: skip
    check("vmap(grad)", got, same, truth, "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_forward(kind: str) -> None:
    case = make_recurrent(kind, 3, 4, 4, 5, state="none")

    def forward(x: Tensor) -> Tensor:
        return run_fastlm(case.map(lambda key, tensor: x if key == "x" else tensor))["output"]

    many = torch.stack((case.x, 2 * case.x))
    double = case.to(torch.float64)
    same, truth = (
        torch.stack([run_torch(given.map(lambda k, t, s=s: s * t if k == "x" else t))["output"] for s in (1, 2)])
        for given in (case, double)
    )
    check("vmap", torch.func.vmap(forward)(many), same, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice_and_accumulation(kind: str) -> None:
    case = make_recurrent(kind, 4, 3, 4, 5, requires_grad=True)
    loss = sum(out.sum() for out in run_fastlm(case).values())
    loss.backward(retain_graph=True)
    first = {name: tensor.grad.clone() for name, tensor in case.tensors().items()}
    loss.backward()
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor.grad, 2 * first[name]), name
    grads = [tensor.grad.data_ptr() for tensor in case.tensors().values()]
    assert len(set(grads)) == len(grads)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty_reaches_weights(kind: str) -> None:
    """The usual use of double backward: the norm of a gradient as a loss, some inputs without gradient."""

    def penalty(run: Runner, dtype: torch.dtype) -> Tensor:
        case = make_recurrent(kind, 4, 3, 4, 5).to(dtype)
        case = case.map(lambda name, tensor: tensor.requires_grad_(name in ("x", "w_hh")))
        (grad,) = torch.autograd.grad(run(case)["output"].square().sum(), case.x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), case.w_hh)[0]

    check("penalty", penalty(run_fastlm, torch.float32), penalty(run_torch, torch.float32),
          penalty(run_torch, torch.float64), "gradient")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_op_called_without_save_still_differentiates(kind: str) -> None:
    case = make_recurrent(kind, 3, 2, 4, 5, requires_grad=True)
    output, *_, reserve = getattr(torch.ops.fastlm, f"{kind}_forward")(*case.op_arguments(False))
    assert reserve.numel() == 0
    got = torch.autograd.grad(output.sum(), case.w_hh)[0]
    same, truth = (
        torch.autograd.grad(run_torch(given)["output"].sum(), given.w_hh)[0] for given in (case, case.to(torch.float64))
    )
    check("grad_w_hh", got, same, truth, "gradient")
