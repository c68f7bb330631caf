"""The product kernel: every transpose form, odd sizes, both dtypes, every ISA."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.nn import _linear
from fastlm.nn._linear import linear
from tests.numerics import check, kernels_only

# (m, n, k): around tile and panel edges, skinny in each dimension, deep enough for several blocks of k.
SHAPES = (
    *((m, n, k) for m, n, k in zip((1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100),
                                   (33, 63, 64, 65, 100, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31),
                                   (9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 1, 2, 3, 7, 8), strict=True)),
    (1, 768, 256), (768, 1, 256), (256, 256, 1), (5, 3, 2000), (130, 96, 700),
    (13, 70, 300), (24, 65, 257), (40, 13, 129), (48, 64, 96), (49, 71, 40), (96, 77, 130), (97, 10, 20),
)  # fmt: skip
FORMS = list(product((False, True), repeat=2))


def operands(m: int, n: int, k: int, form: tuple[bool, bool], make) -> tuple[Tensor, Tensor]:
    transpose_a, transpose_b = form
    return make(*((k, m) if transpose_a else (m, k))), make(*((n, k) if transpose_b else (k, n)))


def form_id(form: tuple[bool, bool]) -> str:
    return "".join("T" if transposed else "N" for transposed in form)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_product(isa: str, shape: tuple[int, int, int], form: tuple[bool, bool]) -> None:
    for dtype in (torch.float32, torch.float64):
        a, b = operands(*shape, form, lambda *size: torch.randn(size, dtype=dtype))  # noqa: B023
        op_a, op_b = (t.mT if transposed else t for t, transposed in zip((a, b), form, strict=True))
        # Extended precision judges both dtypes; numpy's is slow, so the deeper sizes stay few.
        truth = op_a.numpy().astype(np.longdouble) @ op_b.numpy().astype(np.longdouble)
        got = torch.ops.fastlm.gemm(a, b, *form)
        check(f"gemm {dtype}", got, op_a @ op_b, torch.from_numpy(truth.astype(np.float64)))
        bias = torch.randn(shape[1], dtype=dtype)
        got = torch.ops.fastlm.gemm(a, b, *form, bias)
        truth = truth + bias.numpy()
        check(f"gemm {dtype} bias", got, op_a @ op_b + bias, torch.from_numpy(truth.astype(np.float64)))


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_small_integers_are_exact(isa: str, form: tuple[bool, bool]) -> None:
    for (m, n, k), dtype in product(((37, 50, 300), (1, 200, 77), (200, 3, 77)), (torch.float32, torch.float64)):
        a, b = operands(m, n, k, form, lambda *size: torch.randint(-8, 9, size).to(dtype))  # noqa: B023
        op_a, op_b = (t.long().mT if transposed else t.long() for t, transposed in zip((a, b), form, strict=True))
        assert torch.equal(torch.ops.fastlm.gemm(a, b, *form), (op_a @ op_b).to(dtype))


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_empty(isa: str, form: tuple[bool, bool]) -> None:
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        a, b = operands(m, n, k, form, torch.ones)
        assert torch.equal(torch.ops.fastlm.gemm(a, b, *form), torch.zeros(m, n))
        bias = torch.randn(n)
        assert torch.equal(torch.ops.fastlm.gemm(a, b, *form, bias), bias.expand(m, n))


@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row_and_column(isa: str, form: tuple[bool, bool], value: float) -> None:
    """Padding of tiles must not multiply a neighbour's infinity by zero."""
    for m, n, k in ((5, 7, 3), (33, 17, 65)):
        a, b = operands(m, n, k, form, torch.ones)
        (a.mT if form[0] else a)[2, 1] = value
        expected = torch.full((m, n), float(k))
        expected[2] = value
        assert torch.equal(torch.ops.fastlm.gemm(a, b, *form).nan_to_num(-1), expected.nan_to_num(-1))


@kernels_only
def test_linear_is_the_product_where_nothing_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the product, else the layer."""
    calls: list[bool] = []
    product = _linear.gemm
    monkeypatch.setattr(_linear, "gemm", lambda *args: calls.append(True) or product(*args))
    layer, x = torch.nn.Linear(19, 37), torch.randn(2, 5, 19)
    truth = copy.deepcopy(layer).double()(x.double()).detach()

    with torch.no_grad():
        for rows in (x, x.transpose(0, 1), x[:, :0], x[0, 0]):
            got = linear(layer, rows)
            assert got.shape == layer(rows).shape
            assert got.is_contiguous()
        check("linear", linear(layer, x), layer(x), truth)
    layer.requires_grad_(False)
    check("frozen", linear(layer, x), layer(x), truth)
    assert len(calls) == 6

    assert linear(layer.requires_grad_(), x).requires_grad
    with torch.no_grad(), fastlm.backend("reference"):
        check("reference", linear(layer, x), layer(x), truth)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16
    for wrong in (x[..., 1:], x.flatten(1)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(layer, wrong)
    with torch.no_grad():
        assert linear(copy.deepcopy(layer).bfloat16(), x.bfloat16()).dtype == torch.bfloat16
        assert linear(copy.deepcopy(layer).to("meta"), x.to("meta")).shape == (2, 5, 37)
        layer.register_forward_hook(lambda *_: torch.zeros(1))
        assert linear(layer, x).shape == (1,)
    assert len(calls) == 6
