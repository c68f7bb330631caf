"""The ops' CPU implementation where the extension is missing: the reference, with the derivatives written out.

They cannot come from autograd, for these functions run below it. No speed ambition.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlm.ops import _schema, reference


class _Steps:
    """The steps of a call on padded tensors: which sequences each has, and where they start anew."""

    def __init__(
        self,
        x: Tensor,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        reset_mask: Tensor | None,
        reverse: bool,
    ) -> None:
        self.reverse = reverse
        self.packed = batch_sizes is not None
        if batch_sizes is not None:
            sizes = torch.tensor(reference.packed_sizes(x.shape[0], batch_sizes))
            self.active: Tensor | None = torch.arange(int(sizes[0])) < sizes[:, None]
        else:
            self.active = None if lengths is None else reference.active_steps(x.shape[0], lengths)
        self.resets = reset_mask
        if self.active is not None and reset_mask is not None:
            self.resets = reset_mask & self.active

    def pad(self, rows: Tensor) -> Tensor:
        """Rows of a call's tensor as (T, B, *), zero where a sequence has no step."""
        if self.active is None:
            return rows
        if not self.packed:
            return rows.masked_fill(~self.active[..., None], 0)
        padded = rows.new_zeros(*self.active.shape, rows.shape[-1])
        padded[self.active] = rows
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """(T, B, *) as the rows of a call's tensor."""
        if self.packed:
            assert self.active is not None
            return padded[self.active]
        return self.pad(padded)

    def order(self, seq_len: int, backward: bool = False) -> Iterator[int]:
        """Times in the order of forward or of backward."""
        return iter(range(seq_len - 1, -1, -1) if self.reverse != backward else range(seq_len))

    def keep(self, t: int, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
        """The new values of the sequences that have this step, the old ones of the rest."""
        if self.active is None:
            return list(new)
        goes_on = self.active[t][:, None]
        return [torch.where(goes_on, after, before) for after, before in zip(new, old, strict=True)]

    def reset(self, t: int, before_step: bool, tensors: Sequence[Tensor]) -> list[Tensor]:
        """States (forward) or their gradients (backward) cut where a segment starts at this side of the step."""
        if self.resets is None or before_step == self.reverse:
            return list(tensors)
        return [tensor.masked_fill(self.resets[t][:, None], 0) for tensor in tensors]


def _zeros_or(state: Tensor | None, x: Tensor, hidden: int) -> Tensor:
    return x.new_zeros(x.shape[1], hidden) if state is None else state


def _sum_of_products(grad_gates: Tensor, inputs: Tensor) -> Tensor:
    """Sum over steps of grad_gates[t]^T inputs[t]: step by step, since one long sum loses accuracy."""
    total = grad_gates.new_zeros(grad_gates.shape[2], inputs.shape[2])
    for gates, rows in zip(grad_gates, inputs, strict=True):
        total.addmm_(gates.mT, rows)
    return total


def gru_forward(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset_mask: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reserve: (T, B, 5H) of r, z, n, U_n h + b_hn, h before the step."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x = steps.pad(x)
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    gates_x = linear(x, w_ih, b_ih)
    output = x.new_empty(seq_len, batch, hidden)
    reserve = x.new_empty(seq_len, batch, 5 * hidden)
    h = _zeros_or(h0, x, hidden)
    for t in steps.order(seq_len):
        (h,) = steps.reset(t, True, (h,))
        r_x, z_x, n_x = gates_x[t].chunk(3, -1)
        r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, -1)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + r * n_h)
        torch.cat((r, z, n, n_h, h), -1, out=reserve[t])
        output[t] = n + z * (h - n)
        (h,) = steps.reset(t, False, steps.keep(t, (output[t],), (h,)))
    return steps.unpad(output).contiguous(), h.clone(), steps.unpad(reserve) if save else x.new_empty(0)


