"""Dropout: public function, shape (fake) function and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common, reference

_op = torch.ops.fastlm.dropout.default
_unrecorded = _common.unrecorded(_op)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Drop-in for torch.nn.functional.dropout, whose random numbers take longer than many a layer around it.

    Args:
        x (Tensor): any shape; float32, float64 or bfloat16.
        p (float): probability of a value to be dropped, in [0, 1]. Default: 0.5.
        training (bool): False gives x itself. Default: True.

    Returns:
        output (Tensor): 0 with probability p, else x / (1 - p); of x's shape, in memory as x where that is dense.

    Raises:
        ValueError: p is no probability, or x has no floating-point dtype.
        TypeError: x is no Tensor.

    torch's generator gives a seed, so that torch.manual_seed rules; which values are dropped is worked out from it and
    a value's place, in forward and again in backward, and no mask is kept. They are others than torch drops.
    Srivastava et al. 2014 (jmlr.org/papers/v15/srivastava14a.html).
    """
    if not isinstance(p, int | float) or not 0 <= p <= 1:
        raise ValueError(f"p: expected a number from 0 to 1, got {p!r}")
    plain = _common.is_plain(x)
    if not plain:
        _common.check_same({"x": x})
    if not training or p == 0:
        return x
    order = _order_in_memory(x)
    if order is not None:
        dropped = _run(x.permute(order), _common.draw_seed(), float(p), plain)
        return dropped.permute([order.index(dim) for dim in range(len(order))])
    return _run(x, _common.draw_seed(), float(p), plain)


def _order_in_memory(x: Tensor) -> list[int] | None:
    """The dimensions from the outermost in memory on, where x is dense in another order than its own."""
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return order if x.permute(order).is_contiguous() else None


def _run(x: Tensor, seed: Tensor, p: float, plain: bool) -> Tensor:
    if plain:
        return (_recorded if _common.requires_grad(x) else _unrecorded)(x, seed, p)  # type: ignore[return-value]
    # As torch's own it keeps its input's dtype under autocast.
    with _common.without_autocast(x):
        _, kernel = _common.plan("dropout", (x,))
        return _common.call(_op, _common.requires_grad(x), x, seed, p) if kernel else reference.dropout(x, seed, p)


@torch.library.register_fake("fastlm::dropout")
def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _autograd_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return _run(grad_output, seed, ctx.p, _common.is_plain(grad_output)), None, None


torch.library.register_autograd("fastlm::dropout", _autograd_backward, setup_context=_setup_context)
_recorded = _common.recorded(_op, _setup_context, _autograd_backward)
