"""A torch.nn.Linear within a model by the kernels' product."""

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.linear import Linear
from fastlm.ops import _common
from fastlm.ops.gemm import gemm


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) by `ops.linear`, unless its call does more."""
    return ops.linear(x, layer.weight, layer.bias) if is_linear(layer) else layer(x)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) of an output layer for rows x (..., in_features), by the product where nothing asks for gradients.

    A large result then lies in huge pages; torch's spends a third of the time on getting its memory.
    """
    if not _is_plain(layer, x):
        return layer(x)
    rows = x.reshape(-1, layer.in_features)
    result = gemm(rows, layer.weight, False, True, layer.bias)
    return result.view(*x.shape[:-1], layer.out_features)


def is_linear(layer: nn.Module) -> bool:
    """True where weight and bias are all that a call of the layer does: no adapter around it, no hook."""
    plain = type(layer).forward in (nn.Linear.forward, Linear.forward)
    return plain and not (layer._forward_hooks or layer._forward_pre_hooks)


def _is_plain(layer: nn.Linear, x: Tensor) -> bool:
    return (
        type(layer) in (nn.Linear, Linear)  # not parametrised: its weight is read several times
        and is_linear(layer)
        and _common.is_plain(x, layer.weight, layer.bias)
        and x.shape[-1:] == (layer.in_features,)
        and x.dtype == layer.weight.dtype != torch.bfloat16
        and not _common.requires_grad(x, layer.weight, layer.bias)
    )
