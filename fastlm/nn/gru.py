"""GRU and GRUCell with the interface of torch.nn."""

from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn._cell import CELL_WEIGHTS, check_cell_sizes
from fastlm.nn._rnn import Recurrent, Run, States
from fastlm.nn._twin import TorchTwin, read_weights
from fastlm.ops import _common
from fastlm.ops.gru import layer as gru_layer


class GRU(Recurrent):
    """Drop-in for torch.nn.GRU (same arguments, parameters, results and errors) on the fused kernels.

    Unlike there, results under autocast have the autocast dtype, and h_n never aliases output.

    Beyond torch.nn: `forward` takes lengths, reset_mask and return_all_states, and training can drop recurrent weights
    (`weight_dropout`: probability of DropConnect on every weight_hh, one mask a call; Wan et al. 2013, Merity et al.
    2018) and keep one mask of `dropout` for all steps (`locked_dropout`; Gal and Ghahramani 2016). Both are attributes
    that may be set at any time, also after `fastlm.replace`.
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
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dropout: float = 0.0,
        locked_dropout: bool = False,
    ) -> None:
        if proj_size:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )
        self._set_options(weight_dropout, locked_dropout)

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | list[int] | None = None,
        reset_mask: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """Runs all layers over whole sequences.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx (optional): h0, (L * D, B, H), (L * D, H) unbatched. Default: zeros.
            lengths (Tensor or list of int, optional): steps of every sequence, (B,), in any order, zero allowed;
                replaces packing. Output past a length is 0, final states are those at it. Default: None, all T.
            reset_mask (Tensor, optional): bool, (T, B), or (B, T) with batch_first, (T,) unbatched. True at t starts a
                new segment at t: no state crosses to it, either way. Not with a PackedSequence. Default: None.
            return_all_states (bool): also return the states of every layer after every step. Default: False.

        Returns:
            output in the form of input, h_n (L * D, B, H), and with return_all_states h of every layer: (L * D, T, B,
            H), time and batch as in input, (L * D, rows, H) for a PackedSequence.

        Raises:
            RuntimeError, ValueError: as torch.nn.GRU, and for impossible lengths or reset_mask.
        """
        states = None if hx is None else (hx,)
        output, (h_n,), histories = self._run(input, states, lengths, reset_mask, return_all_states)
        return (output, h_n) if histories is None else (output, h_n, histories[0])

    def _layer(
        self,
        x: Tensor,
        states: States,
        weights: list[Tensor],
        sequences: _common.Sequences,
        reverse: bool,
        every: bool,
    ) -> Run:
        w_ih, w_hh = weights[:2]
        b_ih, b_hh = weights[2:] if self.bias else (None, None)
        output, h_n = gru_layer(x, states[0], w_ih, w_hh, b_ih, b_hh, sequences, reverse)
        return output, (h_n,), (output,) if every else None

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
