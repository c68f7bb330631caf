"""The product under the kernels as an operator of its own, with its derivatives."""

from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm.ops import _common

_gemm = torch.ops.fastlm.gemm.default
_MULTIPLY_ADDS_AT_LEAST = 1 << 26  # to be recorded: fewer are over before what surrounds them


@torch.library.register_fake("fastlm::gemm")
def _fake(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.transpose_a, ctx.transpose_b = inputs[:4]
    ctx.save_for_backward(a, b)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    needs_a, needs_b, _, _, needs_bias = (*ctx.needs_input_grad, False)[:5]
    across_a, across_b = ctx.transpose_a, ctx.transpose_b
    grad_a = grad_b = None
    if needs_a:
        grad_a = product(b, grad, across_b, True) if across_a else product(grad, b, False, not across_b)
    if needs_b:
        grad_b = product(grad, a, True, across_a) if across_b else product(a, grad, not across_a, False)
    return grad_a, grad_b, None, None, grad.sum(0) if needs_bias else None


torch.library.register_autograd("fastlm::gemm", _autograd_backward, setup_context=_setup_context)
recorded = _common.recorded(_gemm, _setup_context, _autograd_backward)


def gemm(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, bias: Tensor | None = None) -> Tensor:
    """A (M, K) B (K, N) + bias (N), either of them transposed in memory where its flag says so; no derivatives."""
    return _common.call(_gemm, False, a, b, transpose_a, transpose_b, bias)


def is_faster(m: int, n: int, k: int, transpose_a: bool, transpose_b: bool, is_recorded: bool) -> bool:
    """True where products of float32 (m, k) and (k, n) take less time here than in torch, a record of them included."""
    if _native.module is None or (is_recorded and m * n * k < _MULTIPLY_ADDS_AT_LEAST):
        return False
    return bool(_native.module.product_is_faster(m, n, k, transpose_a, transpose_b))


def product(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    """The same by whichever is faster, with derivatives."""
    m, k = reversed(a.shape) if transpose_a else a.shape
    n = b.shape[0 if transpose_b else 1]
    is_recorded = _common.requires_grad(a, b)
    if (
        _common.is_plain(a, b)
        and a.dtype == torch.float32
        and is_faster(m, n, k, transpose_a, transpose_b, is_recorded)
    ):
        return _common.call(_gemm, is_recorded, a, b, transpose_a, transpose_b, None)
    return (a.mT if transpose_a else a) @ (b.mT if transpose_b else b)
