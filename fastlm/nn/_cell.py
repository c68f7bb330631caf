"""What GRUCell and LSTMCell have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def check_cell_sizes(cell: torch.nn.RNNCellBase, x: Tensor, states: Sequence[Tensor | None]) -> None:
    """Raises torch.nn's errors where x (B, I) or a state (B, H) does not fit the cell; the op checks the rest."""
    batch, input_size = x.shape
    if input_size != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input_size} expected {cell.input_size}")
    for index, state in enumerate(states):
        if state is None:
            continue
        if state.shape[0] != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden{index} batch size {state.shape[0]}")
        if state.dim() > 1 and state.shape[1] != cell.hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {cell.hidden_size}"
            )
