"""What checkers know of the options of attention; nothing at run time."""

from typing import TypedDict

from torch import Tensor


class ScoreOptions(TypedDict, total=False):
    """Keywords of `attention` and `attention_varlen` but return_lse, which settles what they return."""

    causal: str | None
    window: tuple[int, int]
    scale: float | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float


class AttentionOptions(ScoreOptions, total=False):
    """Those of `attention`."""

    mask: Tensor | None
    kv_lengths: Tensor | list[int] | None
