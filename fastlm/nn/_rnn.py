"""Layers, directions, layouts, lengths and dropout around the one-layer operations, for GRU and LSTM alike."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from fastlm.nn._twin import TorchTwin, read_weights
from fastlm.ops import _common

States = Sequence[Any]  # one Tensor per kind of state (h, and c of an LSTM), or None for zeros
# What a layer or a whole module gives: the output, each kind of state after the last step, and after every step or
# None. No NamedTuple, which takes half a microsecond to make: a call of one step would feel it.
Run = tuple[Any, States, States | None]


class Recurrent(TorchTwin, torch.nn.RNNBase):
    """A stack of recurrent layers; a subclass gives one layer and direction, and the texts about its states.

    It derives from RNNBase and not from torch.nn.GRU or LSTM, which dynamo refuses to trace.
    """

    _state_size_texts: ClassVar[tuple[str, ...]]

    # Of the class, for modules that fastlm.replace made without a constructor.
    weight_dropout: float = 0.0
    locked_dropout: bool = False

    def _set_options(self, weight_dropout: float, locked_dropout: bool) -> None:
        number = isinstance(weight_dropout, int | float) and not isinstance(weight_dropout, bool)
        if not number or not 0 <= weight_dropout <= 1:
            raise ValueError(f"weight_dropout: expected a number from 0 to 1, got {weight_dropout!r}")
        self.weight_dropout, self.locked_dropout = weight_dropout, locked_dropout

    def _layer(
        self,
        x: Tensor,
        states: States,
        weights: list[Tensor],
        sequences: _common.Sequences,
        reverse: bool,
        every: bool,
    ) -> Run:
        """One layer and direction over time-major x (T, B, I) or packed rows.

        States are (B, *) or (1, B, *), finals (1, B, *).
        """
        raise NotImplementedError  # GRU and LSTM say it

    def _state_rank_text(self, rank: int, states: States) -> str:
        """The error text where states do not have the rank of the input."""
        raise NotImplementedError  # GRU and LSTM say it

    def _run(self, input: Any, states: States | None, lengths: Any, reset_mask: Any, every: bool) -> Run:
        """Runs the whole module: states and finals (L * D, B, *), one tensor per kind of state."""
        if len(self._all_weights) == 1 and lengths is None and reset_mask is None and not every:
            run = self._run_plain(input, states)
            if run is not None:
                return run
        if isinstance(input, PackedSequence):
            for name, value in (("lengths", lengths), ("reset_mask", reset_mask)):
                if value is not None:
                    raise ValueError(f"{name}: expected None together with a PackedSequence")
            return self._run_packed(input, states, every)
        rank = input.dim()
        if rank == 3:
            if not self.batch_first:
                return self._run_time_major(input, states, lengths, reset_mask, every)
            if isinstance(reset_mask, Tensor):
                _common.check_shape("reset_mask", reset_mask, tuple(input.shape[:2]), "(B, T)")
                reset_mask = reset_mask.transpose(0, 1)
            # The copy is what the kernels would make of it, and kept for backward: the input may change, as in torch.
            x = input.transpose(0, 1).contiguous()
            output, finals, histories = self._run_time_major(x, states, lengths, reset_mask, every)
            return output.transpose(0, 1), finals, _each(histories, lambda state: state.transpose(1, 2))
        if rank != 2:
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {rank}D instead")
        return self._run_unbatched(input, states, lengths, reset_mask, every)

    def _run_plain(self, x: Any, states: States | None) -> Run | None:
        """One layer over time-major sequences, with no checks but the op's: a call of one step would feel them.

        None for what is not that plain, or wrong: the longer way has torch's error for it.
        """
        if type(x) is not Tensor or x.dim() != 3 or self.batch_first or torch.compiler.is_compiling():
            return None
        if self.training and self.weight_dropout > 0:
            return None
        if states is None:
            states = [None] * len(self._state_size_texts)
        else:
            for state in states:
                if state.dim() != 3:
                    return None
        try:
            weights = read_weights(self, self._all_weights[0])
            return self._layer(x, states, weights, _common.ALL_STEPS, False, False)
        except (RuntimeError, TypeError, ValueError):
            return None

    def _run_unbatched(self, input: Tensor, states: States | None, lengths: Any, reset_mask: Any, every: bool) -> Run:
        if lengths is not None:
            raise ValueError("lengths: expected None with an unbatched input (T, I)")
        if isinstance(reset_mask, Tensor):
            _common.check_shape("reset_mask", reset_mask, (input.shape[0],), "(T,)")
            reset_mask = reset_mask.unsqueeze(1)
        if states is not None:
            self._check_state_ranks(2, states)
            states = [state.unsqueeze(1) for state in states]
        output, finals, histories = self._run_time_major(input.unsqueeze(1), states, None, reset_mask, every)
        finals = [final.squeeze(1) for final in finals]
        return output.squeeze(1), finals, _each(histories, lambda state: state.squeeze(2))

    def _run_time_major(self, x: Tensor, states: States | None, lengths: Any, reset_mask: Any, every: bool) -> Run:
        seq_len, batch, _ = x.shape
        layers = [read_weights(self, names) for names in self._all_weights]
        self._check_sizes(x, layers[0][0].dtype, None, batch, states)
        if seq_len == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        sequences = _common.check_sequences(x, lengths, None, reset_mask)
        return self._stack_layers(x, states, layers, sequences, every)

    def _run_packed(self, packed: PackedSequence, states: States | None, every: bool) -> Run:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        layers = [read_weights(self, names) for names in self._all_weights]
        self._check_sizes(data, layers[0][0].dtype, batch_sizes, int(batch_sizes[0]), states)
        if states is not None and sorted_indices is not None:
            states = [state.index_select(1, sorted_indices) for state in states]
        sequences = _common.Sequences(None, batch_sizes, None)
        output, finals, histories = self._stack_layers(data, states, layers, sequences, every)
        if unsorted_indices is not None:
            finals = [final.index_select(1, unsorted_indices) for final in finals]
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), finals, histories

    def _stack_layers(
        self,
        x: Tensor,
        states: States | None,
        layers: list[list[Any]],
        sequences: _common.Sequences,
        every: bool,
    ) -> Run:
        missing: States = [None] * len(self._state_size_texts)
        drops = self.training and self.weight_dropout > 0
        if len(layers) == 1 and not drops:
            initial = missing if states is None else states
            output, finals, histories = self._layer(x, initial, layers[0], sequences, False, every)
            # What a caller does to the histories is not to be seen in the output.
            return output, finals, _each(histories, lambda h: (h.clone() if h is output else h).unsqueeze(0))
        directions = 2 if self.bidirectional else 1
        runs: list[Run] = []
        for index, weights in enumerate(layers):
            initial = missing if states is None else [state[index] for state in states]
            if drops:
                weights = [weights[0], dropout(weights[1], self.weight_dropout), *weights[2:]]
            runs.append(self._layer(x, initial, weights, sequences, index % directions == 1, every))
            if (index + 1) % directions == 0:
                outputs = [output for output, _, _ in runs[-directions:]]
                x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
                if self.dropout and self.training and index + 1 < len(layers):
                    x = self._drop(x, sequences.batch_sizes)
        finals = [torch.cat(final) for final in zip(*(run[1] for run in runs), strict=True)]
        if not every:
            return x, finals, None
        return x, finals, [torch.stack(each) for each in zip(*(run[2] or () for run in runs), strict=True)]

    def _drop(self, x: Tensor, batch_sizes: Tensor | None) -> Tensor:
        """Dropout between layers; locked, with one mask for all steps of a sequence (Gal and Ghahramani 2016)."""
        if not self.locked_dropout:
            return dropout(x, self.dropout)
        batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        mask = dropout(x.new_ones(batch, x.shape[-1]), self.dropout)
        if batch_sizes is not None:
            mask = torch.cat([mask[:size] for size in batch_sizes.tolist()])
        return x * mask

    def _check_sizes(
        self, input: Tensor, weight_dtype: torch.dtype, batch_sizes: Tensor | None, batch: int, states: States | None
    ) -> None:
        if input.shape[-1] != self.input_size or input.dtype != weight_dtype:
            self.check_input(input, batch_sizes)  # torch's own texts; passes where an autocast is to change the dtype
        if states is None:
            return
        layers = len(self._all_weights)
        for state, width, text in zip(states, self._state_widths(), self._state_size_texts, strict=True):
            if state.shape != (layers, batch, width):
                self._check_state_ranks(3, states)
                self.check_hidden_size(state, (layers, batch, width), text)

    def _check_state_ranks(self, rank: int, states: States) -> None:
        if any(state.dim() != rank for state in states):
            raise RuntimeError(self._state_rank_text(rank, states))

    def _state_widths(self) -> tuple[int, ...]:
        """The size of each kind of state."""
        raise NotImplementedError  # GRU and LSTM say it

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """Every weight in torch's order, read by name each time, so that nothing here can be out of date."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        # RNNBase assigns its cached list here; the module may also bring one from its time as a torch.nn module.
        self.__dict__.pop("_flat_weights", None)

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels need no flat buffer."""

    def extra_repr(self) -> str:
        """As of torch.nn, and the options that it does not have."""
        text = super().extra_repr()
        if self.weight_dropout:
            text += f", weight_dropout={self.weight_dropout}"
        return text + (", locked_dropout=True" if self.locked_dropout else "")

    def _check_torch_form(self) -> None:
        for name in ("weight_dropout", "locked_dropout"):
            if getattr(self, name):
                raise ValueError(f"{name}: torch.nn.{self.mode} has no such option; unset it first")


def _each(states: States | None, function: Any) -> States | None:
    return None if states is None else [function(state) for state in states]
