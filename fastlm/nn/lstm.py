"""LSTM and LSTMCell with the interface of torch.nn."""

from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn._cell import CELL_WEIGHTS, check_cell_sizes
from fastlm.nn._rnn import Recurrent, States
from fastlm.nn._twin import TorchTwin, read_weights

Pair = tuple[Tensor, Tensor]


class LSTM(Recurrent):
    """Drop-in for torch.nn.LSTM (same arguments, parameters, results and errors) on the fused kernels.

    With proj_size it runs the plain reference.
    """

    torch_class = torch.nn.LSTM
    _state_size_texts = ("Expected hidden[0] size {}, got {}", "Expected hidden[1] size {}, got {}")

    # Helpers that callers of torch.nn.LSTM know; they need nothing but RNNBase.
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )

    def forward(self, input: Any, hx: Pair | None = None) -> tuple[Any, Pair]:
        """Input (T, B, I), (B, T, I) with batch_first, (T, I) or PackedSequence -> output in that form, (h_n, c_n)."""
        output, (h_n, c_n) = self._run(input, None if hx is None else (hx[0], hx[1]))
        return output, (h_n, c_n)

    def _layer(self, x: Tensor, states: States, weights: list[Tensor], reverse: bool) -> tuple[Tensor, States]:
        h0, c0 = states
        b_ih, b_hh = weights[2:4] if self.bias else (None, None)
        w_hr = weights[-1] if self.proj_size else None
        return ops.lstm(x, (h0, c0), weights[0], weights[1], b_ih, b_hh, w_hr, reverse=reverse)

    def _state_widths(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _state_rank_text(self, rank: int, states: States) -> str:
        batched = "batched" if rank == 3 else "unbatched"
        got = ", ".join(f"{state.dim()}-D" for state in states)
        return f"For {batched} {rank}-D input, hx and cx should also be {rank}-D but got ({got}) tensors"


class LSTMCell(TorchTwin, torch.nn.LSTMCell):
    """Drop-in for torch.nn.LSTMCell on the fused kernels."""

    torch_class = torch.nn.LSTMCell

    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:
        """Input (B, I) or (I,), hx = (h, c) of (B, H) or (H,) -> new (h, c)."""
        rank = input.dim()
        if rank not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {rank}D instead")
        h, c = (None, None) if hx is None else hx
        for index, state in enumerate((h, c)):
            if state is not None and state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
        if rank == 2:
            return self._step(input, h, c)
        if h is not None and c is not None:
            h, c = h.unsqueeze(0), c.unsqueeze(0)
        h, c = self._step(input.unsqueeze(0), h, c)
        return h.squeeze(0), c.squeeze(0)

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> Pair:
        check_cell_sizes(self, x, (h, c))
        return ops.lstm_cell(x, (h, c), *read_weights(self, CELL_WEIGHTS))
