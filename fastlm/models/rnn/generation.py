"""A recurrent model at batch 1, for `stream_tokens`."""

from typing import Any

from torch import Tensor

from fastlm.nn import Stream


class Engine:
    """A model with its weights packed once: tokens in, the output layer's input (1, W) out."""

    def __init__(self, model: Any) -> None:
        self._embeddings = model.model.embed_tokens.weight.unsqueeze(1)  # (V, 1, E)
        self._stream = Stream(model.model.rnn, 1)
        self._projection = model.projection

    def prefill(self, tokens: Tensor) -> Tensor:
        """After a prompt (T,)."""
        return self._projection(self._stream.chunk(self._embeddings[tokens].transpose(0, 1))[:, -1])

    def step(self, token: int) -> Tensor:
        """After one more token."""
        return self._projection(self._stream.step(self._embeddings[token]))
