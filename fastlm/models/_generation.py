"""One text, token by token, without the cost of transformers' generate()."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastlm import _backend, _native
from fastlm.models._sampling import Sampling
from fastlm.nn._linear import is_linear

# Of new tokens: below, narrowing the output layer's weights costs more than it saves.
_WORTH_NARROWING = 16


class Engine(Protocol):
    """A model at batch 1: tokens in, the output layer's input (1, W) out."""

    def prefill(self, tokens: Tensor) -> Tensor:
        """After a prompt (T,)."""

    def step(self, token: int) -> Tensor:
        """After one more token."""


class _Argmax:
    """The most likely token by a compiled search that reads a quarter of the output layer's memory."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        # Dense, and kept: the search reads them by address.
        self._weight, self._bias = weight.contiguous(), bias.contiguous()
        make = {torch.float32: "ArgmaxFloat32", torch.float64: "ArgmaxFloat64"}[weight.dtype]
        addresses = (self._weight.data_ptr(), self._bias.data_ptr())
        self._run = getattr(_native.module, make)(*weight.shape, *addresses).run

    def __call__(self, hidden: Tensor) -> int:
        # Autocast around the call, for one, may have made it another type.
        return self._run(hidden.to(self._weight.dtype).contiguous().data_ptr())


def _chooser(
    head: torch.nn.Linear, sampling: Sampling | None, max_new_tokens: int, suppressed: Sequence[int]
) -> Callable[[Tensor], int]:
    """What makes a token of the output layer's input."""
    banned = torch.tensor(suppressed, dtype=torch.long)
    if not is_linear(head):
        draw = (lambda logits: int(logits.argmax())) if sampling is None else sampling.draw
        return lambda hidden: draw(head(hidden)[0].index_fill(0, banned, -torch.inf))
    weight = head.weight.detach()
    bias = weight.new_zeros(weight.shape[0]) if head.bias is None else head.bias.detach()
    if suppressed:
        bias = bias.index_fill(0, banned, -torch.inf)
    elif head.bias is None and sampling is not None:
        bias = None

    def logits(hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, weight, bias)[0]

    if sampling is not None:
        return lambda hidden: sampling.draw(logits(hidden))
    narrows = weight.dtype in (torch.float32, torch.float64) and max_new_tokens >= _WORTH_NARROWING
    if narrows and _backend.has_kernels():
        return _Argmax(weight, bias)
    return lambda hidden: int(logits(hidden).argmax())


@torch.inference_mode()
def stream_tokens(
    make_engine: Callable[[], Engine],
    head: torch.nn.Linear,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None,
    ends: Sequence[int],
    suppressed: Sequence[int],
) -> Iterator[int]:
    """Yields up to max_new_tokens after the prompt (T,), no more after one of `ends`; without sampling, greedy."""
    if max_new_tokens == 0:
        return
    engine = make_engine()
    choose = _chooser(head, sampling, max_new_tokens, suppressed)
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
