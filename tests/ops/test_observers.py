"""Calls with little around them pass nobody by: profilers, modes, tracers, and tensors with keys of their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from tests.numerics import kernels_only

pytestmark = [
    kernels_only,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def calls() -> dict[str, tuple[Callable[..., object], torch.Tensor]]:
    x = torch.randn(3, 2, 4)
    lstm = fastlm.nn.LSTM(4, 4).requires_grad_(False)
    cell = fastlm.nn.GRUCell(4, 4).requires_grad_(False)
    attention = fastlm.nn.MultiheadAttention(4, 2).requires_grad_(False)
    return {
        "lstm_forward": (lambda x: lstm(x)[0], x),
        "gru_forward": (cell, x[0]),
        "attention_forward": (lambda x: fastlm.ops.scaled_dot_product_attention(x, x, x), x[None]),
        "attention_weights_forward": (lambda x: attention(x, x, x), x),
        "gelu_forward": (fastlm.ops.gelu, x),
        "dropout": (lambda x: fastlm.ops.dropout(x, 0.5), x),
    }


class Noting:
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen


class Dispatched(Noting, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(Noting, TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def profiled(seen: list[str]) -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    seen.extend(event.key for event in profile.key_averages())


@pytest.mark.parametrize("observer", [Dispatched, Called, profiled])
@pytest.mark.parametrize("name", calls())
def test_observers_see_the_operation(name: str, observer: Callable) -> None:
    call, x = calls()[name]
    for grad in (False, True):
        seen: list[str] = []
        with torch.set_grad_enabled(grad), observer(seen):
            call(x)
        assert any(name in each for each in seen)


@pytest.mark.parametrize("name", [name for name in calls() if name != "dropout"])
def test_negative_bits_and_zero_tensors(name: str) -> None:
    call, x = calls()[name]
    with torch.no_grad():
        for unusual in (torch._neg_view(x), torch.complex(x, x).conj().imag, torch._efficientzerotensor(x.shape)):
            plain = unusual.resolve_neg() + torch.zeros_like(x)
            for got, expected in zip(call(unusual), call(plain), strict=True):
                assert torch.equal(got, expected)


def test_batches_of_gradients() -> None:
    """By torch's older batching, whose tensors have no memory of their own."""
    x = torch.randn(5, requires_grad=True)
    y = fastlm.ops.dropout(x, 0.5)
    (jacobian,) = torch.autograd.grad(y, x, torch.eye(5), is_grads_batched=True)
    assert torch.equal(jacobian.diag() * x, y)


@pytest.mark.parametrize("name", [name for name in calls() if name != "dropout"])
def test_traced_calls_compute(name: str) -> None:
    """And not what they gave for the example."""
    call, x = calls()[name]
    with torch.no_grad():
        traced = torch.jit.trace(call, x, check_trace=False)
        for got, expected in zip(traced(2 * x), call(2 * x), strict=True):
            assert torch.equal(got, expected)
    assert f"fastlm::{name}" in str(traced.graph)
