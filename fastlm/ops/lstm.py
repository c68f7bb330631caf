"""LSTM operators: public functions, shape (fake) functions and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common, reference

_forward = torch.ops.fastlm.lstm_forward.default
_backward = torch.ops.fastlm.lstm_backward.default
_unrecorded = _common.unrecorded(_forward)

State = tuple[Tensor | None, Tensor | None] | None

NO_PROJECTION = "lstm has no kernel for a projection (w_hr, proj_size)"


def lstm(
    x: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    lengths: Tensor | list[int] | None = None,
    batch_sizes: Tensor | list[int] | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    """One LSTM layer and direction over a whole sequence (Hochreiter and Schmidhuber 1997; torch.nn.LSTM equations).

    Args:
        x (Tensor): input, (T, B, I), T >= 1; float32, float64 or bfloat16. With batch_sizes (rows, I).
        state (tuple, optional): (h0, c0), (B, H) each (h0 (B, P) with w_hr) or as a module's, (1, B, H), dtype of x;
            None for zeros, in place of either or of both.
        w_ih (Tensor): input weights, (4H, I), gate order i, f, g, o.
        w_hh (Tensor): recurrent weights, (4H, H), with w_hr (4H, P).
        b_ih (Tensor, optional): (4H,). Default: None.
        b_hh (Tensor, optional): (4H,). Default: None.
        w_hr (Tensor, optional): projection of the output (proj_size), (P, H); runs the reference. Default: None.
        lengths (Tensor or list of int, optional): steps of every sequence; see `fastlm.ops.gru`. Default: None.
        batch_sizes (Tensor or list of int, optional): rows of every step; see there. Default: None.
        reset_mask (Tensor, optional): where h and c start anew; see there. Default: None.
        reverse (bool): run t = T-1 .. 0. Default: False.
        return_all_states (bool): also return c after every step. Default: False.

    Returns:
        output (Tensor): (T, B, H or P), the output after every step, at the step's own place. With batch_sizes
            (rows, H or P).
        (h_n, c_n): the last output (B, H or P) and cell state (B, H), copies.
        cells (Tensor): with return_all_states, c after every step, laid out as output.

    Raises:
        ValueError: shapes, dtypes or devices disagree, T == 0, or a length or batch size is impossible (the message
            names the argument, expected and got).
        TypeError: an argument is no Tensor.

    Numerics: accumulates in the input's dtype, bfloat16 in float32 with c in float32. Error against a float64 reference
    at most 2x (gradients 3x) that of torch.nn.LSTM, plus rounding. Results do not depend on the number of threads.
    Subnormal numbers count as zero.
    Differentiable in every floating-point tensor, any number of times.
    """
    h0, c0 = _pair(state)
    sequences = _common.check_sequences(x, lengths, batch_sizes, reset_mask)
    if w_hr is None:
        output, h_n, c_n, cells = layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, sequences, reverse, return_all_states)
    else:
        output, h_n, c_n, cells = projected_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, sequences, reverse)
    states = (h_n.squeeze_(0), c_n.squeeze_(0))
    return (output, states, cells) if return_all_states else (output, states)


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    sequences: _common.Sequences,
    reverse: bool,
    all_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lstm` without a projection in the forms of `fastlm.ops.gru.layer`; cells are empty if not asked for."""
    if _common.is_plain(x, h0, c0, w_ih, w_hh, b_ih, b_hh):
        record = _common.requires_grad(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
        try:
            if record or all_cells:
                run = _recorded if record else _unrecorded
                return run(x, h0, c0, w_ih, w_hh, b_ih, b_hh, *sequences, reverse, record, all_cells)[:4]  # type: ignore[return-value]
            rest = _common.unless_default(sequences, reverse)
            return _unrecorded(x, h0, c0, w_ih, w_hh, b_ih, b_hh, *rest)[:4]
        except (RuntimeError, ValueError):
            _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, sequences)  # says it by the argument's name
            raise
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, sequences)
    if h0 is None and sequences.batch_sizes is not None:
        h0 = _common.packed_state(x, sequences.batch_sizes, w_hh.shape[1])
    tensors, kernel = _common.plan("lstm", (x, h0, c0, w_ih, w_hh, b_ih, b_hh))
    if not kernel:
        return _reference(tensors, sequences, reverse)
    record = _common.requires_grad(*tensors)
    return _common.call(_forward, record, *tensors, *sequences, reverse, record, all_cells)[:4]


