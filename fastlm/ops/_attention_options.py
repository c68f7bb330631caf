"""What follows q, k and v in the ops of attention, once for all who read it."""

from typing import Any, NamedTuple

from torch import Tensor

UNLIMITED = -1  # a window


class Options(NamedTuple):
    """In the order of the schemas, which have the same defaults."""

    scale: float = 1.0
    right: int = UNLIMITED
    keep: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    kv_lengths: Tensor | None = None
    q_starts: Tensor | None = None
    k_starts: Tensor | None = None
    seed: Tensor | None = None
    softcap: float = 0.0
    dropout: float = 0.0
    lower_right: bool = False
    left: int = UNLIMITED

    @classmethod
    def split_last(cls, given: tuple[Any, ...]) -> tuple["Options", bool]:
        """What an op is called with, and the flag behind it: torch leaves out what equals the defaults at the end."""
        whole = len(given) > len(cls._fields)
        return cls(*given[: len(cls._fields)]), bool(given[-1]) if whole else False

    def of_sequence(self, b: int) -> "Options":
        """Those of one of packed sequences."""
        slopes = self.slopes
        return self if slopes is None or slopes.shape[0] == 1 else self._replace(slopes=slopes[b : b + 1])
