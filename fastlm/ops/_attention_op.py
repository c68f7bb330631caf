"""The op of attention: its options, ways to call it, shape (fake) functions and autograd."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import _common, reference
from fastlm.ops._attention_checks import NAMES, UNLIMITED, check_dense, check_mask

_forward = torch.ops.fastlm.attention_forward.default
_backward = torch.ops.fastlm.attention_backward.default


class Route(NamedTuple):
    """An op's ways to be called: itself, recorded by autograd at little cost, and in plain operations."""

    op: Callable[..., Any]
    recorded: Callable[..., Any]
    reference: Callable[..., Any]

    def plain(self, *arguments: Any) -> Any:
        """Without a record."""
        return _common.call(self.op, False, *arguments)


class Options(NamedTuple):
    """What follows q, k and v in the op."""

    keep: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    kv_lengths: Tensor | None = None
    q_starts: Tensor | None = None
    k_starts: Tensor | None = None
    seed: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout: float = 0.0
    lower_right: bool = False
    left: int = UNLIMITED
    right: int = UNLIMITED


def are_plain(q: Any, k: Any, v: Any) -> bool:
    """True where nothing but the kernel can be meant, on tensors of 4 dimensions."""
    if k is None or v is None or not _common.is_plain(q, k, v):
        return False
    return q.dim() == 4 and k.dim() == 4 and v.dim() == 4


def module_options(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float
) -> tuple[Options, bool]:
    """For a module's call, whose numbers are right; and whether `are_plain` says so, else q, k and v are checked."""
    plain = are_plain(q, k, v)
    if not plain:
        check_dense((q, k, v), NAMES)
    keep = bias = None
    if mask is not None:
        keep, bias = check_mask(mask, q, (*q.shape[:3], k.shape[2]), NAMES)
    seed = _common.draw_seed() if dropout else None
    right = 0 if causal else UNLIMITED
    return Options(keep, bias, None, None, None, None, seed, scale, 0.0, dropout, False, UNLIMITED, right), plain


def run(route: Route, q: Tensor, k: Tensor, v: Tensor, options: Options, *more: Any, plain: bool) -> tuple[Tensor, ...]:
    """Calls an op; more: what follows its options; plain: what `is_plain` says of q, k and v."""
    bias = options.bias
    if plain and (bias is None or _common.is_plain(q, bias)):
        record = _common.requires_grad(q, k, v, bias)
        return (route.recorded if record else route.plain)(q, k, v, *options, *more)
    (q, k, v, bias), kernel = _common.plan("attention", (q, k, v, bias))
    options = options._replace(bias=bias)
    if not kernel:
        with _common.without_autocast(q):
            return route.reference(q, k, v, *options, *more)
    return _common.call(route.op, _common.requires_grad(q, k, v, bias), q, k, v, *options, *more)


def empty_heads(like: Tensor, width: int | torch.SymInt) -> Tensor:
    """An empty (B, H, T, width), packed (rows, H, width), in memory in the order of like's dimensions."""
    if like.dim() == 3 or like.stride(1) >= like.stride(2):
        return like.new_empty((*like.shape[:-1], width))
    batch, heads, rows, _ = like.shape
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)


@torch.library.register_fake("fastlm::attention_forward")
def forward_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return empty_heads(q, v.shape[-1]), q.new_empty(lse, dtype=_common.compute_dtype(q.dtype))


@torch.library.register_fake("fastlm::attention_backward")
def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    need_bias = options[-1] and bias is not None
    grad_bias = q.new_empty(bias.shape if need_bias else (0,), dtype=_common.compute_dtype(q.dtype))  # type: ignore[union-attr]
    return (*(empty_heads(tensor, tensor.shape[-1]) for tensor in (q, k, v)), grad_bias)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    options = Options(*inputs[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *options[:7], *output)
    ctx.numbers = options[7:]


def autograd_backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, output, lse = ctx.saved_tensors
    q, k, v, *tensors = inputs
    options = Options(*tensors, *ctx.numbers)
    nothing = (None,) * (len(Options._fields) + 3)
    if grad_output is None and grad_lse is None:
        return nothing
    needed = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4])
    if torch.is_grad_enabled():

        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return reference.attention(q, k, v, *options._replace(bias=bias))

        grads = _common.composed_grads(run, (q, k, v, options.bias), (grad_output, grad_lse), needed)
    else:
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        grads = _common.call(_backward, False, grad_output, grad_lse, q, k, v, output, lse, *options, needed[3])
    grad_q, grad_k, grad_v, grad_bias = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    if grad_bias is not None:
        grad_bias = grad_bias.to(q.dtype)
    return (grad_q, grad_k, grad_v, None, grad_bias, *nothing[5:])


torch.library.register_autograd("fastlm::attention_forward", autograd_backward, setup_context=setup_context)
ATTENTION = Route(_forward, _common.recorded(_forward, setup_context, autograd_backward), reference.attention)
