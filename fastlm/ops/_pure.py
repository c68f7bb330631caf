"""The CPU implementation of the ops without the extension (FASTLM_PURE=1): the kernels' contract in plain PyTorch."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlm.ops import _schema, reference


def _steps(seq_len: int, reverse: bool) -> list[int]:
    return list(range(seq_len - 1, -1, -1) if reverse else range(seq_len))


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
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reserve: (T, B, 5H) of r, z, n, U_n h + b_hn, h before the step."""
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    gates_x = linear(x, w_ih, b_ih)
    output = x.new_empty(seq_len, batch, hidden)
    reserve = x.new_empty((seq_len, batch, 5 * hidden) if save else (0,))
    h = _zeros_or(h0, x, hidden)
    for t in _steps(seq_len, reverse):
        r_x, z_x, n_x = gates_x[t].chunk(3, -1)
        r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, -1)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + r * n_h)
        if save:
            torch.cat((r, z, n, n_h, h), -1, out=reserve[t])
        h = n + z * (h - n)
        output[t] = h
    return output, h.clone(), reserve


def gru_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gru_forward`; one that is not needed is empty."""
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    grad_gates_x = x.new_empty(seq_len, batch, 3 * hidden)
    grad_gates_h = x.new_empty(seq_len, batch, 3 * hidden)
    carry = _zeros_or(grad_h_n, x, hidden)
    for t in _steps(seq_len, not reverse):
        r, z, n, n_h, h = reserve[t].chunk(5, -1)
        grad = carry if grad_output is None else carry + grad_output[t]
        grad_n = grad * (1 - z) * (1 - n * n)
        grad_z = grad * (h - n) * z * (1 - z)
        grad_r = grad_n * n_h * r * (1 - r)
        torch.cat((grad_r, grad_z, grad_n), -1, out=grad_gates_x[t])
        torch.cat((grad_r, grad_z, grad_n * r), -1, out=grad_gates_h[t])
        carry = grad * z + grad_gates_h[t] @ w_hh
    empty = x.new_empty(0)
    return (
        grad_gates_x @ w_ih if need_x else empty,
        carry.clone() if need_h0 else empty.clone(),
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
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reserve: (T, B, 6H) of i, f, g, o, c before the step, h before the step."""
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    gates_x = linear(x, w_ih, b_ih)
    output = x.new_empty(seq_len, batch, hidden)
    reserve = x.new_empty((seq_len, batch, 6 * hidden) if save else (0,))
    h, c = _zeros_or(h0, x, hidden), _zeros_or(c0, x, hidden)
    for t in _steps(seq_len, reverse):
        i, f, g, o = (gates_x[t] + linear(h, w_hh, b_hh)).chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        if save:
            torch.cat((i, f, g, o, c, h), -1, out=reserve[t])
        c = f * c + i * g
        h = o * torch.tanh(c)
        output[t] = h
    return output, h.clone(), c.clone(), reserve


def lstm_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lstm_forward`; one that is not needed is empty."""
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    grad_gates = x.new_empty(seq_len, batch, 4 * hidden)
    grad_h, grad_c = _zeros_or(grad_h_n, x, hidden), _zeros_or(grad_c_n, x, hidden)
    for t in _steps(seq_len, not reverse):
        i, f, g, o, c, _ = reserve[t].chunk(6, -1)
        tanh_c = torch.tanh(f * c + i * g)
        grad = grad_h if grad_output is None else grad_h + grad_output[t]
        grad_c = grad_c + grad * o * (1 - tanh_c * tanh_c)
        grad_i, grad_f = grad_c * g * i * (1 - i), grad_c * c * f * (1 - f)
        grad_g, grad_o = grad_c * i * (1 - g * g), grad * tanh_c * o * (1 - o)
        torch.cat((grad_i, grad_f, grad_g, grad_o), -1, out=grad_gates[t])
        grad_c = grad_c * f
        grad_h = grad_gates[t] @ w_hh
    empty = x.new_empty(0)
    return (
        grad_gates @ w_ih if need_x else empty,
        grad_h.clone() if need_h0 else empty.clone(),
        grad_c.clone() if need_h0 else empty.clone(),
        _sum_of_products(grad_gates, x) if need_weights else empty.clone(),
        _sum_of_products(grad_gates, reserve[..., 5 * hidden :]) if need_weights else empty.clone(),
        grad_gates.sum(1).sum(0) if need_bias else empty.clone(),
    )


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The casts are made before the op; an autocast around the call would make more of them in here."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return run


def register() -> None:
    """Makes these functions the CPU implementation of the ops."""
    for function in (gru_forward, gru_backward, lstm_forward, lstm_backward):
        _schema.LIBRARY.impl(function.__name__, _without_autocast(function), "CPU")
    _schema.LIBRARY.impl("gemm", reference.gemm, "CPU")
