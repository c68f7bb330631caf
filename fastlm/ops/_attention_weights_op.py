"""The op of attention that also gives its weights, as torch.nn.MultiheadAttention does by default."""

from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common, reference
from fastlm.ops._attention_op import (
    Route,
    Saved,
    forward_fake,
    grads_by_output,
    grads_of_inputs,
    needs_bias,
    saved,
    setup_context,
)

_forward = torch.ops.fastlm.attention_weights_forward.default
_Grads = tuple[Tensor | None, ...]


@torch.library.register_fake("fastlm::attention_weights_forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, average: bool, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads = () if average else (q.shape[1],)
    weights = q.new_empty((q.shape[0], *heads, q.shape[2], k.shape[2]))
    return *forward_fake(q, k, v), weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    setup_context(ctx, inputs, output[:2], lead=1)
    ctx.average = inputs[3]


def _autograd_backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, grad_weights: Tensor | None
) -> _Grads:
    of = saved(ctx)
    grads = grads_by_output(ctx, of, grad_output, grad_lse)
    if grad_weights is not None:
        pairs = zip(grads, _grads_by_weights(ctx, of, grad_weights), strict=True)
        grads = tuple(a if b is None else b if a is None else a + b for a, b in pairs)
    return (*grads[:3], None, *grads[3:])


def _grads_by_weights(ctx: Any, of: Saved, grad_weights: Tensor) -> _Grads:
    """Of all inputs but `average`, in plain operations: few train on weights."""
    q, k, v, options, _, _ = of

    def run(q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        made = reference.attention_with_weights(q, k, v.detach(), ctx.average, *options._replace(bias=bias))
        return made[2:]

    needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], needs_bias(ctx, options))
    grad_q, grad_k, grad_bias = _common.composed_grads(run, (q, k, options.bias), (grad_weights,), needed)
    return grads_of_inputs(grad_q, grad_k, None, grad_bias)


ATTENTION_WITH_WEIGHTS = Route.register(_forward, _setup_context, _autograd_backward, reference.attention_with_weights)