def lstm_cell(
    x: Tensor,
    state: State,
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
    output, _, c_n, _ = layer(x, *_pair(state), w_ih, w_hh, b_ih, b_hh, _common.ALL_STEPS, False, False)
    return output, c_n


def _pair(state: object) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state: expected a pair (h0, c0) of Tensors or None, got {type(state).__name__}")
    return state[0], state[1]


def _check(
    x: object,
    h0: object,
    c0: object,
    w_ih: object,
    w_hh: object,
    b_ih: object,
    b_hh: object,
    sequences: _common.Sequences,
    w_hr: object = None,
) -> None:
    tensors = {"x": x, "h0": h0, "c0": c0, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
    _common.check_recurrent(4, tensors if w_hr is None else tensors | {"w_hr": w_hr}, sequences)


def projected_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor,
    sequences: _common.Sequences,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer` with a projection, by the reference; cells are always there."""
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, sequences, w_hr)
    tensors, _ = _common.plan("lstm", (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr), NO_PROJECTION)
    return _reference(tensors, sequences, reverse)


def _reference(
    tensors: Sequence[Any], sequences: _common.Sequences, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reference.lstm in the forms of `layer`."""
    x, h0, c0, *weights = tensors

    def run(x: Tensor, states: list[Any]) -> Any:
        output, last, cells = reference.lstm(x, tuple(states), *weights, **sequences._asdict(), reverse=reverse)
        return [output, cells], last

    (output, cells), (h_n, c_n) = _common.by_reference(run, x, (h0, c0), sequences)
    return output, h_n, c_n, cells


@torch.library.register_fake("fastlm::lstm_forward")
def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
    all_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = w_hh.shape[1]
    output_shape = (*x.shape[:-1], hidden)
    states_shape = _common.states_shape(x, c0 if h0 is None else h0, batch_sizes, hidden)
    return (
        x.new_empty(output_shape),
        x.new_empty(states_shape),
        x.new_empty(states_shape),
        x.new_empty(output_shape if all_cells else (0,)),
        _common.new_reserve(x, 6 * hidden if save else None),
    )


@torch.library.register_fake("fastlm::lstm_backward")
def _backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset_mask: Tensor | None,
    reserve: Tensor,
    reverse: bool,
    need_x: bool,
    need_weights: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    state_shape = (0,) if state is None else state.shape
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(state_shape),
        x.new_empty(state_shape),
        x.new_empty(w_ih.shape if need_weights else (0,)),
        x.new_empty(w_hh.shape if need_weights else (0,)),
        x.new_empty((w_hh.shape[0],) if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.save, ctx.all_cells = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[4])
    ctx.mark_non_differentiable(output[4])


def _autograd_backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    _: None,
) -> tuple[Any, ...]:
    *inputs, lengths, batch_sizes, reset_mask, reserve = ctx.saved_tensors
    sequences = _common.Sequences(lengths, batch_sizes, reset_mask)
    x, h0, c0, w_ih, w_hh, _, _ = inputs
    # The empty tensor that stands for cells not asked for may get a gradient while compiling.
    grad_outputs = (grad_output, grad_h_n, grad_c_n, grad_cells if ctx.all_cells else None)
    no_gradients = (None,) * 6
    if all(grad is None for grad in grad_outputs):
        return (*(None for _ in inputs), *no_gradients)
    needed = ctx.needs_input_grad[:7]
    if torch.is_grad_enabled() or not ctx.save:
        grads = _common.composed_grads(
            lambda *tensors: _reference(tensors, sequences, ctx.reverse), inputs, grad_outputs, needed
        )
        return (*grads, *no_gradients)
    need_x, need_h0, need_c0, *need_weights = needed
    *kernel_grads, grad_bias = _common.call(
        _backward,
        False,
        *(_common.contiguous_or_none(grad) for grad in grad_outputs),
        x,
        h0 if need_h0 else c0 if need_c0 else None,
        w_ih,
        w_hh,
        *sequences,
        reserve,
        ctx.reverse,
        need_x,
        any(need_weights[:2]),
        any(need_weights[2:]),
    )
    # Both biases enter as a sum; two tensors, since an optimizer may change one gradient in place.
    kernel_grads += [grad_bias, grad_bias.clone() if all(need_weights[2:]) else grad_bias]
    return (*(grad if need else None for grad, need in zip(kernel_grads, needed, strict=True)), *no_gradients)


torch.library.register_autograd("fastlm::lstm_forward", _autograd_backward, setup_context=_setup_context)
_recorded = _common.recorded(_forward, _setup_context, _autograd_backward)
