"""Plain PyTorch truth of every operation: any dtype and device, differentiable any number of times, no speed ambition.

Used as the reference in tests and benchmarks, as the composed path under `torch.func` transforms, forward-mode AD and
double backward, and for what the kernels do not cover. bfloat16 is computed in float32 as in the kernels, h rounded
after every step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

States = tuple[Tensor, ...]  # h, and c of an LSTM


def gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One GRU step: x (B, I), h (B, H) -> (B, H)."""
    return _gru_step(w_hh, b_hh, linear(x, w_ih, b_ih), (h,))[0]


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: x (B, I), h (B, H or P), c (B, H) -> new (h, c)."""
    h, c = _lstm_step(w_hh, b_hh, w_hr, linear(x, w_ih, b_ih), state)
    return h, c


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer and direction; see `fastlm.ops.gru`."""
    dtype = x.dtype
    x, h0, w_ih, w_hh, b_ih, b_hh = map(_widened, (x, h0, w_ih, w_hh, b_ih, b_hh))
    widths = (w_hh.shape[1],)
    step = _rounding(dtype, partial(_gru_step, w_hh, b_hh))
    (output,), (h_n,) = _unroll(
        x, (h0,), widths, partial(linear, weight=w_ih, bias=b_ih), step, lengths, batch_sizes, reset_mask, reverse
    )
    return output.to(dtype), h_n.to(dtype)


def lstm(
    x: Tensor,
    state: tuple[Tensor | None, Tensor | None],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """One LSTM layer and direction: output, (h_n, c_n), every c; see `fastlm.ops.lstm`."""
    dtype = x.dtype
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = map(_widened, (x, *state, w_ih, w_hh, b_ih, b_hh, w_hr))
    widths = (w_hh.shape[1], w_hh.shape[0] // 4)
    step = _rounding(dtype, partial(_lstm_step, w_hh, b_hh, w_hr))
    (output, cells), (h_n, c_n) = _unroll(
        x, (h0, c0), widths, partial(linear, weight=w_ih, bias=b_ih), step, lengths, batch_sizes, reset_mask, reverse
    )
    return output.to(dtype), (h_n.to(dtype), c_n.to(dtype)), cells.to(dtype)


def gemm(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """op(a) @ op(b) of two matrices."""
    return torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)


def active_steps(seq_len: int, lengths: Tensor) -> Tensor:
    """(T, B) bool: which steps lie within a sequence.

    Raises:
        ValueError: a length is negative or above seq_len (not seen while compiling).
    """
    if not torch.compiler.is_compiling() and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > seq_len:
            raise ValueError(f"lengths: expected 0 to {seq_len} (T), got {low if low < 0 else high}")
    return torch.arange(seq_len, device=lengths.device)[:, None] < lengths


def packed_sizes(rows: int, batch_sizes: Tensor) -> list[int]:
    """Batch sizes as numbers.

    Raises:
        ValueError: they are not positive, grow, or do not sum up to rows.
    """
    sizes = [int(size) for size in batch_sizes.tolist()]
    if any(size < 1 for size in sizes):
        raise ValueError(f"batch_sizes: expected positive numbers, got {min(sizes)}")
    if sizes != sorted(sizes, reverse=True):
        raise ValueError("batch_sizes: expected numbers that never grow")
    if sum(sizes) != rows:
        raise ValueError(f"batch_sizes: expected a sum of {rows} (the rows of x), got {sum(sizes)}")
    return sizes


def _gru_step(w_hh: Tensor, b_hh: Tensor | None, gates_x: Tensor, states: States) -> States:
    (h,) = states
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, -1)
    r = torch.sigmoid(r_x + r_h)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (n + z * (h - n),)


def _lstm_step(w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None, gates_x: Tensor, states: States) -> States:
    h, c = states
    i, f, g, o = (gates_x + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else linear(h, w_hr)), c


def _rounding(dtype: torch.dtype, step: Callable[[Tensor, States], States]) -> Callable[[Tensor, States], States]:
    """The step with h rounded to bfloat16 if that is the dtype; gradients pass as they are."""
    if dtype != torch.bfloat16:
        return step

    def rounded(gates_x: Tensor, states: States) -> States:
        h, *c = step(gates_x, states)
        return h + (h.to(dtype).to(h.dtype) - h).detach(), *c

    return rounded


def _widened(tensor: Any) -> Any:
    """bfloat16 as float32."""
    return tensor.float() if tensor is not None and tensor.dtype == torch.bfloat16 else tensor


def _unroll(
    x: Tensor,
    initial: Sequence[Tensor | None],
    widths: Sequence[int],
    project: Callable[[Tensor], Tensor],
    step: Callable[[Tensor, States], States],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset_mask: Tensor | None,
    reverse: bool,
) -> tuple[States, States]:
    """Every state after every step, and the last ones; step takes a step's projected input and the states."""
    sizes = None if batch_sizes is None else packed_sizes(x.shape[0], batch_sizes)
    batch = x.shape[1] if sizes is None else sizes[0]
    states = tuple(
        x.new_zeros(batch, width) if state is None else state for state, width in zip(initial, widths, strict=True)
    )
    if sizes is not None:
        run = _unroll_packed(project(x).split(sizes), states, step, reverse)
        return tuple(torch.cat(each) for each in run[0]), run[1]
    active = None if lengths is None else active_steps(x.shape[0], lengths.to(x.device))
    if active is not None:
        x = x.masked_fill(~active[..., None], 0)  # what stands there may be anything, NaN too
        reset_mask = None if reset_mask is None else reset_mask & active
    run = _unroll_padded(project(x), states, step, active, reset_mask, reverse)
    return tuple(torch.stack(each) for each in run[0]), run[1]


_Run = tuple[list[list[Tensor]], States]  # per kind of state, the one after every step in order of time; the last ones


def _unroll_padded(
    gates_x: Tensor,
    states: States,
    step: Callable[[Tensor, States], States],
    active: Tensor | None,
    reset_mask: Tensor | None,
    reverse: bool,
) -> _Run:
    outputs: list[list[Tensor]] = [[] for _ in states]
    for t in _order(gates_x.shape[0], reverse):
        starts = None if reset_mask is None else reset_mask[t][:, None]
        if starts is not None and not reverse:
            states = tuple(state.masked_fill(starts, 0) for state in states)
        new = step(gates_x[t], states)
        if active is not None:
            goes_on = active[t][:, None]
            kept = [torch.where(goes_on, after, before) for after, before in zip(new, states, strict=True)]
            new = tuple(state.masked_fill(~goes_on, 0) for state in new)
            states = tuple(kept)
        else:
            states = new
        for output, state in zip(outputs, new, strict=True):
            output.append(state)
        if starts is not None and reverse:
            states = tuple(state.masked_fill(starts, 0) for state in states)
    return [output[::-1] if reverse else output for output in outputs], tuple(state.clone() for state in states)


def _unroll_packed(
    gates_x: Sequence[Tensor], states: States, step: Callable[[Tensor, States], States], reverse: bool
) -> _Run:
    outputs: list[list[Tensor]] = [[] for _ in states]
    for t in _order(len(gates_x), reverse):
        size = gates_x[t].shape[0]
        new = step(gates_x[t], tuple(state[:size] for state in states))
        states = tuple(torch.cat((after, before[size:])) for after, before in zip(new, states, strict=True))
        for output, state in zip(outputs, new, strict=True):
            output.append(state)
    return [output[::-1] if reverse else output for output in outputs], tuple(state.clone() for state in states)


def _order(seq_len: int, reverse: bool) -> range:
    return range(seq_len - 1, -1, -1) if reverse else range(seq_len)
