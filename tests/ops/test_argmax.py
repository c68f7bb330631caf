"""The search for the greatest logit: the word that all products give, whatever the values."""

import pytest
import torch
from torch import Tensor

from fastlm import _native
from tests.numerics import kernels_only

pytestmark = kernels_only
SHAPES = [(1, 1), (2, 3), (5, 64), (33, 17), (1000, 100), (3000, 65), (10000, 256), (65, 1030)]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("fp32", "fp64"))


def search(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> list[int]:
    """The words for rows of hidden (N, D)."""
    make = {torch.float32: "ArgmaxFloat32", torch.float64: "ArgmaxFloat64"}[weight.dtype]
    found = getattr(_native.module, make)(*weight.shape, weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    return [found.run(row.data_ptr()) for row in hidden]


def check(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> None:
    """Every word found is the greatest, or as near to it as rounding of the products brings it."""
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    got = logits.gather(1, torch.tensor(search(weight, bias, hidden))[:, None])[:, 0]
    products = hidden.abs().double() @ weight.abs().double().t()
    assert (logits.amax(1) - got <= 4 * torch.finfo(weight.dtype).eps * products.amax(1)).all()


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finds_the_greatest(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    hidden = torch.randn(8, shape[1], dtype=dtype)
    check(weight, bias, hidden)
    check(weight, None, hidden * 1e-20)
    check(weight * 1e12, bias, hidden)
    # Words so alike that eight bits cannot tell them apart.
    check(weight[:1] + 1e-3 * weight, None, hidden)
    # One column beside which the others come to nothing in eight bits.
    check(weight * torch.where(torch.arange(shape[1]) == 0, 1e4, 1.0).to(dtype), bias, hidden)
    check(weight, bias, torch.where(torch.arange(shape[1]) == 0, 1e6 * hidden, hidden))


def test_first_of_equals(isa: str) -> None:
    weight = torch.ones(100, 40)
    assert search(weight, None, torch.randn(3, 40)) == [0, 0, 0]
    assert search(weight, (torch.arange(100) >= 70).float(), torch.randn(1, 40)) == [70]
    assert search(torch.zeros(100, 40), None, torch.zeros(1, 40)) == [0]
    # A bias beside which products are what the sum is rounded by.
    weight = torch.randn(200, 40) * 6e-5
    logits = torch.nn.functional.linear(hidden := torch.randn(50, 40), weight, bias := torch.full((200,), 1000.0))
    assert (logits.amax(1) == logits.gather(1, torch.tensor(search(weight, bias, hidden))[:, None])[:, 0]).all()
    weight = torch.ones(100, 40)
    assert search(weight, torch.full((100,), -torch.inf), torch.randn(1, 40)) == [0]


def test_special_values_as_torch_has_it(isa: str) -> None:
    weight, bias, hidden = torch.randn(200, 40), torch.randn(200), torch.randn(1, 40)
    for value in (torch.nan, torch.inf, -torch.inf):
        for where in ("weight", "bias", "hidden"):
            given = {"weight": weight.clone(), "bias": bias.clone(), "hidden": hidden.clone()}
            given[where].view(-1)[23] = value
            expected = torch.nn.functional.linear(given["hidden"], given["weight"], given["bias"]).argmax()
            assert search(given["weight"], given["bias"], given["hidden"]) == [int(expected)], (where, value)


def test_threads_find_the_same(isa: str) -> None:
    weight, hidden = torch.randn(10001, 96), torch.randn(4, 96)
    weight[5000:] = weight[:5001].clone()  # every word twice: the first one counts
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(search(weight, None, hidden))
    torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]
    assert max(found[0]) < 5000
