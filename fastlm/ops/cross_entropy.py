"""The output layer of a language model with its loss: public function, shape (fake) functions and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common, reference

_forward = torch.ops.fastlm.linear_cross_entropy_forward.default
_backward = torch.ops.fastlm.linear_cross_entropy_backward.default
_unrecorded = _common.unrecorded(_forward)
_REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(hidden, weight, bias), target), without ever holding all logits.

    Drop-in for torch.nn.functional.linear followed by cross_entropy, with class indices as target. For "mean" and
    "sum" the gradients are formed together with the loss, where some input requires one; for "none" backward computes
    the logits again.

    Args:
        hidden (Tensor): (..., D); float32, float64 or bfloat16.
        weight (Tensor): (V, D), one row per word of the vocabulary.
        target (Tensor): (...), the leading shape of hidden, integers: 0 to V - 1 or ignore_index.
        bias (Tensor, optional): (V,). Default: None.
        ignore_index (int): target of rows that do not count: no loss, no gradient, no work. Default: -100.
        reduction (str): "mean" over the rows that count, "sum" or "none". Default: "mean".
        label_smoothing (float): in [0, 1], weight of the uniform distribution in the target. Default: 0.

    Returns:
        loss (Tensor): (), or (...) for "none", in nats; float32 for bfloat16 (its three digits are too few for a loss).
            The mean over no rows is NaN, as in torch, with gradients of zero.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a target is out of range, or a number is (the message names the
            argument, expected and got).
        TypeError: an argument has the wrong type.

    Numerics: products and sums in float32 for bfloat16. Error against a float64 reference at most 2x (gradients 3x)
    that of torch's, plus rounding. Results do not depend on the number of threads. Subnormal numbers count as zero.
    Extra memory: the logits of some rows, 40 MiB, with 80,000 to 160,000 words 80 MiB, and hidden's gradient over 256
    rows 16 times at most, fewer with few threads, or, with up to 512 words, weight's gradient 16 times; bfloat16: also
    weight's gradient in float32.
    Blocks of logits: Wijmans et al. 2024 (arXiv:2411.09009).
    """
    options = (ignore_index, reduction, label_smoothing)
    if _is_plain(hidden, weight, target, bias) and _are_plain(*options):
        try:
            return _run(hidden, weight, bias, target, *options)
        except (RuntimeError, ValueError):
            _check(hidden, weight, target, bias, *options)  # says it by the argument's name
            raise
    _check(hidden, weight, target, bias, *options)
    rows = hidden.reshape(target.numel(), hidden.shape[-1])
    classes = target.reshape(-1).to(torch.int64)
    (rows, weight, bias), kernel = _common.plan("linear_cross_entropy", (rows, weight, bias))
    if kernel:
        loss = _run(rows, weight, bias, classes, ignore_index, reduction, float(label_smoothing))
    else:
        with _common.without_autocast(rows):
            loss = reference.linear_cross_entropy(
                rows, weight, classes, bias, ignore_index, reduction, float(label_smoothing)
            )
    return loss.view(target.shape) if reduction == "none" else loss


def _is_plain(hidden: Any, weight: Any, target: Any, bias: Any) -> bool:
    """True where nothing but the kernel can be meant, on rows as the op takes them."""
    return (
        _common.is_plain(hidden, weight, target, bias)
        and weight is not None
        and target is not None
        and hidden.dim() == 2
        and target.dtype == torch.int64
    )


def _are_plain(ignore_index: Any, reduction: Any, label_smoothing: Any) -> bool:
    """True where the options are of the types that the op takes, and in range."""
    numbers = type(ignore_index) is int and type(label_smoothing) is float
    return numbers and reduction in _REDUCTIONS and 0.0 <= label_smoothing <= 1.0


def _run(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """The kernel, of rows (R, D) and classes (R,)."""
    needed = (_common.requires_grad(rows), _common.requires_grad(weight), _common.requires_grad(bias))
    run = _forward if torch.compiler.is_compiling() else _recorded if True in needed else _unrecorded
    in_forward = (False,) * 3 if reduction == "none" else needed
    return run(rows, weight, bias, classes, ignore_index, label_smoothing, _REDUCTIONS.index(reduction), *in_forward)[0]


def _check(
    hidden: Any, weight: Any, target: Any, bias: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> None:
    _common.check_same({"hidden": hidden, "weight": weight, "bias": bias}, optional=("bias",))
    if hidden.dim() == 0:
        raise ValueError("hidden: expected at least 1 dimension (..., D), got shape ()")
    if weight.dim() == 2 and weight.shape[0] == 0:
        raise ValueError("weight: expected at least one row (V >= 1), got shape " + str(tuple(weight.shape)))
    _common.check_shape("weight", weight, ("V", hidden.shape[-1]), "(V, D)")
    if bias is not None:
        _common.check_shape("bias", bias, (weight.shape[0],), "(V,)")
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target: expected an integer dtype (class indices), got {target.dtype}")
    _common.check_shape("target", target, tuple(hidden.shape[:-1]), "(...), the leading shape of hidden,")
    if target.device != hidden.device:
        raise ValueError(f"target: expected device {hidden.device} (that of hidden), got {target.device}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")


@torch.library.register_fake("fastlm::linear_cross_entropy_forward")
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    *needed: bool,
) -> tuple[Tensor, ...]:
    dtype = _common.compute_dtype(hidden.dtype)
    rows = hidden.shape[0]
    loss = hidden.new_empty((rows,) if reduction == 0 else (), dtype=dtype)
    return (loss, hidden.new_empty((2, rows), dtype=dtype), *_empty_grads(hidden, weight, needed))


@torch.library.register_fake("fastlm::linear_cross_entropy_backward")
def _backward_fake(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    *needed: bool,
) -> tuple[Tensor, ...]:
    return _empty_grads(hidden, weight, needed)


def _empty_grads(hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.reduction = inputs[:7]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.formed = inputs[7:]


def _autograd_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    hidden, weight, bias, target, statistics, *grads = ctx.saved_tensors
    rest = (None,) * 7
    if grad_loss is None:
        return (None, None, None, *rest)
    needed = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        options = (ctx.ignore_index, _REDUCTIONS[ctx.reduction], ctx.label_smoothing)

        def run(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
            return (reference.linear_cross_entropy(hidden, weight, target, bias, *options),)

        return (*_common.composed_grads(run, (hidden, weight, bias), (grad_loss,), needed), *rest)
    if all(formed or not need for formed, need in zip(ctx.formed, needed, strict=True)):
        grads = [_scaled(grad, grad_loss) if need else None for grad, need in zip(grads, needed, strict=True)]
    else:
        losses = grad_loss.expand(target.shape)
        if ctx.reduction == 1:
            losses = losses / (target != ctx.ignore_index).sum()
        numbers = (ctx.ignore_index, ctx.label_smoothing)
        grads = _common.call(
            _backward, False, losses.contiguous(), hidden, weight, bias, target, statistics, *numbers, *needed
        )
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *rest)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """A formed gradient times what arrives, which mostly is 1."""
    if type(factor) is Tensor and not torch.compiler.is_compiling():  # a subclass may have no value
        try:
            if factor == 1:  # kept for another backward, it is not to be the caller's
                return grad.clone() if _keeps_graph() else grad
        except RuntimeError:
            pass  # nor has a batch of them, or a meta tensor
    return (grad * factor).to(grad.dtype)


torch.library.register_autograd(
    "fastlm::linear_cross_entropy_forward", _autograd_backward, setup_context=_setup_context
)
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_recorded = _common.recorded(_forward, _setup_context, _autograd_backward)
