"""fastlm.ops.gelu against torch's, forward and derivatives."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastlm
from tests.numerics import check, kernels_only

F64 = torch.float64
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
theirs = partial(torch.nn.functional.gelu, approximate="tanh")


def both(function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    output = function(leaf)
    return output, torch.autograd.grad(output, leaf, grad_output.to(x.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5, 11), (2, 16384), (33, 1001), (0, 4)], ids=str)
def test_against_torch(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad_output = (3 * torch.randn(shape, dtype=F64)).to(dtype), torch.randn(shape, dtype=F64)
    got, same, truth = (
        both(fastlm.ops.gelu, x, grad_output),
        both(theirs, x, grad_output),
        both(theirs, x.double(), grad_output),
    )
    if dtype == F64:  # torch is no baseline of itself
        assert all(torch.allclose(a, b, rtol=1e-13, atol=2e-14) for a, b in zip(got, truth, strict=True))
        return
    check("output", got[0], same[0], truth[0], "forward")
    check("grad_x", got[1], same[1], truth[1], "gradient", scale=1.0)  # one number may be exact by luck


@kernels_only
def test_small_results_keep_their_digits(isa: str) -> None:
    x = torch.linspace(-10, -3, 1000)
    wide = x.double()
    truth = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    assert ((fastlm.ops.gelu(x).double() - truth).abs() <= 3e-5 * truth.abs()).all()


def test_special_values(isa: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, 0.0, -0.0, 1e30, -1e30, 1e-40])
    assert torch.equal(fastlm.ops.gelu(x).nan_to_num(7.0), theirs(x).nan_to_num(7.0))


@kernels_only
def test_layouts_and_threads(isa: str) -> None:
    x = torch.randn(301, 257)
    expected = fastlm.ops.gelu(x)
    assert torch.equal(fastlm.ops.gelu(x.t()), expected.t())
    assert torch.equal(fastlm.ops.gelu(x[:, ::2]), expected[:, ::2])
    grad = both(fastlm.ops.gelu, x, torch.ones(()).expand(301, 257))[1]
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(fastlm.ops.gelu(x), expected)
        assert torch.equal(both(fastlm.ops.gelu, x, torch.ones(301, 257))[1], grad)


def test_derivatives(isa: str) -> None:
    x = torch.randn(23, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(fastlm.ops.gelu, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fastlm.ops.gelu, x)
    assert torch.allclose(torch.func.vmap(fastlm.ops.gelu)(x[None]), theirs(x[None]))


def test_registration() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fastlm.gelu_forward.default, (x,), test_utils=OPCHECKS)
    torch.library.opcheck(torch.ops.fastlm.gelu_backward.default, (torch.randn(3, 5), x.detach()))
    torch._dynamo.reset()
    compiled = torch.compile(fastlm.ops.gelu, backend="aot_eager", fullgraph=True)
    assert torch.equal(both(compiled, x, torch.ones(3, 5))[1], both(fastlm.ops.gelu, x, torch.ones(3, 5))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastlm.ops.gelu(x).dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        fastlm.ops.gelu([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected a floating-point dtype, got torch\.int64"):
        fastlm.ops.gelu(torch.tensor([1]))
