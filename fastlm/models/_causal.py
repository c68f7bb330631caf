"""What causal language models do after their layers, whatever these are: loss, logits, one text as a stream."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from fastlm import ops
from fastlm.models import _generation
from fastlm.models._sampling import Sampling
from fastlm.nn._linear import is_linear, linear

IGNORE_INDEX = -100
_MISSING = ("output_hidden_states", "output_attentions")


def warn_of_missing(arguments: dict[str, Any]) -> None:
    """Tells once of each output of transformers' models that is asked for and that these do not have."""
    for name in _MISSING:
        if arguments.get(name):
            logging.get_logger("transformers.models.fastlm").warning_once(
                f"{name}: fastlm's models do not return these; the option is ignored"
            )


class CausalLM:
    """Mixin of a PreTrainedModel whose output layer is lm_head."""

    lm_head: nn.Linear
    training: bool
    config: Any
    generation_config: Any

    def _make_engine(self) -> _generation.Engine:
        raise NotImplementedError  # every model says it

    def _score(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        skip_logits: bool | None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits, each None where it is not asked for, of lm_head's input (B, T, W)."""
        warn_of_missing(kwargs)
        loss = logits = None
        # Not an argument of forward: the Trainer would evaluate only on data that have every argument with "label" in
        # its name.
        if labels is not None or shift_labels is not None:
            loss = self._compute_loss(hidden, labels, shift_labels, **kwargs)
        elif skip_logits:
            raise ValueError("skip_logits: expected labels or shift_labels with skip_logits=True")
        if not (self.training and loss is not None if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = linear(self.lm_head, hidden[:, kept])
        return loss, logits

    def _compute_loss(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> Tensor:
        """Of hidden (B, T, W), which is read in the order of its memory."""
        name, target = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        assert target is not None
        if target.shape != hidden.shape[:2]:
            raise ValueError(f"{name}: expected shape {tuple(hidden.shape[:2])} (B, T), got {tuple(target.shape)}")
        if shift_labels is None:
            target = F.pad(target[:, 1:], (0, 1), value=ignore_index)
        if hidden.stride(0) < hidden.stride(1):
            hidden, target = hidden.transpose(0, 1), target.t()
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": "mean" if num_items_in_batch is None else "sum",
            "label_smoothing": label_smoothing,
        }
        head = self.lm_head
        if is_linear(head):
            loss = ops.linear_cross_entropy(hidden, head.weight, target, head.bias, **options)
        else:
            loss = F.cross_entropy(head(hidden).flatten(0, 1).float(), target.flatten(), **options)
        if num_items_in_batch is None:
            return loss
        return loss / num_items_in_batch

    def stream_tokens(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        suppress_tokens: Sequence[int] = (),
    ) -> Iterator[int]:
        """Yields the tokens that `generate` would append to one prompt, each as soon as it is known, at less cost.

        Weights must not change meanwhile. Dropout plays no part. A transformer goes on where its context is full: it
        reads the newer half of it anew.

        Args:
            input_ids (Tensor or sequence of int): the prompt, (T,) or (1, T), at least one token.
            max_new_tokens (int): yield no more than this.
            do_sample (bool): draw from the distribution; False takes the most likely token. Default: False.
            temperature (float): divides the logits, above 0. Default: 1.
            top_k (int): draw among so many most likely tokens; 0: among all. Default: 0.
            top_p (float): draw among the fewest most likely tokens that have this probability together. Default: 1.
            eos_token_id (int or sequence of int, optional): the last token to yield. Default: None, those of
                generation_config; () for none.
            generator (torch.Generator, optional): to draw with. Default: torch's own.
            suppress_tokens (sequence of int): never yielded. Default: none.

        Raises:
            ValueError: an empty prompt, more than one prompt, a number out of range, or a model that is not on the CPU.
        """
        if eos_token_id is None:
            eos_token_id = self.generation_config.eos_token_id
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        sampling = Sampling(temperature, top_k, top_p, generator) if do_sample else None
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected a whole number of at least 0, got {max_new_tokens!r}")
        prompt = _generation.check_prompt(input_ids, self.config.vocab_size)
        suppressed = list(suppress_tokens)
        if not all(isinstance(token, int) and 0 <= token < self.config.vocab_size for token in suppressed):
            raise ValueError(
                f"suppress_tokens: expected whole numbers from 0 to {self.config.vocab_size - 1}, got {suppressed}"
            )
        if len(set(suppressed)) == self.config.vocab_size:
            raise ValueError("suppress_tokens: expected to leave a token, got all")
        make = self._make_engine
        return _generation.stream_tokens(make, self.lm_head, prompt, max_new_tokens, sampling, ends, suppressed)
