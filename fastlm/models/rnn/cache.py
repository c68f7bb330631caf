"""The state that a recurrent language model carries from call to call."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class RNNCache:
    """The cache of a recurrent model: one state of constant size, not one entry per token.

    As any cache of transformers it is updated in place by each forward that gets it with use_cache, and returned. The
    tensors in it are never written to: another cache of the same tensors (`copy.copy`, `detach`) keeps its state.

    Args:
        h (Tensor, optional): (L, B, H), the hidden state. Default: None, zeros at the first forward.
        c (Tensor, optional): (L, B, H), the cell state; of an LSTM only. Default: None.
        seq_length (int): steps seen so far, padding among them. Default: 0.

    Attributes:
        h, c, seq_length: as above; may be set.

    Truncated back-propagation through time: pass `output.cache.detach()` (`past_key_values` before transformers 5.24)
    on to the next batch. To save and load: `torch.save(cache.state_dict(), path)`, `RNNCache(**torch.load(path))`.
    """

    # Read by transformers' generate(), which cuts off the tokens that a cache has seen unless it is all linear.
    is_compileable = False
    is_linear = (False,)

    def __init__(self, h: Tensor | None = None, c: Tensor | None = None, seq_length: int = 0) -> None:
        if h is None and c is not None:
            raise ValueError("h: expected a Tensor where c is given, got None")
        self.h, self.c, self.seq_length = h, c, seq_length

    @property
    def hx(self) -> Any:
        """The state in the form of the layers' hx: h, for an LSTM (h, c), None before the first step."""
        return self.h if self.c is None else (self.h, self.c)

    def update(self, hx: Any, steps: int) -> None:
        """Takes what the layers ended in after so many more steps."""
        self.h, self.c = (hx, None) if isinstance(hx, Tensor) else hx
        self.seq_length += steps

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Steps seen so far."""
        return self.seq_length

    def state_dict(self) -> dict[str, Any]:
        """What the constructor takes, to save with `torch.save`."""
        return {"h": self.h, "c": self.c, "seq_length": self.seq_length}

    def detach(self) -> "RNNCache":
        """The same state, cut off from the graph that made it."""
        return self._map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> "RNNCache":
        """The state under another device or dtype, with the arguments of `Tensor.to`."""
        return self._map(lambda state: state.to(*args, **kwargs))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place, row i becomes what row beam_idx[i] was; beam search calls it."""
        self._replace(self._map(lambda state: state.index_select(1, beam_idx.to(state.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """In place, every row `repeats` times: one prompt's state for num_return_sequences."""
        self._replace(self._map(lambda state: state.repeat_interleave(repeats, dim=1)))

    def reset(self) -> None:
        """Back to the beginning of a text."""
        self.h, self.c, self.seq_length = None, None, 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> "RNNCache":
        h, c = (None if state is None else function(state) for state in (self.h, self.c))
        return RNNCache(h, c, self.seq_length)

    def _replace(self, other: "RNNCache") -> None:
        self.h, self.c = other.h, other.c

    def __repr__(self) -> str:
        shape = None if self.h is None else tuple(self.h.shape)
        return f"RNNCache(h={shape}, c={None if self.c is None else shape}, seq_length={self.seq_length})"
