"""Runs a fastlm.nn module and the torch.nn module it stands in for on the same weights and inputs."""

import copy

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastlm
from tests.numerics import Outputs, check_all, incoming

State = Tensor | tuple[Tensor, Tensor] | None

LAYERS = ("GRU", "LSTM")
CELLS = ("GRUCell", "LSTMCell")


def make(name: str, *args: object, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The module of that name of fastlm.nn and the one of torch.nn, made from the same seed."""
    modules = []
    for namespace in (fastlm.nn, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(namespace, name)(*args, **options))
    return modules[0], modules[1]


def states(name: str, *shapes: tuple[int, ...]) -> State:
    """A random hx: a tensor for a GRU, a pair for an LSTM; one shape may serve for both."""
    pair = torch.randn(shapes[0]), torch.randn(shapes[-1])
    return pair if name.startswith("LSTM") else pair[0]


def outputs_of(result: object) -> Outputs:
    """The tensors of whatever a module returned, in order."""
    if isinstance(result, PackedSequence):
        return {"packed": result.data}
    if isinstance(result, Tensor):
        return {"0": result}
    return {f"{i}.{name}": value for i, part in enumerate(result) for name, value in outputs_of(part).items()}


def run(module: torch.nn.Module, dtype: torch.dtype, input: Tensor | PackedSequence, hx: State = None) -> Outputs:
    """The outputs of a copy of module in that dtype, and as grad_<name> every gradient."""
    module = copy.deepcopy(module).to(dtype)
    leaves = dict(module.named_parameters())

    def leaf(name: str, tensor: Tensor) -> Tensor:
        leaves[name] = tensor.detach().to(dtype).requires_grad_()
        return leaves[name]

    packed = isinstance(input, PackedSequence)
    x = input._replace(data=leaf("input", input.data)) if packed else leaf("input", input)
    if isinstance(hx, Tensor):
        hx = leaf("hx", hx)
    elif hx is not None:
        hx = leaf("hx[0]", hx[0]), leaf("hx[1]", hx[1])
    torch.manual_seed(0)
    outputs = outputs_of(module(x) if hx is None else module(x, hx))
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(incoming(outputs).values()))
    return outputs | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check_twins(
    ours: torch.nn.Module, theirs: torch.nn.Module, input: Tensor | PackedSequence, hx: State = None
) -> None:
    """Outputs and every gradient agree, by the one tolerance."""
    same, truth = run(theirs, torch.float32, input, hx), run(theirs, torch.float64, input, hx)
    check_all(run(ours, torch.float32, input, hx), same, truth)
