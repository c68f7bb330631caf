"""LSTM and LSTMCell with the interface of torch.nn."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlm import _backend, ops
from fastlm.nn._cell import CELL_WEIGHTS, check_cell_sizes
from fastlm.nn._rnn import Recurrent, Run, States
from fastlm.nn._twin import TorchTwin, read_weights
from fastlm.ops import _common
from fastlm.ops.lstm import NO_PROJECTION, projected_layer
from fastlm.ops.lstm import layer as lstm_layer

Pair = tuple[Tensor, Tensor]


class LSTM(Recurrent):
    """Drop-in for torch.nn.LSTM (same arguments, parameters, results and errors) on the fused kernels.

    With proj_size it runs as torch.nn.LSTM does; what that lacks, and bfloat16, by the plain reference.

    Beyond torch.nn: `forward` takes lengths, reset_mask and return_all_states, and training can drop recurrent weights
    (`weight_dropout`: probability of DropConnect on every weight_hh, one mask a call; Wan et al. 2013, Merity et al.
    2018) and keep one mask of `dropout` for all steps (`locked_dropout`; Gal and Ghahramani 2016). Both are attributes
    that may be set at any time, also after `fastlm.replace`.
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
        *,
        weight_dropout: float = 0.0,
        locked_dropout: bool = False,
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
        self._set_options(weight_dropout, locked_dropout)

    def forward(
        self,
        input: Any,
        hx: Pair | None = None,
        *,
        lengths: Tensor | list[int] | None = None,
        reset_mask: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """Runs all layers over whole sequences.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx (optional): (h0, c0), (L * D, B, H or proj_size) and (L * D, B, H), without B unbatched. Default: zeros.
            lengths (Tensor or list of int, optional): steps of every sequence, (B,), in any order, zero allowed;
                replaces packing. Output past a length is 0, final states are those at it. Default: None, all T.
            reset_mask (Tensor, optional): bool, (T, B), or (B, T) with batch_first, (T,) unbatched. True at t starts a
                new segment at t: no state crosses to it, either way. Not with a PackedSequence. Default: None.
            return_all_states (bool): also return the states of every layer after every step. Default: False.

        Returns:
            output in the form of input, (h_n, c_n) in the form of hx, and with return_all_states (h, c) of every layer:
            (L * D, T, B, *) each, time and batch as in input, (L * D, rows, *) for a PackedSequence.

        Raises:
            RuntimeError, ValueError: as torch.nn.LSTM, and for impossible lengths or reset_mask.
        """
        states = None if hx is None else (hx[0], hx[1])
        nothing = lengths is None and reset_mask is None and not return_all_states
        if self.proj_size and nothing and self._as_in_torch(input, states):
            _backend.fall_back(NO_PROJECTION)
            return torch.nn.LSTM.forward(self, input, states)  # type: ignore[call-overload]
        output, finals, histories = self._run(input, states, lengths, reset_mask, return_all_states)
        if histories is None:
            return output, tuple(finals)
        return output, tuple(finals), tuple(histories)

    def _as_in_torch(self, input: Any, states: Any) -> bool:
        """Whether torch's own loop, faster than the reference, is all that a call with a projection needs.

        Not in bfloat16, whose sums torch rounds there at every step.
        """
        if self.training and (self.weight_dropout > 0 or (self.locked_dropout and self.dropout > 0)):
            return False
        x = input.data if isinstance(input, PackedSequence) else input
        return _common.is_plain(x, *(states or ()), *self._flat_weights) and x.dtype != torch.bfloat16

    def _layer(
        self,
        x: Tensor,
        states: States,
        weights: list[Tensor],
        sequences: _common.Sequences,
        reverse: bool,
        every: bool,
    ) -> Run:
        h0, c0 = states
        b_ih, b_hh = weights[2:4] if self.bias else (None, None)
        w_ih, w_hh = weights[:2]
        if self.proj_size:
            run = projected_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, weights[-1], sequences, reverse)
        else:
            run = lstm_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, sequences, reverse, every)
        output, h_n, c_n, cells = run
        return output, (h_n, c_n), (output, cells) if every else None

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
