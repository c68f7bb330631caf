"""Gradients taken with create_graph=True where inputs of an op have to do with one another: each path counts once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm import ops
from tests.numerics import make_recurrent, run_reference

F64 = torch.float64


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def cells(kind: str, x: Tensor) -> Tensor:
    """Steps whose input is made of the state, as in a decoder."""
    cell = (fastlm.nn.GRUCell if kind == "gru" else fastlm.nn.LSTMCell)(3, 3).double()
    h, c = x, x
    for _ in range(3):
        if kind == "gru":
            h = cell(h.sin(), h)
        else:
            h, c = cell(h.sin(), (h, c))
    return h


def layer_on_its_state(x: Tensor) -> Tensor:
    weights = leaf(9, 3), leaf(9, 3)
    return ops.gru(x, x.mean(0), *weights)[0]


def tied(weight: Tensor) -> Tensor:
    return ops.linear_cross_entropy(weight[:3], weight, torch.tensor([1, 2, 4]))


def hooked(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        x = x * 1
        x.register_hook(lambda grad: 2 * grad)
        return function(x)

    return run


CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "attention to itself": ((1, 2, 5, 4), lambda x: ops.scaled_dot_product_attention(x, x, x)),
    "attention, bias of q": ((1, 2, 4, 4), lambda x: ops.attention(x, x.sin(), x.cos(), mask=x)),  # type: ignore[dict-item, return-value]
    "GRU cells": ((2, 3), lambda x: cells("gru", x)),
    "LSTM cells": ((2, 3), lambda x: cells("lstm", x)),
    "GRU, state of x": ((4, 2, 3), layer_on_its_state),
    "output layer, tied": ((7, 4), tied),
    "gelu, hook": ((5,), hooked(ops.gelu)),
    "output layer, hook": ((7, 4), hooked(tied)),
}


@pytest.mark.parametrize("name", CASES)
def test_create_graph_changes_no_gradient(name: str) -> None:
    shape, function = CASES[name]
    x = leaf(*shape)
    loss = function(x).pow(2).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)
    assert grad.requires_grad


@pytest.mark.parametrize("name", [name for name in CASES if "hook" not in name])
def test_gradients_of_gradients(name: str) -> None:
    shape, function = CASES[name]

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)  # weights are drawn inside
        return function(x)

    assert torch.autograd.gradgradcheck(run, leaf(*shape))


def test_hessian_is_torchs() -> None:
    x = leaf(1, 2, 4, 3).detach()
    hessians = []
    for function in (ops.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
        with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no second derivative
            hessian = torch.autograd.functional.hessian(lambda x: function(x, x, x).pow(2).sum(), x)  # noqa: B023
        hessians.append(hessian)
    torch.testing.assert_close(*hessians, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_no_step_has_a_gradient_of_all_steps(kind: str) -> None:
    """Time and memory of what the reference differentiates grow with the steps, not with their square."""
    case = make_recurrent(kind, 6, 2, 3, 4, requires_grad=True)
    nodes, seen = [run_reference(case)["output"].grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    assert {"UnbindBackward0", "StackBackward0"} <= {node.name() for node in seen}
    assert not {"SelectBackward0", "SliceBackward0"} & {node.name() for node in seen}
