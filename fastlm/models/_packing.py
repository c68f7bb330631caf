"""Several texts in one row, one after another, which position_ids tell apart (transformers' padding-free batches)."""

import torch
from torch import Tensor


def find_starts(position_ids: Tensor | None, batch: int, steps: int) -> Tensor | None:
    """Where a text begins behind another one: bool (B, T), where positions do not rise by one; None if nowhere.

    Raises:
        TypeError: position_ids are no Tensor.
        ValueError: position_ids, (B, T) or (1, T), have another shape.
    """
    if position_ids is None:
        return None
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids: expected a Tensor, got {type(position_ids).__name__}")
    if position_ids.shape not in ((batch, steps), (1, steps)):
        raise ValueError(f"position_ids: expected shape ({batch}, {steps}), got {tuple(position_ids.shape)}")
    starts = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=False)
    # What depends on values would break a compiled graph.
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return starts.expand(batch, steps)


def causal_within(starts: Tensor) -> Tensor:
    """A mask (B, 1, T, T): what a token sees of its own text up to itself."""
    text = starts.cumsum(1)
    return (text[:, :, None] == text[:, None, :]).tril()[:, None]
