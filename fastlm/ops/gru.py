"""GRU operators: public functions, shape (fake) functions and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common, reference

_forward = torch.ops.fastlm.gru_forward.default
_backward = torch.ops.fastlm.gru_backward.default
_unrecorded = _common.unrecorded(_forward)


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | list[int] | None = None,
    batch_sizes: Tensor | list[int] | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer and direction over a whole sequence (Cho et al. 2014, arXiv:1406.1078v1; torch.nn.GRU equations).

    Args:
        x (Tensor): input, (T, B, I), T >= 1; float32, float64 or bfloat16. With batch_sizes (rows, I).
        h0 (Tensor, optional): initial state, (B, H) or as a module's (1, B, H), dtype of x. None: zeros.
        w_ih (Tensor): input weights, (3H, I), gate order r, z, n.
        w_hh (Tensor): recurrent weights, (3H, H).
        b_ih (Tensor, optional): (3H,). Default: None.
        b_hh (Tensor, optional): (3H,), its n part inside the reset gate's product. Default: None.
        lengths (Tensor or list of int, optional): steps of every sequence, (B,), 0 to T in any order, any integer dtype
            and device. Output is 0 past a length, h_n the state at it (h0 for length 0); reverse starts at the last
            step within it. What x holds past a length plays no part. Default: None, all T.
        batch_sizes (Tensor or list of int, optional): rows of every step, (T,), as in a PackedSequence: x holds the
            rows of the first step, then of the next. Not together with lengths or reset_mask. Default: None.
        reset_mask (Tensor, optional): bool (T, B). True at t starts a new segment at t in both directions: the state
            is 0 before step t, with reverse after step t (so h_n is 0 where it is True at 0). Past a length it plays no
            part. Default: None.
        reverse (bool): run t = T-1 .. 0. Default: False.

    Returns:
        output (Tensor): (T, B, H), the state after every step, at the step's own place. With batch_sizes (rows, H).
        h_n (Tensor): (B, H), the last state, a copy.

    Raises:
        ValueError: shapes, dtypes or devices disagree, T == 0, or a length or batch size is impossible (the message
            names the argument, expected and got).
        TypeError: an argument is no Tensor.

    Numerics: accumulates in the input's dtype, bfloat16 in float32. Error against a float64 reference at most 2x
    (gradients 3x) that of torch.nn.GRU, plus rounding. Results do not depend on the number of threads. Subnormal
    numbers count as zero.
    Differentiable in every floating-point tensor, any number of times.
    """
    sequences = _common.check_sequences(x, lengths, batch_sizes, reset_mask)
    output, h_n = layer(x, h0, w_ih, w_hh, b_ih, b_hh, sequences, reverse)
    return output, h_n.squeeze_(0)


def layer(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    sequences: _common.Sequences,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`gru` of sequences that are checked, with h_n as a module's, (1, B, H); or of one step's x (B, I), h_n (B, H)."""
    if _common.is_plain(x, h0, w_ih, w_hh, b_ih, b_hh):
        record = _common.requires_grad(x, h0, w_ih, w_hh, b_ih, b_hh)
        try:
            if record:
                return _recorded(x, h0, w_ih, w_hh, b_ih, b_hh, *sequences, reverse, True)[:2]  # type: ignore[return-value]
            rest = _common.unless_default(sequences, reverse)
            return _unrecorded(x, h0, w_ih, w_hh, b_ih, b_hh, *rest)[:2]
        except (RuntimeError, ValueError):
            _check(x, h0, w_ih, w_hh, b_ih, b_hh, sequences)  # says it by the argument's name
            raise
    _check(x, h0, w_ih, w_hh, b_ih, b_hh, sequences)
    if h0 is None and sequences.batch_sizes is not None:
        h0 = _common.packed_state(x, sequences.batch_sizes, w_hh.shape[1])
    tensors, kernel = _common.plan("gru", (x, h0, w_ih, w_hh, b_ih, b_hh))
    if not kernel:
        return _reference(tensors, sequences, reverse)
    record = _common.requires_grad(*tensors)
    output, h_n, _ = _common.call(_forward, record, *tensors, *sequences, reverse, record)
    return output, h_n


def _reference(tensors: Sequence[Any], sequences: _common.Sequences, reverse: bool) -> tuple[Tensor, Tensor]:
    """reference.gru in the forms of `layer`."""
    x, h0, *weights = tensors

    def run(x: Tensor, states: list[Any]) -> Any:
        output, h_n = reference.gru(x, *states, *weights, **sequences._asdict(), reverse=reverse)
        return [output], [h_n]

    (output,), (h_n,) = _common.by_reference(run, x, (h0,), sequences)
    return output, h_n


def _check(
    x: object, h0: object, w_ih: object, w_hh: object, b_ih: object, b_hh: object, sequences: _common.Sequences
) -> None:
    tensors = {"x": x, "h0": h0, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
    _common.check_recurrent(3, tensors, sequences)


def gru_cell(
    x: Tensor, h: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One GRU step: x (B, I), h (B, H) or None for zeros -> new h (B, H). Else as `gru`, of which it is the case T = 1.

    Raises:
        ValueError: shapes, dtypes or devices disagree (the message names the argument, expected and got).
    """
    _common.check_step_input(x)
    return layer(x, h, w_ih, w_hh, b_ih, b_hh, _common.ALL_STEPS, False)[0]


@torch.library.register_fake("fastlm::gru_forward")
def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = w_hh.shape[1]
    return (
        x.new_empty(*x.shape[:-1], hidden),
        x.new_empty(_common.states_shape(x, h0, batch_sizes, hidden)),
        _common.new_reserve(x, 5 * hidden if save else None),
    )


@torch.library.register_fake("fastlm::gru_backward")
def _backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
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
    rows = w_hh.shape[0]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((0,) if state is None else state.shape),
        x.new_empty(w_ih.shape if need_weights else (0,)),
        x.new_empty(w_hh.shape if need_weights else (0,)),
        x.new_empty((rows,) if need_bias else (0,)),
        x.new_empty((rows,) if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _autograd_backward(ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, _: None) -> tuple[Any, ...]:
    *inputs, lengths, batch_sizes, reset_mask, reserve = ctx.saved_tensors
    sequences = _common.Sequences(lengths, batch_sizes, reset_mask)
    x, h0, w_ih, w_hh, _, _ = inputs
    no_gradients = (None,) * 5
    if grad_output is None and grad_h_n is None:
        return (*(None for _ in inputs), *no_gradients)
    needed = ctx.needs_input_grad[:6]
    if torch.is_grad_enabled() or not ctx.save:
        grads = _common.composed_grads(
            lambda *tensors: _reference(tensors, sequences, ctx.reverse), inputs, (grad_output, grad_h_n), needed
        )
        return (*grads, *no_gradients)
    need_x, need_h0, *need_weights = needed
    grads = _common.call(
        _backward,
        False,
        _common.contiguous_or_none(grad_output),
        _common.contiguous_or_none(grad_h_n),
        x,
        h0 if need_h0 else None,
        w_ih,
        w_hh,
        *sequences,
        reserve,
        ctx.reverse,
        need_x,
        any(need_weights[:2]),
        any(need_weights[2:]),
    )
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *no_gradients)


torch.library.register_autograd("fastlm::gru_forward", _autograd_backward, setup_context=_setup_context)
_recorded = _common.recorded(_forward, _setup_context, _autograd_backward)
