"""GRU operators: public functions, shape (fake) functions and autograd."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common, reference

_forward = torch.ops.fastlm.gru_forward.default
_backward = torch.ops.fastlm.gru_backward.default
_forward_plain = partial(_common.call, _forward, False)


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer and direction over a whole sequence (Cho et al. 2014, arXiv:1406.1078v1; torch.nn.GRU equations).

    Args:
        x (Tensor): input, (T, B, I), T >= 1; float32 or float64 for the kernels, bfloat16 is computed in float32.
        h0 (Tensor, optional): initial state, (B, H), dtype of x. None: zeros.
        w_ih (Tensor): input weights, (3H, I), gate order r, z, n.
        w_hh (Tensor): recurrent weights, (3H, H).
        b_ih (Tensor, optional): (3H,). Default: None.
        b_hh (Tensor, optional): (3H,), its n part inside the reset gate's product. Default: None.
        reverse (bool): run t = T-1 .. 0. Default: False.

    Returns:
        output (Tensor): (T, B, H), the state after every step, at the step's own place.
        h_n (Tensor): (B, H), the last state, a copy.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or T == 0 (the message names the argument, expected and got).

    Numerics: accumulates in the input's dtype (float32 for bfloat16). Error against a float64 reference at most 2x
    (gradients 3x) that of torch.nn.GRU, plus rounding. Results do not depend on the number of threads.
    Differentiable in every tensor, any number of times.
    """
    if _common.is_plain(x, h0, w_ih, w_hh, b_ih, b_hh):
        record = _common.requires_grad(x, h0, w_ih, w_hh, b_ih, b_hh)
        try:
            run = _recorded if record else _forward_plain
            output, h_n, _ = run(x, h0, w_ih, w_hh, b_ih, b_hh, reverse, record)
            return output, h_n
        except (RuntimeError, ValueError):
            _check(x, h0, w_ih, w_hh, b_ih, b_hh)  # says it by the argument's name
            raise
    _check(x, h0, w_ih, w_hh, b_ih, b_hh)
    tensors, kernel, dtype = _common.plan("gru", (x, h0, w_ih, w_hh, b_ih, b_hh))
    if not kernel:
        return reference.gru(*tensors, reverse=reverse)
    record = _common.requires_grad(*tensors)
    output, h_n, _ = _common.call(_forward, record, *tensors, reverse, record)
    return (output, h_n) if output.dtype == dtype else (output.to(dtype), h_n.to(dtype))


def _check(x: object, h0: object, w_ih: object, w_hh: object, b_ih: object, b_hh: object) -> None:
    _common.check_recurrent(3, {"x": x, "h0": h0, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh})


def gru_cell(
    x: Tensor, h: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One GRU step: x (B, I), h (B, H) or None for zeros -> new h (B, H). Else as `gru`, of which it is the case T = 1.

    Raises:
        ValueError: shapes, dtypes or devices disagree (the message names the argument, expected and got).
    """
    _common.check_step_input(x)
    return gru(x.unsqueeze(0), h, w_ih, w_hh, b_ih, b_hh)[1]


@torch.library.register_fake("fastlm::gru_forward")
def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    reserve = x.new_empty((seq_len, batch, 5 * hidden) if save else (0,))
    return x.new_empty(seq_len, batch, hidden), x.new_empty(batch, hidden), reserve


@torch.library.register_fake("fastlm::gru_backward")
def _backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    reserve: Tensor,
    reverse: bool,
    need_x: bool,
    need_h0: bool,
    need_weights: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    hidden = w_hh.shape[1]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((x.shape[1], hidden) if need_h0 else (0,)),
        x.new_empty(w_ih.shape if need_weights else (0,)),
        x.new_empty(w_hh.shape if need_weights else (0,)),
        x.new_empty((3 * hidden,) if need_bias else (0,)),
        x.new_empty((3 * hidden,) if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, w_ih, w_hh, b_ih, b_hh, ctx.reverse, ctx.save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, w_ih, w_hh, b_ih, b_hh, output[2])
    ctx.mark_non_differentiable(output[2])


def _autograd_backward(ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, _: None) -> tuple[Any, ...]:
    x, h0, w_ih, w_hh, b_ih, b_hh, reserve = ctx.saved_tensors
    if grad_output is None and grad_h_n is None:
        return (None,) * 8
    inputs = (x, h0, w_ih, w_hh, b_ih, b_hh)
    needed = ctx.needs_input_grad[:6]
    if torch.is_grad_enabled() or not ctx.save:
        outputs = _common.recompute(lambda: reference.gru(*inputs, reverse=ctx.reverse))
        return (*_common.composed_grads(outputs, (grad_output, grad_h_n), inputs, needed), None, None)
    need_x, need_h0, *need_weights = needed
    grads = _common.call(
        _backward,
        False,
        _common.contiguous_or_none(grad_output),
        _common.contiguous_or_none(grad_h_n),
        x,
        w_ih,
        w_hh,
        reserve,
        ctx.reverse,
        need_x,
        need_h0,
        any(need_weights[:2]),
        any(need_weights[2:]),
    )
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)


torch.library.register_autograd("fastlm::gru_forward", _autograd_backward, setup_context=_setup_context)
_recorded = _common.recorded(_forward, _setup_context, _autograd_backward)
