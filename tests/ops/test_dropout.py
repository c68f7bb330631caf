"""fastlm.ops.dropout: which values it drops, their derivatives, and that both are found again."""

import math

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.ops import reference
from tests.numerics import kernels_only

F64 = torch.float64
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
op = torch.ops.fastlm.dropout.default


def seeded(x: Tensor, p: float, seed: int = 1, **arguments: bool) -> Tensor:
    torch.manual_seed(seed)
    return fastlm.ops.dropout(x, p, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (511,), (513,), (3, 5, 11), (2, 16384), (300, 700), (0, 4)], ids=str)
def test_against_the_reference(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, seed = torch.randn(shape).to(dtype), torch.tensor(12345678901)
    for p in (0.3, 1.0):
        expected = reference.dropout(x, seed, p)
        assert torch.equal(op(x, seed, p), expected)
        assert expected.dtype == dtype
        assert expected.shape == x.shape


def test_drops_as_many_as_asked_for_and_keeps_the_mean() -> None:
    x = torch.ones(1000, 1000)
    for p in (0.1, 0.5, 0.9):
        output = seeded(x, p)
        dropped = (output == 0).double()
        assert output.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        spread = math.sqrt(p * (1 - p))
        for means, count in ((dropped.mean(), 1e6), (dropped.mean(0), 1e3), (dropped.mean(1), 1e3)):
            assert (means - p).abs().max() < 5 * spread / math.sqrt(count)
        # Neighbours, and what is a generator's row of 65536 apart, have nothing to do with each other.
        flat = (dropped.flatten() - p) / spread
        for apart in (1, 2, 8, 512, 65536):
            assert (flat[apart:] * flat[:-apart]).mean().abs() < 5 / 1000


def test_follows_torchs_generator() -> None:
    x = torch.randn(100)
    assert torch.equal(seeded(x, 0.5), seeded(x, 0.5))
    assert not torch.equal(seeded(x, 0.5), seeded(x, 0.5, seed=2))
    assert not torch.equal(fastlm.ops.dropout(x), fastlm.ops.dropout(x))


def test_nothing_is_dropped_outside_of_training() -> None:
    x = torch.randn(3)
    assert fastlm.ops.dropout(x, 0.5, training=False) is x
    assert fastlm.ops.dropout(x, 0.0) is x
    assert fastlm.ops.dropout(x, 1).eq(0).all()


def test_special_values(isa: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, 1.0]).repeat(1000)
    ours, theirs = seeded(x, 0.5), torch.nn.functional.dropout(x, 0.5)
    assert ours[::3].isnan().all()
    assert theirs[::3].isnan().all()
    assert set(ours[1::3].nan_to_num().tolist()) == set(theirs[1::3].nan_to_num().tolist())


@kernels_only
def test_bits_do_not_depend_on_threads(isa: str) -> None:
    x, seed = torch.randn(301, 257), torch.tensor(5)
    expected = op(x, seed, 0.25)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(op(x, seed, 0.25), expected)


def test_layouts() -> None:
    x = torch.randn(5, 7, 9)
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        moved = x.permute(order)
        output = seeded(moved, 0.5)
        assert output.stride() == moved.stride()
        assert torch.equal(output, seeded(x, 0.5).permute(order))
    sparse = x[:, ::2]
    output = seeded(sparse, 0.5)
    assert output.is_contiguous()
    assert torch.equal(output, seeded(sparse.contiguous(), 0.5))


def test_derivatives(isa: str) -> None:
    x = torch.randn(4, 23, dtype=F64, requires_grad=True)
    for layout in (lambda x: x, lambda x: x.t()):
        assert torch.autograd.gradcheck(lambda x: seeded(layout(x), 0.5), x, check_forward_ad=True)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: seeded(layout(x), 0.5), x)  # noqa: B023
    output = seeded(x, 0.5)
    (grad,) = torch.autograd.grad(output, x, torch.ones(()).double().expand(4, 23))
    assert torch.equal(grad, (output != 0) * 2.0)


@kernels_only
def test_keeps_no_mask() -> None:
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        fastlm.ops.dropout(torch.randn(1000, requires_grad=True))
    assert sizes == [1]


def test_registration() -> None:
    x, seed = torch.randn(3, 5, requires_grad=True), torch.tensor(3)
    torch.library.opcheck(op, (x, seed, 0.5), test_utils=OPCHECKS)
    torch._dynamo.reset()
    compiled = torch.compile(fastlm.ops.dropout, backend="aot_eager", fullgraph=True)
    for size in (3, 6, 11):
        x = torch.randn(size, 200, requires_grad=True)
        output = compiled(x, 0.5)
        (grad,) = torch.autograd.grad(output, x, torch.ones_like(x))
        assert torch.equal(grad, (output != 0) * 2.0)
        assert 0 < (output == 0).sum() < output.numel()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastlm.ops.dropout(x).dtype == torch.float32


def test_errors() -> None:
    x = torch.randn(3)
    for wrong in (-0.1, 1.5, math.nan, "a"):
        with pytest.raises(ValueError, match="p: expected a number from 0 to 1, got"):
            fastlm.ops.dropout(x, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        fastlm.ops.dropout([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected a floating-point dtype, got torch\.int64"):
        fastlm.ops.dropout(torch.tensor([1]))


def test_module() -> None:
    module, x = fastlm.nn.Dropout(0.5), torch.randn(100)
    torch.manual_seed(1)
    assert torch.equal(module(x), seeded(x, 0.5))
    assert module.eval()(x) is x
    changed = x.clone()
    assert fastlm.nn.Dropout(0.5, inplace=True)(changed) is changed
    assert (changed == 0).any()
    assert torch.equal(changed[changed != 0], 2 * x[changed != 0])
    assert repr(module) == "Dropout(p=0.5, inplace=False)"
