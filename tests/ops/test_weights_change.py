"""Nothing derived from a weight outlives a call, and no result is shared: weights change under the op in every way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.numerics import Outputs, Recurrent, forward_backward, make_recurrent, run_fastlm

KINDS = ("gru", "lstm")
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


def in_place(weights: list[Tensor]) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.mul_(0.5)


def through_data(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.data.add_(0.25)


def replaced_data(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.data = weight.data * -1


def numpy_view(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.detach().numpy()[...] *= 0.5


def fused_optimizer(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.Adam(weights, lr=0.1, fused=True).step()


def load_state_dict(weights: list[Tensor]) -> None:
    module = torch.nn.ParameterList(weights)
    module.load_state_dict({name: value + 0.125 for name, value in module.state_dict().items()})


CHANGES = (in_place, through_data, replaced_data, numpy_view, fused_optimizer, load_state_dict)


def equal(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) for name, value in expected.items())


def with_parameters(kind: str, *shape: int) -> Recurrent:
    case = make_recurrent(kind, *shape)
    return case.map(lambda name, tensor: torch.nn.Parameter(tensor) if name in WEIGHTS else tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (5, 9, 16, 48)], ids=("step", "sequence"))
def test_next_call_sees_it(kind: str, change: Callable[[list[Tensor]], None], shape: tuple[int, ...]) -> None:
    case = with_parameters(kind, *shape)
    with torch.no_grad():
        before = run_fastlm(case)
    change([case.tensors()[name] for name in WEIGHTS])
    fresh = case.map(lambda _, tensor: tensor.detach().clone())
    with torch.no_grad():
        after = run_fastlm(case)
        assert not equal(after, before)
        assert equal(after, run_fastlm(fresh))
    assert equal(forward_backward(run_fastlm, case), forward_backward(run_fastlm, fresh))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x", "w_ih", "w_hh"])
def test_change_between_forward_and_backward_is_an_error(kind: str, name: str) -> None:
    """As in torch: a backward that needs the old values says so rather than use the new ones."""
    case = make_recurrent(kind, 3, 2, 4, 5, requires_grad=True)
    output = run_fastlm(case)["output"]
    with torch.no_grad():
        case.tensors()[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
@pytest.mark.parametrize("seq_len", [1, 4])
def test_outputs_alias_nothing(kind: str, seq_len: int, reverse: bool) -> None:
    case = make_recurrent(kind, seq_len, 2, 8, 8, reverse=reverse, requires_grad=True)
    outputs = run_fastlm(case)
    tensors = [*outputs.values(), *case.tensors().values()]
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert len(set(storages)) == len(storages)
    assert all(out._base is None for out in outputs.values())

    expected = forward_backward(lambda given: {n: 2 * out for n, out in run_fastlm(given).items()}, case)
    got = forward_backward(lambda given: {n: out.mul_(2) for n, out in run_fastlm(given).items()}, case)
    assert equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_alias_nothing(kind: str) -> None:
    grads = forward_backward(run_fastlm, make_recurrent(kind, 1, 1, 8, 8))
    storages = [value.untyped_storage().data_ptr() for value in grads.values()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("kind", KINDS)
def test_results_outlive_later_calls(kind: str) -> None:
    cases = [make_recurrent(kind, 4, 3, 8, 16, seed=seed) for seed in range(3)]
    results = [forward_backward(run_fastlm, case) for case in cases]
    copies = [{name: value.clone() for name, value in result.items()} for result in results]
    for case in reversed(cases):
        forward_backward(run_fastlm, case)
    assert all(map(equal, results, copies))


@pytest.mark.parametrize("kind", KINDS)
def test_two_graphs_at_once(kind: str) -> None:
    """A backward uses what its own forward kept, whatever ran in between."""
    cases = [make_recurrent(kind, 4, 3, 8, 16, seed=seed, requires_grad=True) for seed in range(2)]
    losses = [run_fastlm(case)["output"].sum() for case in cases]
    for case, loss in zip(cases, losses, strict=True):
        expected = forward_backward(
            run_fastlm, case, arriving=lambda outputs: {"output": torch.ones_like(outputs["output"])}
        )
        loss.backward()
        for name, tensor in case.tensors().items():
            assert torch.equal(tensor.grad, expected[f"grad_{name}"]), name
