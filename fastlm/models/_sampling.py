"""Drawing a token from logits, with the meaning that transformers gives temperature, top_k and top_p."""

import math

import torch
from torch import Tensor


class Sampling:
    """How to draw; the arguments of `stream_tokens`."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature: expected a finite number above 0 (do_sample=False is greedy), got {temperature!r}"
            )
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
            raise ValueError(f"top_k: expected a whole number of at least 0, got {top_k!r}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and up to 1, got {top_p!r}")
        self._temperature, self._top_k, self._top_p, self._generator = temperature, top_k, top_p, generator

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities (K,) of the tokens to draw from, by their numbers (K,), or None for all V in order.

        logits: (V,). They need not sum up to 1.
        """
        logits = logits.float()
        logits = (logits - logits.max()) / max(self._temperature, 1e-30)  # the greatest stays 0 at any
        tokens = None
        if 0 < self._top_k < logits.shape[0]:
            logits, tokens = logits.topk(self._top_k)
        elif self._top_p < 1:
            logits, tokens = logits.sort(descending=True)
        probabilities = logits.softmax(0)
        if self._top_p < 1:
            # A token stays where those before it have less than top_p, so the first always does.
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities * (before < self._top_p)
        return probabilities, tokens

    def draw(self, logits: Tensor) -> int:
        """One token from logits (V,)."""
        probabilities, tokens = self.distribution(logits)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return int(drawn if tokens is None else tokens[drawn])
