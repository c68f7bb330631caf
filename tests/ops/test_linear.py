"""The linear layer: torch's own, and by the kernels' product with its derivatives."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.nn import _linear
from fastlm.ops import linear as linear_op
from fastlm.ops.gemm import is_faster
from tests.numerics import Outputs, check_all, kernels_only

SIZES = (520, 760, 700)  # rows, and features of input and output, for which all three products are the kernels'


def run(function, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> Outputs:
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(leaves["x"], leaves["weight"], leaves.get("bias"))
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach()} | {f"grad_{name}": each for name, each in zip(leaves, grads, strict=True)}


@kernels_only
@pytest.mark.parametrize("with_bias", [True, False], ids=("bias", "plain"))
@pytest.mark.parametrize("sizes", [SIZES, (1800, 600, 64), (512, 258, 516)], ids=str)
def test_linear(isa: str, sizes: tuple[int, int, int], with_bias: bool) -> None:
    rows, width, out = sizes
    x, weight = torch.randn(rows // 4, 4, width), torch.randn(out, width)
    bias, grad = torch.randn(out) if with_bias else None, torch.randn(rows // 4, 4, out)
    double = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, grad)]
    truth = run(torch.nn.functional.linear, *double)  # type: ignore[arg-type]
    theirs = run(torch.nn.functional.linear, x, weight, bias, grad)
    check_all(run(fastlm.ops.linear, x, weight, bias, grad), theirs, truth)
    with torch.no_grad():
        turned = x.transpose(0, 1)
        check_all(
            {"turned": fastlm.ops.linear(turned, weight, bias)},
            {"turned": theirs["output"].transpose(0, 1)},
            {"turned": truth["output"].transpose(0, 1)},
        )


@kernels_only
def test_it_is_the_product(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is faster, forward and backward; else torch's own bits."""
    rows, width, out = SIZES
    by_kernel = is_faster(rows, out, width, False, True, True)
    outruns_mkl = isa in ("avx512", "avx512_bf16") and "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    assert by_kernel == (outruns_mkl or isa in ("avx512_amx", "wide_amx"))
    x, weight, grad = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
    ours, theirs = (
        run(function, x, weight, None, grad) for function in (fastlm.ops.linear, torch.nn.functional.linear)
    )
    for name, ours_of_it in ours.items():
        assert torch.equal(ours_of_it, theirs[name]) is not by_kernel, name
    few = x[:10]
    few_by_kernel = is_faster(10, out, width, False, True, False)
    assert torch.equal(fastlm.ops.linear(few, weight), torch.nn.functional.linear(few, weight)) is not few_by_kernel
    for few, by_torch in ((x[:1], weight[:10]), (x[:10], weight.mT.contiguous().mT)):
        assert torch.equal(fastlm.ops.linear(few, by_torch), torch.nn.functional.linear(few, by_torch))


@kernels_only
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_few_rows(isa: str, rows: int) -> None:
    """On some CPUs the kernels' even of these, where nothing is recorded."""
    x, weight, bias = torch.randn(rows, 1030), torch.randn(1600, 1030), torch.randn(1600)
    plain = torch.nn.functional.linear
    truth = plain(x.double(), weight.double(), bias.double())
    check_all({"y": fastlm.ops.linear(x, weight, bias)}, {"y": plain(x, weight, bias)}, {"y": truth})


