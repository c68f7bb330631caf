"""Plain PyTorch truth of every operation: any dtype and device, differentiable any number of times, no speed ambition.

Used as the reference in tests and benchmarks, as the composed path under `torch.func` transforms, forward-mode AD and
double backward, and for what the kernels do not cover.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One GRU step: x (B, I), h (B, H) -> (B, H)."""
    return _gru_step(linear(x, w_ih, b_ih), h, w_hh, b_hh)


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
    return _lstm_step(linear(x, w_ih, b_ih), *state, w_hh, b_hh, w_hr)


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
    """One GRU layer and direction over x (T, B, I); see `fastlm.ops.gru`."""
    h = x.new_zeros(x.shape[1], w_hh.shape[1]) if h0 is None else h0
    gates_x = linear(x, w_ih, b_ih)
    outputs: list[Tensor] = []
    for t in _steps(x.shape[0], reverse):
        h = _gru_step(gates_x[t], h, w_hh, b_hh)
        outputs.append(h)
    return _stack(outputs, reverse), h.clone()


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
    """One LSTM layer and direction over x (T, B, I); see `fastlm.ops.lstm`."""
    h0, c0 = state
    batch = x.shape[1]
    h = x.new_zeros(batch, w_hh.shape[1]) if h0 is None else h0
    c = x.new_zeros(batch, w_hh.shape[0] // 4) if c0 is None else c0
    gates_x = linear(x, w_ih, b_ih)
    outputs: list[Tensor] = []
    for t in _steps(x.shape[0], reverse):
        h, c = _lstm_step(gates_x[t], h, c, w_hh, b_hh, w_hr)
        outputs.append(h)
    return _stack(outputs, reverse), (h.clone(), c.clone())


def gemm(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """op(a) @ op(b) of two matrices."""
    return torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)


def _gru_step(gates_x: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, -1)
    r = torch.sigmoid(r_x + r_h)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return n + z * (h - n)


def _lstm_step(
    gates_x: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates_x + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else linear(h, w_hr)), c


def _steps(seq_len: int, reverse: bool) -> range:
    return range(seq_len - 1, -1, -1) if reverse else range(seq_len)


def _stack(outputs: list[Tensor], reverse: bool) -> Tensor:
    return torch.stack(outputs[::-1] if reverse else outputs)
