"""The linear layer: torch's, or by the kernels' product where that is faster."""

import torch
from torch import Tensor

from fastlm.ops import _common
from fastlm.ops.gemm import ROWS_AT_LEAST, gemm, is_faster, recorded


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Drop-in for torch.nn.functional.linear: x weight^T + bias, by the kernels where they take less time.

    That is float32 on CPUs with tile registers (AMX), from 512 rows and 2^26 multiply-adds on; there the products, of
    backward too, take two thirds to nine tenths of torch's time. All else is torch's own, compiled graphs as well, and
    so are errors.

    Args:
        x (Tensor): (..., I).
        weight (Tensor): (O, I), or (I).
        bias (Tensor, optional): (O).

    Returns:
        output (Tensor): (..., O), of x's dtype.

    Numerics: floats are three bfloat16 each, of whose nine products the six largest are summed in float32; the error is
    0.4 to 1.2 times that of torch. Henry, Tang & Heinecke 2019 (arXiv:1904.06376).
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
    return (
        not torch.compiler.is_compiling()  # where sizes may be symbols
        and type(x) in _common.PLAIN_TYPES
        and type(weight) in _common.PLAIN_TYPES
        and x.numel() >= ROWS_AT_LEAST  # a step's call would feel what follows
        and _common.is_plain(x, weight, bias)
        and x.dtype == weight.dtype == torch.float32
        and weight.dim() == 2
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and is_faster(x.numel() // max(1, x.shape[-1]), *weight.shape)
    )
