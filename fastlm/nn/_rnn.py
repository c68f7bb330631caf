"""Layers, directions, layouts and packed sequences around the one-layer operations, for GRU and LSTM alike."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from fastlm.nn._twin import TorchTwin, read_weights

States = Sequence[Any]  # one Tensor per kind of state (h, and c of an LSTM), or None for zeros
# One layer and direction: (x, states (B, *), weights, reverse) -> (output, new states).
Layer = Callable[[Tensor, States, list[Tensor], bool], tuple[Tensor, States]]


class Recurrent(TorchTwin, torch.nn.RNNBase):
    """A stack of recurrent layers; a subclass gives one layer and direction, and the texts about its states.

    It derives from RNNBase and not from torch.nn.GRU or LSTM, which dynamo refuses to trace.
    """

    _state_size_texts: ClassVar[tuple[str, ...]]

    def _layer(self, x: Tensor, states: States, weights: list[Tensor], reverse: bool) -> tuple[Tensor, States]:
        """One layer and direction over time-major x (T, B, I); states and results (B, *)."""
        raise NotImplementedError

    def _state_rank_text(self, rank: int, states: States) -> str:
        """The error text where states do not have the rank of the input."""
        raise NotImplementedError

    def _run(self, input: Any, states: States | None) -> tuple[Any, States]:
        """Runs the whole module: states and results (L * D, B, *), one tensor per kind of state."""
        if isinstance(input, PackedSequence):
            return self._run_packed(input, states)
        rank = input.dim()
        if rank == 3:
            if not self.batch_first:
                return self._run_time_major(input, states)
            output, finals = self._run_time_major(input.transpose(0, 1), states)
            return output.transpose(0, 1), finals
        if rank != 2:
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {rank}D instead")
        if states is not None:
            self._check_state_ranks(2, states)
            states = [state.unsqueeze(1) for state in states]
        output, finals = self._run_time_major(input.unsqueeze(1), states)
        return output.squeeze(1), [final.squeeze(1) for final in finals]

    def _run_time_major(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        seq_len, batch, _ = x.shape
        layers = [read_weights(self, names) for names in self._all_weights]
        self._check_sizes(x, layers[0][0].dtype, None, batch, states)
        if seq_len == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return self._stack_layers(x, states, layers, self._layer)

    def _run_packed(self, packed: PackedSequence, states: States | None) -> tuple[Any, States]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        batch = int(batch_sizes[0])
        layers = [read_weights(self, names) for names in self._all_weights]
        self._check_sizes(data, layers[0][0].dtype, batch_sizes, batch, states)
        if states is None:
            # Unlike one call over equal lengths, a segment may need the zeros of only some rows.
            states = [data.new_zeros(len(layers), batch, width) for width in self._state_widths()]
        elif sorted_indices is not None:
            states = [state.index_select(1, sorted_indices) for state in states]
        output, finals = self._stack_layers(data, states, layers, partial(self._packed_layer, _segments(batch_sizes)))
        if unsorted_indices is not None:
            finals = [final.index_select(1, unsorted_indices) for final in finals]
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), finals

    def _stack_layers(
        self, x: Tensor, states: States | None, layers: list[list[Any]], run_layer: Layer
    ) -> tuple[Tensor, States]:
        missing: States = [None] * len(self._state_size_texts)
        if len(layers) == 1:
            initial = missing if states is None else [state[0] for state in states]
            output, finals = run_layer(x, initial, layers[0], False)
            # In place, for a view would refuse the usual `h_n.detach_()`.
            return output, [final.unsqueeze_(0) for final in finals]
        directions = 2 if self.bidirectional else 1
        outputs: list[Tensor] = []
        all_finals = []
        for index, weights in enumerate(layers):
            initial = missing if states is None else [state[index] for state in states]
            output, finals = run_layer(x, initial, weights, index % directions == 1)
            outputs.append(output)
            all_finals.append(finals)
            if len(outputs) == directions:
                x = output if directions == 1 else torch.cat(outputs, -1)
                outputs = []
                if self.dropout and index + 1 < len(layers):
                    x = dropout(x, self.dropout, self.training)
        return x, [torch.stack(final) for final in zip(*all_finals, strict=True)]

    def _packed_layer(
        self, segments: list[tuple[int, int, int]], x: Tensor, states: States, weights: list[Tensor], reverse: bool
    ) -> tuple[Tensor, States]:
        """One layer and direction over packed x (total, I): one call per segment, hence no padding.

        Rows are sorted by falling length. Those behind a segment's batch have ended by then or, in reverse, not yet
        begun; both ways their states wait.
        """
        outputs = []
        for start, seq_len, batch in reversed(segments) if reverse else segments:
            steps = x[start : start + seq_len * batch].unflatten(0, (seq_len, batch))
            output, finals = self._layer(steps, [state[:batch] for state in states], weights, reverse)
            outputs.append(output.flatten(0, 1))
            # Under autocast only the new rows have its dtype.
            states = [
                torch.cat((final, state[batch:].to(final.dtype))) for final, state in zip(finals, states, strict=True)
            ]
        return torch.cat(outputs[::-1] if reverse else outputs), states

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
        raise NotImplementedError

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


def _segments(batch_sizes: Tensor) -> list[tuple[int, int, int]]:
    """(first packed row, steps, batch) of every stretch of a packed sequence that has one batch size."""
    batches, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    starts = [0, *accumulate((batches * counts).tolist())]
    return list(zip(starts, counts.tolist(), batches.tolist(), strict=False))
