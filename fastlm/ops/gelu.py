"""GELU by tanh: public function, shape (fake) functions and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common, reference

_forward = torch.ops.fastlm.gelu_forward.default
_backward = torch.ops.fastlm.gelu_backward.default
_unrecorded = _common.unrecorded(_forward)


def gelu(x: Tensor) -> Tensor:
    """Drop-in for torch.nn.functional.gelu(x, approximate="tanh"), GPT-2's activation.

    Args:
        x (Tensor): any shape; float32, float64 or bfloat16.

    Returns:
        output (Tensor): x sigmoid(2 u) = x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), of x's shape,
            dense.

    Raises:
        ValueError: x has no floating-point dtype.
        TypeError: x is no Tensor.

    Numerics: float32 for bfloat16. All digits are kept where the result is small, which the form with tanh loses.
    Hendrycks & Gimpel 2016 (arXiv:1606.08415).
    """
    if _common.is_plain(x):
        return (_recorded if _common.requires_grad(x) else _unrecorded)(x)  # type: ignore[return-value]
    _common.check_same({"x": x})
    # As torch's own it keeps its input's dtype under autocast.
    with _common.without_autocast(x):
        _, kernel = _common.plan("gelu", (x,))
        return _common.call(_forward, _common.requires_grad(x), x) if kernel else reference.gelu(x)


@torch.library.register_fake("fastlm::gelu_forward")
def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastlm::gelu_backward")
def _backward_fake(grad_output: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx: Any, grad_output: Tensor) -> Tensor | None:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _common.composed_grads(lambda x: (reference.gelu(x),), (x,), (grad_output,), (True,))[0]
    return _common.call(_backward, False, grad_output, x)


torch.library.register_autograd("fastlm::gelu_forward", _autograd_backward, setup_context=_setup_context)
_recorded = _common.recorded(_forward, _setup_context, _autograd_backward)