def gru_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gru_forward`; one that is not needed is empty."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x, reserve = steps.pad(x), steps.pad(reserve)
    grad_output = None if grad_output is None else steps.pad(grad_output)
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    grad_gates_x = x.new_zeros(seq_len, batch, 3 * hidden)
    grad_gates_h = x.new_zeros(seq_len, batch, 3 * hidden)
    carry = _zeros_or(grad_h_n, x, hidden)
    for t in steps.order(seq_len, backward=True):
        (carry,) = steps.reset(t, False, (carry,))
        r, z, n, n_h, h = reserve[t].chunk(5, -1)
        grad = carry if grad_output is None else carry + grad_output[t]
        (grad,) = steps.keep(t, (grad,), (torch.zeros_like(grad),))
        grad_n = grad * (1 - z) * (1 - n * n)
        grad_z = grad * (h - n) * z * (1 - z)
        grad_r = grad_n * n_h * r * (1 - r)
        torch.cat((grad_r, grad_z, grad_n), -1, out=grad_gates_x[t])
        torch.cat((grad_r, grad_z, grad_n * r), -1, out=grad_gates_h[t])
        (carry,) = steps.reset(t, True, steps.keep(t, (grad * z + grad_gates_h[t] @ w_hh,), (carry,)))
    empty = x.new_empty(0)
    return (
        steps.unpad(grad_gates_x @ w_ih) if need_x else empty,
        empty.clone() if state is None else carry.clone(),
        _sum_of_products(grad_gates_x, x) if need_weights else empty.clone(),
        _sum_of_products(grad_gates_h, reserve[..., 4 * hidden :]) if need_weights else empty.clone(),
        grad_gates_x.sum(1).sum(0) if need_bias else empty.clone(),
        grad_gates_h.sum(1).sum(0) if need_bias else empty.clone(),
    )


def lstm_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset_mask: Tensor | None,
    reverse: bool,
    save: bool,
    all_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reserve: (T, B, 6H) of i, f, g, o, c before the step, h before the step."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x = steps.pad(x)
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    gates_x = linear(x, w_ih, b_ih)
    output, cells = x.new_empty(seq_len, batch, hidden), x.new_empty(seq_len, batch, hidden)
    reserve = x.new_empty(seq_len, batch, 6 * hidden)
    h, c = _zeros_or(h0, x, hidden), _zeros_or(c0, x, hidden)
    for t in steps.order(seq_len):
        h, c = steps.reset(t, True, (h, c))
        i, f, g, o = (gates_x[t] + linear(h, w_hh, b_hh)).chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        torch.cat((i, f, g, o, c, h), -1, out=reserve[t])
        cells[t] = f * c + i * g
        output[t] = o * torch.tanh(cells[t])
        h, c = steps.reset(t, False, steps.keep(t, (output[t], cells[t]), (h, c)))
    return (
        steps.unpad(output).contiguous(),
        h.clone(),
        c.clone(),
        steps.unpad(cells) if all_cells else x.new_empty(0),
        steps.unpad(reserve) if save else x.new_empty(0),
    )


def lstm_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lstm_forward`; one that is not needed is empty."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x, reserve = steps.pad(x), steps.pad(reserve)
    arriving = [None if grad is None else steps.pad(grad) for grad in (grad_output, grad_cells)]
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    grad_gates = x.new_zeros(seq_len, batch, 4 * hidden)
    grad_h, grad_c = _zeros_or(grad_h_n, x, hidden), _zeros_or(grad_c_n, x, hidden)
    for t in steps.order(seq_len, backward=True):
        grad_h, grad_c = steps.reset(t, False, (grad_h, grad_c))
        i, f, g, o, c, _ = reserve[t].chunk(6, -1)
        tanh_c = torch.tanh(f * c + i * g)
        sums = [grad if add is None else grad + add[t] for grad, add in zip((grad_h, grad_c), arriving, strict=True)]
        grad, d_c = steps.keep(t, sums, [torch.zeros_like(each) for each in sums])
        d_c = d_c + grad * o * (1 - tanh_c * tanh_c)
        grad_i, grad_f = d_c * g * i * (1 - i), d_c * c * f * (1 - f)
        grad_g, grad_o = d_c * i * (1 - g * g), grad * tanh_c * o * (1 - o)
        torch.cat((grad_i, grad_f, grad_g, grad_o), -1, out=grad_gates[t])
        carried = steps.keep(t, (grad_gates[t] @ w_hh, d_c * f), (grad_h, grad_c))
        grad_h, grad_c = steps.reset(t, True, carried)
    empty = x.new_empty(0)
    return (
        steps.unpad(grad_gates @ w_ih) if need_x else empty,
        empty.clone() if state is None else grad_h.clone(),
        empty.clone() if state is None else grad_c.clone(),
        _sum_of_products(grad_gates, x) if need_weights else empty.clone(),
        _sum_of_products(grad_gates, reserve[..., 5 * hidden :]) if need_weights else empty.clone(),
        grad_gates.sum(1).sum(0) if need_bias else empty.clone(),
    )


def _implementation(function: Callable[..., tuple[Tensor, ...]], keeps_last: bool) -> Callable[..., Any]:
    """bfloat16 is computed in float32, which the reserve (forward's last result) stays in.

    Without autocast: the casts are made before the op; one around the call would make more of them in here.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        narrow = next(arg for arg in args if isinstance(arg, Tensor)).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            if not narrow:
                return function(*args)
            wide = (a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args)
            *results, last = function(*wide)
        return (*(r.bfloat16() for r in results), last if keeps_last and last.numel() else last.bfloat16())

    return run


def register() -> None:
    """Makes these functions the CPU implementation of the ops."""
    for function in (gru_forward, gru_backward, lstm_forward, lstm_backward):
        keeps_last = function in (gru_forward, lstm_forward)
        _schema.LIBRARY.impl(function.__name__, _implementation(function, keeps_last), "CPU")
    _schema.LIBRARY.impl("gemm", reference.gemm, "CPU")
