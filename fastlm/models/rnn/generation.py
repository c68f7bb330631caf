"""One text, token by token, without the cost of transformers' generate()."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.models.rnn.sampling import Sampling
from fastlm.nn import Stream


class Engine:
    """A model at batch 1, with its weights packed once: tokens in, the logits (V,) of the next one out."""

    def __init__(self, model: Any) -> None:
        self._embeddings = model.model.embed_tokens.weight.unsqueeze(1)  # (V, 1, E)
        self._stream = Stream(model.model.rnn, 1)
        self._projection, self._head = model.projection, model.lm_head

    def prefill(self, tokens: Tensor) -> Tensor:
        """After a prompt (T,)."""
        return self._logits(self._stream.chunk(self._embeddings[tokens].transpose(0, 1))[:, -1])

    def step(self, token: int) -> Tensor:
        """After one more token."""
        return self._logits(self._stream.step(self._embeddings[token]))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._projection(hidden))[0]


@torch.inference_mode()
def stream_tokens(
    model: Any, prompt: Tensor, max_new_tokens: int, sampling: Sampling | None, ends: Sequence[int]
) -> Iterator[int]:
    """Yields up to max_new_tokens after the prompt (T,), no more after one of `ends`; without sampling, greedy."""
    if max_new_tokens == 0:
        return
    engine = Engine(model)
    logits = engine.prefill(prompt)
    for left in range(max_new_tokens, 0, -1):
        token = int(logits.argmax()) if sampling is None else sampling.draw(logits)
        yield token
        if left == 1 or token in ends:
            return
        logits = engine.step(token)


def check_prompt(tokens: Tensor | Sequence[int], vocab_size: int) -> Tensor:
    """A prompt given as (T,) or (1, T), as (T,)."""
    prompt = torch.as_tensor(tokens)
    prompt = prompt[0] if prompt.dim() == 2 and prompt.shape[0] == 1 else prompt
    whole = not (prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool)
    if not whole or prompt.dim() != 1 or prompt.shape[0] == 0:
        raise ValueError(f"input_ids: expected whole numbers (T,) or (1, T), T at least 1, got {prompt}")
    low, high = prompt.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids: expected 0 to {vocab_size - 1} (vocab_size - 1), got {int(low)} to {int(high)}")
    return prompt.long()
