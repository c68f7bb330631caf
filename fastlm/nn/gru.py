"""GRU and GRUCell with the interface of torch.nn."""

from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn._cell import CELL_WEIGHTS, check_cell_sizes
from fastlm.nn._rnn import Recurrent, States
from fastlm.nn._twin import TorchTwin, read_weights


class GRU(Recurrent):
    """Drop-in for torch.nn.GRU (same arguments, parameters, results and errors) on the fused kernels.

    Unlike there, results under autocast have the autocast dtype, and h_n never aliases output.
    """

    torch_class = torch.nn.GRU
    _state_size_texts = ("Expected hidden size {}, got {}",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """Input (T, B, I), (B, T, I) with batch_first, (T, I) or PackedSequence -> output in the same form, h_n."""
        output, finals = self._run(input, None if hx is None else (hx,))
        return output, finals[0]

    def _layer(self, x: Tensor, states: States, weights: list[Tensor], reverse: bool) -> tuple[Tensor, States]:
        output, h_n = ops.gru(x, states[0], *weights, reverse=reverse)
        return output, (h_n,)

    def _state_widths(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _state_rank_text(self, rank: int, states: States) -> str:
        batched = "batched" if rank == 3 else "unbatched"
        return f"For {batched} {rank}-D input, hx should also be {rank}-D but got {states[0].dim()}-D tensor"


class GRUCell(TorchTwin, torch.nn.GRUCell):
    """Drop-in for torch.nn.GRUCell on the fused kernels."""

    torch_class = torch.nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Input (B, I) or (I,), hx (B, H) or (H,) -> new hx."""
        rank = input.dim()
        if rank not in (1, 2):
            raise ValueError(f"GRUCell: Expected input to be 1D or 2D, got {rank}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"GRUCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if rank == 1:
            return self._step(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0)).squeeze(0)
        return self._step(input, hx)

    def _step(self, x: Tensor, h: Tensor | None) -> Tensor:
        check_cell_sizes(self, x, () if h is None else (h,))
        return ops.gru_cell(x, h, *read_weights(self, CELL_WEIGHTS))