@kernels_only
@pytest.mark.parametrize("form", list(product((False, True), repeat=2)), ids=str)
def test_derivatives_of_the_product(form: tuple[bool, bool]) -> None:
    a = torch.randn(*((3, 5) if form[0] else (5, 3)), dtype=torch.float64, requires_grad=True)
    b = torch.randn(*((4, 3) if form[1] else (3, 4)), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.fastlm.gemm(a, b, *form, bias)

    assert torch.autograd.gradcheck(multiply, (a, b, bias))
    assert torch.autograd.gradgradcheck(multiply, (a, b))
    torch.library.opcheck(torch.ops.fastlm.gemm.default, (a, b, *form, bias))
    frozen = multiply(a.detach(), b)
    assert torch.autograd.grad(frozen.sum(), b)[0].shape == b.shape


@kernels_only
def test_second_derivatives(isa: str) -> None:
    rows, width, out = SIZES

    def second(function, dtype: torch.dtype) -> Outputs:
        torch.manual_seed(0)
        x, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (rows, out))
        (first,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        grads = torch.autograd.grad(first.square().sum(), (x, weight))
        return dict(zip(("x", "weight"), grads, strict=True))

    plain = torch.nn.functional.linear
    check_all(second(fastlm.ops.linear, torch.float32), second(plain, torch.float32), second(plain, torch.float64))


def test_all_else_is_torchs(isa: str) -> None:
    rows, width, out = SIZES
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    assert fastlm.ops.linear(x, weight[0]).shape == (rows,)
    assert fastlm.ops.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlm.ops.linear(x, weight).dtype == torch.bfloat16
    tangents = torch.func.jvp(lambda x: fastlm.ops.linear(x, weight), (x,), (x,))[1]
    torch.testing.assert_close(tangents, torch.nn.functional.linear(x, weight))
    stack = torch.func.vmap(fastlm.ops.linear, in_dims=(0, None))(x.view(2, -1, width), weight)
    assert stack.shape == (2, rows // 2, out)
    for wrong in ((x[:, 1:], weight), (x, weight.double()), (x, weight, weight[0])):
        with pytest.raises(RuntimeError) as theirs:
            torch.nn.functional.linear(*wrong)
        with pytest.raises(RuntimeError) as ours:
            fastlm.ops.linear(*wrong)
        assert str(ours.value) == str(theirs.value)
    for given in ((x, None), (None, weight)):
        with pytest.raises(TypeError, match="must be Tensor, not NoneType"):
            fastlm.ops.linear(*given)


def test_module(isa: str) -> None:
    rows, width, out = SIZES
    model = torch.nn.Sequential(torch.nn.Linear(width, out), torch.nn.ReLU(), torch.nn.Linear(out, 3))
    x, twin = torch.randn(rows, width), copy.deepcopy(model)
    assert fastlm.replace(model) is model
    assert type(model[0]) is torch.nn.Linear  # not without being asked to
    fastlm.replace(model, linear=True)
    assert type(model[0]) is type(model[2]) is fastlm.nn.Linear
    assert fastlm.explain(model)["replaced"] == {"0": "fastlm.nn.Linear", "2": "fastlm.nn.Linear"}
    outputs = [each(x) for each in (model, twin)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), outputs[1], rtol=1e-4, atol=1e-5)
    assert type(model[0].to_torch()) is torch.nn.Linear
    assert type(fastlm.restore(model)[0]) is torch.nn.Linear


def test_a_layer_that_does_more_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(_linear.ops, "linear", lambda *args: calls.append(True) or linear_op(*args))
    layer, x = torch.nn.Linear(3, 4), torch.randn(2, 3)
    assert torch.equal(_linear.project(layer, x), layer(x))
    assert len(calls) == 1
    assert _linear.is_linear(layer)
    assert _linear.is_linear(fastlm.nn.Linear(3, 4))  # a replaced output layer keeps its fused loss
    layer.register_forward_hook(lambda *_: torch.zeros(1))
    assert _linear.project(layer, x).shape == (1,)
    assert len(calls) == 1


@kernels_only
def test_large_numbers_and_nan(isa: str) -> None:
    """Backward, too, is made again in floats where a number is too large to be split."""
    rows, width, out = SIZES
    for value in (2.0**60, float("inf"), float("nan")):
        x, weight, grad = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
        x[7, 5] = grad[9, 3] = value
        ours, theirs = (run(each, x, weight, None, grad) for each in (fastlm.ops.linear, torch.nn.functional.linear))
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4, equal_nan=True)
