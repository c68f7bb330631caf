"""A recurrent model at batch 1, for `stream_tokens`."""

from typing import Any

from torch import Tensor, nn

from fastlm.nn import Stream


class _Layers:
    """Layers that are no torch.nn.RNNBase, such as quantised ones: called as they are, in place of a `Stream`."""

    def __init__(self, layers: Any) -> None:
        self._layers, self._state = layers, None

    def chunk(self, x: Tensor) -> Tensor:
        """(1, T, E) -> (1, T, H)."""
        output, self._state = self._layers(x, self._state)
        return output

    def step(self, x: Tensor) -> Tensor:
        """(1, E) -> (1, H)."""
        return self.chunk(x[None])[0]


class Engine:
    """A model with its weights packed once: tokens in, the output layer's input (1, W) out."""

    def __init__(self, model: Any) -> None:
        self._embeddings = model.model.embed_tokens.weight.unsqueeze(1)  # (V, 1, E)
        layers = model.model.rnn
        self._stream = Stream(layers, 1) if isinstance(layers, nn.RNNBase) else _Layers(layers)
        self._projection = model.projection

    def prefill(self, tokens: Tensor) -> Tensor:
        """After a prompt (T,)."""
        return self._projection(self._stream.chunk(self._embeddings[tokens].transpose(0, 1))[:, -1])

    def step(self, token: int) -> Tensor:
        """After one more token."""
        return self._projection(self._stream.step(self._embeddings[token]))
