"""One text, token by token, without the cost of transformers' generate()."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm.models.rnn.sampling import Sampling
from fastlm.nn import Stream

# Of new tokens: below, narrowing the output layer's weights costs more than it saves.
_WORTH_NARROWING = 16


class Engine:
    """A model at batch 1, with its weights packed once: tokens in, the output layer's input (1, W) out."""

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


class _Argmax:
    """The most likely token by a compiled search that reads a quarter of the output layer's memory."""

    def __init__(self, head: torch.nn.Linear) -> None:
        # Dense, and kept: the search reads them by address.
        self._weight, self._bias = (tensor.detach().contiguous() for tensor in (head.weight, head.bias))
        make = {torch.float32: "ArgmaxFloat32", torch.float64: "ArgmaxFloat64"}[self._weight.dtype]
        addresses = (self._weight.data_ptr(), self._bias.data_ptr())
        self._run = getattr(_native.module, make)(*self._weight.shape, *addresses).run

    def __call__(self, hidden: Tensor) -> int:
        return self._run(hidden.data_ptr())


def _chooser(head: torch.nn.Linear, sampling: Sampling | None, max_new_tokens: int) -> Callable[[Tensor], int]:
    """What makes a token of the output layer's input."""
    if sampling is not None:
        return lambda hidden: sampling.draw(head(hidden)[0])
    narrows = head.weight.dtype in (torch.float32, torch.float64) and max_new_tokens >= _WORTH_NARROWING
    if narrows and _native.module is not None:
        return _Argmax(head)
    return lambda hidden: int(head(hidden).argmax())


@torch.inference_mode()
def stream_tokens(
    model: Any, prompt: Tensor, max_new_tokens: int, sampling: Sampling | None, ends: Sequence[int]
) -> Iterator[int]:
    """Yields up to max_new_tokens after the prompt (T,), no more after one of `ends`; without sampling, greedy."""
    if max_new_tokens == 0:
        return
    engine = Engine(model)
    choose = _chooser(model.lm_head, sampling, max_new_tokens)
    hidden = engine.prefill(prompt)
    for left in range(max_new_tokens, 0, -1):
        token = choose(hidden)
        yield token
        if left == 1 or token in ends:
            return
        hidden = engine.step(token)


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
