"""LSTM operators: public functions, shape (fake) functions and autograd."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm import _backend, _trace
from fastlm.ops import _common, reference

_forward = torch.ops.fastlm.lstm_forward.default
_backward = torch.ops.fastlm.lstm_backward.default
_forward_plain = partial(_common.call, _forward, False)


def lstm(
    x: Tensor,
    state: tuple[Tensor | None, Tensor | None],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer and direction over a whole sequence (Hochreiter and Schmidhuber 1997; torch.nn.LSTM equations).

    Args:
        x (Tensor): input, (T, B, I), T >= 1; float32 or float64 for the kernels, bfloat16 is computed in float32.
        state (tuple): (h0, c0), (B, H) each (h0 (B, P) with w_hr), dtype of x; None for zeros.
        w_ih (Tensor): input weights, (4H, I), gate order i, f, g, o.
        w_hh (Tensor): recurrent weights, (4H, H), with w_hr (4H, P).
        b_ih (Tensor, optional): (4H,). Default: None.
        b_hh (Tensor, optional): (4H,). Default: None.
        w_hr (Tensor, optional): projection of the output (proj_size), (P, H); runs the reference. Default: None.
        reverse (bool): run t = T-1 .. 0. Default: False.

    Returns:
        output (Tensor): (T, B, H or P), the output after every step, at the step's own place.
        (h_n, c_n): the last output (B, H or P) and cell state (B, H), copies.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or T == 0 (the message names the argument, expected and got).

    Numerics: accumulates in the input's dtype (float32 for bfloat16). Error against a float64 reference at most 2x
    (gradients 3x) that of torch.nn.LSTM, plus rounding. Results do not depend on the number of threads.
    Differentiable in every tensor, any number of times.
    """
    h0, c0 = _pair(state)
    if w_hr is not None:
        return _projected(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse)
    if _common.is_plain(x, h0, c0, w_ih, w_hh, b_ih, b_hh):
        record = _common.requires_grad(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
        try:
            run = _recorded if record else _forward_plain
            output, h_n, c_n, _ = run(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, record)
            return output, (h_n, c_n)
        except (RuntimeError, ValueError):
            _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh)  # says it by the argument's name
            raise
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    tensors, kernel, dtype = _common.plan("lstm", (x, h0, c0, w_ih, w_hh, b_ih, b_hh))
    if not kernel:
        return reference.lstm(tensors[0], tensors[1:3], *tensors[3:], reverse=reverse)
    record = _common.requires_grad(*tensors)
    output, h_n, c_n, _ = _common.call(_forward, record, *tensors, reverse, record)
    if output.dtype != dtype:
        output, h_n, c_n = output.to(dtype), h_n.to(dtype), c_n.to(dtype)
    return output, (h_n, c_n)


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor | None, Tensor | None],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: x (B, I), state (h, c) (B, H) each or None -> new (h, c). Else as `lstm`, of which it is T = 1.

    Raises:
        ValueError: shapes, dtypes or devices disagree (the message names the argument, expected and got).
    """
    _common.check_step_input(x)
    return lstm(x.unsqueeze(0), state, w_ih, w_hh, b_ih, b_hh)[1]


def _pair(state: object) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state: expected a pair (h0, c0) of Tensors or None, got {type(state).__name__}")
    return state[0], state[1]


def _check(
    x: object, h0: object, c0: object, w_ih: object, w_hh: object, b_ih: object, b_hh: object, w_hr: object = None
) -> None:
    tensors = {"x": x, "h0": h0, "c0": c0, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
    _common.check_recurrent(4, tensors if w_hr is None else tensors | {"w_hr": w_hr})


def _projected(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    reason = "lstm has no kernel for a projection (w_hr, proj_size)"
    if _trace.calls is not None:
        _trace.record("lstm", reason)
    if _backend.forced() != "reference" and not _common.composed_path(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr):
        _backend.fall_back(reason)
    tensors = _common.autocast(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    return reference.lstm(tensors[0], tensors[1:3], *tensors[3:], reverse=reverse)


@torch.library.register_fake("fastlm::lstm_forward")
def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    reserve = x.new_empty((seq_len, batch, 6 * hidden) if save else (0,))
    return x.new_empty(seq_len, batch, hidden), x.new_empty(batch, hidden), x.new_empty(batch, hidden), reserve


@torch.library.register_fake("fastlm::lstm_backward")
def _backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
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
    state_shape = (x.shape[1], hidden) if need_h0 else (0,)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(state_shape),
        x.new_empty(state_shape),
        x.new_empty(w_ih.shape if need_weights else (0,)),
        x.new_empty(w_hh.shape if need_weights else (0,)),
        x.new_empty((4 * hidden,) if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[3])
    ctx.mark_non_differentiable(output[3])


def _autograd_backward(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _: None
) -> tuple[Any, ...]:
    *inputs, reserve = ctx.saved_tensors
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = inputs
    grad_outputs = (grad_output, grad_h_n, grad_c_n)
    if all(grad is None for grad in grad_outputs):
        return (None,) * 9
    needed = ctx.needs_input_grad[:7]
    if torch.is_grad_enabled() or not ctx.save:
        output, states = _common.recompute(
            lambda: reference.lstm(x, (h0, c0), w_ih, w_hh, b_ih, b_hh, reverse=ctx.reverse)
        )
        return (*_common.composed_grads((output, *states), grad_outputs, tuple(inputs), needed), None, None)
    need_x, need_h0, need_c0, *need_weights = needed
    *grads, grad_bias = _common.call(
        _backward,
        False,
        *(_common.contiguous_or_none(grad) for grad in grad_outputs),
        x,
        w_ih,
        w_hh,
        reserve,
        ctx.reverse,
        need_x,
        need_h0 or need_c0,
        any(need_weights[:2]),
        any(need_weights[2:]),
    )
    # Both biases enter as a sum; two tensors, since an optimizer may change one gradient in place.
    grads += [grad_bias, grad_bias.clone() if all(need_weights[2:]) else grad_bias]
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None)


torch.library.register_autograd("fastlm::lstm_forward", _autograd_backward, setup_context=_setup_context)
_recorded = _common.recorded(_forward, _setup_context, _autograd_backward)
