"""The op of attention: its options, ways to call it, shape (fake) functions and autograd."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import _common, reference
from fastlm.ops._attention_checks import NAMES, as_keep_or_bias, check_dense, check_dropout, check_mask
from fastlm.ops._attention_options import UNLIMITED, Options

_forward = torch.ops.fastlm.attention_forward.default
_backward = torch.ops.fastlm.attention_backward.default


class Route(NamedTuple):
    """An op's ways to be called: itself, at little cost without and with a record, and in plain operations."""

    op: Callable[..., Any]
    unrecorded: Callable[..., Any]
    recorded: Callable[..., Any]
    reference: Callable[..., Any]

    @classmethod
    def register(
        cls, op: Any, setup_context: Callable[..., None], backward: Callable[..., Any], reference: Callable[..., Any]
    ) -> "Route":
        """With its derivative, which torch is told of."""
        torch.library.register_autograd(op.name(), backward, setup_context=setup_context)
        return cls(op, _common.unrecorded(op), _common.recorded(op, setup_context, backward), reference)


def are_plain(q: Any, k: Any, v: Any, mask: Any = None) -> bool:
    """True where nothing but the kernel can be meant, on tensors of 4 dimensions and a mask that it can read."""
    if k is None or v is None or not _common.is_plain(q, k, v, mask):
        return False
    if mask is not None and mask.dtype != torch.bool and mask.dtype != q.dtype:
        return False
    return q.dim() == 4 and k.dim() == 4 and v.dim() == 4


def run_module(
    route: Route,
    lead: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> tuple[Tensor, ...]:
    """`run` with options as a module has them."""
    plain = are_plain(q, k, v, mask)  # the op then checks these itself
    right = 0 if causal else UNLIMITED
    if plain and not dropout and not _common.requires_grad(q, k, v, mask):
        try:
            return route.unrecorded(q, k, v, *lead, scale, right, *(() if mask is None else as_keep_or_bias(mask)))
        except (RuntimeError, ValueError):
            pass  # what follows says it by the argument's name
    if not plain:
        check_dense((q, k, v), NAMES)
    check_dropout("dropout", dropout)
    keep, bias = check_mask(mask, q, (*q.shape[:3], k.shape[2]), NAMES)
    seed = _common.draw_seed() if dropout else None
    options = Options(scale, right, keep, bias, seed=seed, dropout=dropout)
    return run(route, lead, q, k, v, options, plain=plain)


def run(
    route: Route, lead: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, options: Options, *, plain: bool
) -> tuple[Tensor, ...]:
    """Calls an op; lead: what comes before its options; plain: what `is_plain` says of q, k and v."""
    bias = options.bias
    if plain and (bias is None or _common.is_plain(q, bias)):
        record = _common.requires_grad(q, k, v, bias)
        return (route.recorded if record else route.unrecorded)(q, k, v, *lead, *options)
    (q, k, v, bias), kernel = _common.plan("attention", (q, k, v, bias))
    options = options._replace(bias=bias)
    if not kernel:
        with _common.without_autocast(q):
            return route.reference(q, k, v, *lead, *options)
    return _common.call(route.op, _common.requires_grad(q, k, v, bias), q, k, v, *lead, *options)


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
    *given: Any,
) -> tuple[Tensor, ...]:
    options, need_bias = Options.split_last(given)
    bias = options.bias if need_bias else None
    grad_bias = q.new_empty((0,) if bias is None else bias.shape, dtype=_common.compute_dtype(q.dtype))
    return (*(empty_heads(tensor, tensor.shape[-1]) for tensor in (q, k, v)), grad_bias)


_TENSORS = slice(Options._fields.index("keep"), Options._fields.index("seed") + 1)
_BIAS = 3 + Options._fields.index("bias")  # among arguments of `attention_forward`


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], lead: int = 0) -> None:
    """lead: how many arguments come before the options."""
    options, ctx.bias_place = inputs[3 + lead :], _BIAS + lead
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *options[_TENSORS], *output)
    ctx.before, ctx.after = options[: _TENSORS.start], options[_TENSORS.stop :]


Saved = tuple[Tensor, Tensor, Tensor, Options, Tensor, Tensor]  # q, k, v, the options, output and lse


def saved(ctx: Any) -> Saved:
    q, k, v, *tensors, output, lse = ctx.saved_tensors
    return q, k, v, Options(*ctx.before, *tensors, *ctx.after), output, lse


def needs_bias(ctx: Any, options: Options) -> bool:
    """Whether the bias needs a gradient; where there is none, its place may lack in a call by defaults."""
    return options.bias is not None and ctx.needs_input_grad[ctx.bias_place]


def autograd_backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    return grads_by_output(ctx, saved(ctx), grad_output, grad_lse)


def grads_by_output(ctx: Any, of: Saved, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """Of all inputs, from what was saved: a checkpoint lets it be unpacked once."""
    q, k, v, options, output, lse = of
    if grad_output is None and grad_lse is None:
        return grads_of_inputs()
    needed = (*ctx.needs_input_grad[:3], needs_bias(ctx, options))
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
    return grads_of_inputs(grad_q, grad_k, grad_v, grad_bias)


def grads_of_inputs(
    grad_q: Tensor | None = None,
    grad_k: Tensor | None = None,
    grad_v: Tensor | None = None,
    grad_bias: Tensor | None = None,
) -> tuple[Any, ...]:
    """In the order of the op's arguments."""
    grads = [grad_q, grad_k, grad_v, *(None,) * len(Options._fields)]
    grads[_BIAS] = grad_bias
    return tuple(grads)


ATTENTION = Route.register(_forward, setup_context, autograd_backward, reference.attention)
