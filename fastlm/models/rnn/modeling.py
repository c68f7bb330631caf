"""RNNModel and RNNForCausalLM: embedding, GRU or LSTM stack, output layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from fastlm.models._cache import given_cache
from fastlm.models._causal import CausalLM, warn_of_missing
from fastlm.models._packing import find_starts
from fastlm.models.rnn.cache import RNNCache
from fastlm.models.rnn.configuration import RNNConfig
from fastlm.models.rnn.generation import Engine
from fastlm.nn import GRU, LSTM, Dropout


class RNNPreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config_class = RNNConfig
    base_model_prefix = "model"
    # Assisted generation takes tokens back, which a state cannot; transformers then refuses it.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws weights as torch.nn does; embeddings that are tied, as the output layer that they also are."""
        if isinstance(module, nn.Embedding) and self.config.tie_word_embeddings:
            bound = module.embedding_dim**-0.5
            initialization.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.Embedding | nn.Linear | nn.RNNBase):
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes an RNNCache


class RNNModel(RNNPreTrainedModel):
    """The embedding and the recurrent stack of an `RNNConfig`.

    Initial weights have the distributions of torch.nn's modules; tied embeddings are U(-1, 1) / sqrt(E).
    `fastlm.restore(model)` puts the stack on torch.nn.GRU or LSTM.
    """

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.dropout = Dropout(config.dropout)
        self.rnn = (GRU if config.cell == "gru" else LSTM)(
            config.embedding_size,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: RNNCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the stack from the state in cache, or from zeros.

        Args:
            input_ids (Tensor, optional): (B, T), integers; or inputs_embeds.
            attention_mask (Tensor, optional): (B, T), or (B, S + T) after S cached steps, of which the last T count.
                Where it is 0 the state passes by unchanged and the output is 0. Default: None, all ones.
            cache (RNNCache, optional): state to start in; updated in place unless use_cache is False.
            inputs_embeds (Tensor, optional): (B, T, E).
            use_cache (bool, optional): return the last state. Default: None, the configuration's.
            return_dict (bool, optional): False gives a tuple. Default: None, the configuration's.
            past_key_values (RNNCache, optional): another name of cache.
            **kwargs: position_ids (Tensor), (B, T) or (1, T): without attention_mask, a text begins, from zeros, where
                they do not rise by one. What else transformers passes to other models plays no part; it is told where
                that changes the result.

        Returns:
            BaseModelOutputWithPast: last_hidden_state (B, T, H) of the last layer, cache (None without use_cache;
                past_key_values before transformers 5.24).

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a cache under both names, a mask of another
                shape, the other cell's state.
            TypeError: cache is no RNNCache.
            RuntimeError: a state of another shape.
        """
        warn_of_missing(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            # Laid out by time, as the kernels want it: batch_first then copies nothing.
            inputs_embeds = self.embed_tokens(input_ids.t()).transpose(0, 1)  # type: ignore[union-attr]
        batch, steps, _ = inputs_embeds.shape
        name, cache = given_cache(cache, past_key_values)
        cache = RNNCache() if cache is None else cache
        self._check_cache(name, cache)
        padding = _find_padding(attention_mask, batch, steps, cache.seq_length)
        starts = find_starts(kwargs.get("position_ids"), batch, steps) if attention_mask is None else None
        output, hx = self._run_layers(self.dropout(inputs_embeds), cache.hx, padding, starts)
        keep = self.config.use_cache if use_cache is None else use_cache
        if keep:
            cache.update(hx, steps)
        if not (self.config.return_dict if return_dict is None else return_dict):
            return (output, cache) if keep else (output,)
        return BaseModelOutputWithPast(output, cache if keep else None)

    def _run_layers(self, x: Tensor, hx: Any, padding: "_Padding | None", starts: Tensor | None) -> tuple[Tensor, Any]:
        if starts is not None:
            if not isinstance(self.rnn, GRU | LSTM):
                raise ValueError("position_ids: expected one text in a row after fastlm.restore, got several")
            return self.rnn(x, hx, reset_mask=starts)
        if padding is None:
            return self.rnn(x, hx)
        order = padding.order
        if order is not None:
            x = x.take_along_dim(order[..., None], 1)
        if isinstance(self.rnn, GRU | LSTM):
            output, hx = self.rnn(x, hx, lengths=padding.lengths)
        else:  # torch.nn's, after fastlm.restore
            packed = nn.utils.rnn.pack_padded_sequence(x, padding.lengths.cpu(), True, enforce_sorted=False)
            packed, hx = self.rnn(packed, hx)
            output, _ = nn.utils.rnn.pad_packed_sequence(packed, True, total_length=x.shape[1])
        if order is not None:
            output = output.take_along_dim(order.argsort(1)[..., None], 1)
        return output, hx

    def _check_cache(self, name: str, cache: object) -> None:
        if not isinstance(cache, RNNCache):
            raise TypeError(f"{name}: expected an RNNCache, got {type(cache).__name__}")
        if cache.h is not None and (cache.c is None) != (self.rnn.mode == "GRU"):
            got = "h alone" if cache.c is None else "h and c"
            raise ValueError(f"{name}: expected {self.rnn.mode} states, got {got}")


class _Padding(NamedTuple):
    """Which steps are real: the first `lengths` (B,), after sorting by `order` (B, T) unless that is None."""

    order: Tensor | None
    lengths: Tensor


def _find_padding(mask: Tensor | None, batch: int, steps: int, seen: int) -> _Padding | None:
    """Reads an attention mask; None where every step is real."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (steps, seen + steps):
        widths = f"{steps}" if seen == 0 else f"{steps} or {seen + steps}"
        raise ValueError(f"attention_mask: expected shape ({batch}, {widths}), got {tuple(mask.shape)}")
    real = mask[:, -steps:] != 0
    # What depends on values would break a compiled graph.
    if not torch.compiler.is_compiling():
        if bool(real.all()):
            return None
        if bool((real[:, 1:] <= real[:, :-1]).all()):
            return _Padding(None, real.sum(1))
    return _Padding(torch.argsort(~real, dim=1, stable=True), real.sum(1))


class RNNForCausalLM(CausalLM, RNNPreTrainedModel, GenerationMixin):
    """An `RNNModel` and an output layer with a bias, whose weights may be the embeddings (tie_word_embeddings).

    Initial weights as in `RNNModel`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.model = RNNModel(config)
        self.dropout = Dropout(config.dropout)
        width = config.embedding_size if config.tie_word_embeddings else config.hidden_size
        # Embeddings are E wide and the stack's output H.
        self.projection = nn.Identity() if width == config.hidden_size else nn.Linear(config.hidden_size, width, False)
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        past_key_values: RNNCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next token after each step, and their loss.

        Args:
            input_ids (Tensor, optional): (B, T); or inputs_embeds.
            attention_mask (Tensor, optional): (B, T) or (B, S + T), as of `RNNModel`. Default: None, all ones.
            cache (RNNCache, optional): state to start in. Default: None, zeros.
            inputs_embeds (Tensor, optional): (B, T, E).
            labels (Tensor, optional): (B, T); the target of step t is labels[:, t + 1]. -100 is no target.
            use_cache (bool, optional): return the last state. Default: None, the configuration's.
            logits_to_keep (int or Tensor): compute the logits of this many last steps (0: all), or of these steps.
                The loss takes all steps in any case. Default: 0.
            skip_logits (bool, optional): compute the loss alone, which never holds all logits. Default: None, in
                training with labels.
            past_key_values (RNNCache, optional): another name of cache.
            **kwargs: position_ids as of `RNNModel`.
                shift_labels (Tensor), (B, T): the target of step t is shift_labels[:, t]; it goes before labels.
                num_items_in_batch (int or Tensor) divides the sum of losses in place of the number of targets.
                label_smoothing (default 0) and ignore_index (-100) are those of `ops.linear_cross_entropy`.

        Returns:
            CausalLMOutputWithPast: loss (with labels), logits (B, T, V) or None, cache (None without use_cache;
                past_key_values before transformers 5.24).

        Raises:
            ValueError: as `RNNModel`; labels of another shape than (B, T); skip_logits without labels.
        """
        # A tuple, for transformers' outputs cost as much as a step of a small model.
        positions = kwargs.get("position_ids")
        output, *kept = self.model(
            input_ids, attention_mask, cache, inputs_embeds, use_cache, False, past_key_values, position_ids=positions
        )
        # (T, B, *), as the stack laid it out: neither the projection nor the loss then copies.
        hidden = self.projection(self.dropout(output).transpose(0, 1)).transpose(0, 1)
        loss, logits = self._score(hidden, labels, logits_to_keep, skip_logits, **kwargs)
        return CausalLMOutputWithPast(loss, logits, kept[0] if kept else None)

    def _make_engine(self) -> Engine:
        return Engine(self)
