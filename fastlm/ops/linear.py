"""The linear layer: torch's, or by the kernels' product where that is faster."""

import torch
from torch import Tensor

from fastlm.ops import _common
from fastlm.ops.gemm import gemm, is_faster, recorded

_VALUES_AT_LEAST = 1 << 15  # of x or weight: a small call would feel what is asked of others


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Drop-in for torch.nn.functional.linear: x weight^T + bias, by the kernels where they take less time.

    That is float32 on CPUs with tile registers (AMX), from 512 rows and 2^26 multiply-adds on, where the products, of
    backward too, take two thirds to nine tenths of torch's time; and on AMD's CPUs with AVX-512, from 2^17 weights on,
    where few rows take half to nine tenths of it, and many six to nine tenths. All else is torch's own, compiled
    graphs as well, and so are errors.

    Args:
        x (Tensor): (..., I).
        weight (Tensor): (O, I), or (I).
        bias (Tensor, optional): (O).

    Returns:
        output (Tensor): (..., O), of x's dtype.

    Numerics: with AMX floats are three bfloat16 each, of whose nine products the six largest are summed in float32; the
    error is 0.4 to 1.2 times that of torch. Henry, Tang & Heinecke 2019 (arXiv:1904.06376).
    """
    if not _takes(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if _common.requires_grad(x, weight, bias):
        output: Tensor = recorded(rows, weight, False, True, bias)  # type: ignore[assignment]
    else:
        output = gemm(rows, weight, False, True, bias)
    return output.view(*x.shape[:-1], weight.shape[0])


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels' product is faster; False for whatever torch would refuse."""
    if (
        torch.compiler.is_compiling()  # where sizes may be symbols
        or type(x) not in _common.PLAIN_TYPES
        or type(weight) not in _common.PLAIN_TYPES
        or max(x.numel(), weight.numel()) < _VALUES_AT_LEAST
        or not x.dtype == weight.dtype == torch.float32
        or weight.dim() != 2
        or x.dim() < 2
        or x.shape[-1] != weight.shape[1]
        or not (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
    ):
        return False
    n, k = weight.shape
    return (
        is_faster(x.numel() // max(1, k), n, k, False, True, _common.requires_grad(x, weight, bias))
        and weight.is_contiguous()  # a copy would cost few rows more than they gain
        and _common.is_plain(x, weight, bias)
    )
