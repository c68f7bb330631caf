"""The product under the recurrent kernels as an operator of its own; no derivatives."""

import torch
from torch import Tensor, nn

from fastlm.ops import _common

_gemm = torch.ops.fastlm.gemm.default


@torch.library.register_fake("fastlm::gemm")
def _fake(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) for rows x (..., in_features), by the product where nothing asks for gradients.

    A large result then lies in huge pages; torch's spends a third of the time on getting its memory.
    """
    if not _is_plain(layer, x):
        return layer(x)
    rows = x.reshape(-1, layer.in_features)
    result = _common.call(_gemm, False, rows, layer.weight, False, True, layer.bias)
    return result.view(*x.shape[:-1], layer.out_features)


def is_linear(layer: nn.Module) -> bool:
    """True where weight and bias are all that a call of the layer does: no adapter around it, no hook."""
    plain = type(layer).forward is nn.Linear.forward
    return plain and not (layer._forward_hooks or layer._forward_pre_hooks)


def _is_plain(layer: nn.Linear, x: Tensor) -> bool:
    return (
        type(layer) is nn.Linear  # not parametrised: its weight is read several times
        and is_linear(layer)
        and _common.is_plain(x, layer.weight, layer.bias)
        and x.shape[-1:] == (layer.in_features,)
        and x.dtype == layer.weight.dtype != torch.bfloat16
        and not _common.requires_grad(x, layer.weight, layer.bias)
    )
