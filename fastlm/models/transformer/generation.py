"""A transformer at batch 1, for `stream_tokens`."""

from typing import Any

import torch
from torch import Tensor


class StaticCache:
    """Keys and values of one text, written into memory that is as long as the context; a cache of the layers."""

    def __init__(self, config: Any, like: Tensor) -> None:
        width = config.hidden_size // config.num_heads
        shape = (2, 1, config.num_heads, config.max_position_embeddings, width)
        self._states = [like.new_empty(shape).unbind(0) for _ in range(config.num_layers)]
        self.length = 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Takes those of new tokens (1, H, T, D); returns all."""
        keys, values = self._states[layer]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        if layer == len(self._states) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]


class Engine:
    """Tokens in, the output layer's input (1, E) out. Where the context is full, its newer half is read anew."""

    def __init__(self, model: Any) -> None:
        self._model = model.model
        if model.device.type != "cpu":
            raise ValueError(f"stream_tokens: expected a model on the CPU, got one on {model.device}")
        self._context = model.config.max_position_embeddings
        self._cache = StaticCache(model.config, self._model.embed_tokens.weight)
        self._tokens: list[int] = []

    def prefill(self, tokens: Tensor) -> Tensor:
        """After a prompt (T,); of a longer one than the context, after its end."""
        if len(tokens) > self._context:
            tokens = tokens[-max(1, self._context // 2) :]
        self._tokens = tokens.tolist()
        self._cache.length = 0
        return self._read(tokens)

    def step(self, token: int) -> Tensor:
        """After one more token."""
        self._tokens.append(token)
        if len(self._tokens) > self._context:
            return self.prefill(torch.tensor(self._tokens))
        return self._read(torch.tensor([token]))

    def _read(self, tokens: Tensor) -> Tensor:
        embeddings = self._model.embed_tokens(tokens[None])
        return self._model.run_layers(embeddings, None, None, self._cache, self._cache.length, 0.0)[:, -1]
