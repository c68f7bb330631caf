"""TransformerModel and TransformerForCausalLM: the decoder of GPT-2."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from fastlm import ops
from fastlm.models._cache import CACHE_NAMES, given_cache
from fastlm.models._causal import CausalLM, warn_of_missing
from fastlm.models._packing import causal_within, find_starts
from fastlm.models.transformer.configuration import TransformerConfig
from fastlm.models.transformer.generation import Engine
from fastlm.nn._linear import project


class _Call(NamedTuple):
    """What all layers of one forward share."""

    batch: int
    steps: int
    seen: int  # steps before these
    mask: Tensor | None  # broadcasts against (B, H, T, S + T)
    own_mask: bool  # of padding alone, or none: causality is not in it
    cache: Any  # with update(key, value, layer)
    dropout: float


class ResidualLinear(nn.Linear):
    """A linear layer whose output is added to the residual; it differs in its initial weights alone."""


class TransformerAttention(nn.Module):
    """Causal self-attention; one product makes queries, keys and values."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, config.bias)
        self.o_proj = ResidualLinear(config.hidden_size, config.hidden_size, config.bias)

    def forward(self, x: Tensor, call: _Call) -> Tensor:
        """Of x (B T, E), which has the shape of what is returned."""
        # Queries, keys and values are read where they lie. Backward of unbind is one copy; of views by index it is a
        # tensor of zeros each, and sums.
        q, k, v = project(self.qkv_proj, x).view(call.batch, call.steps, 3, self.num_heads, -1).unbind(2)
        output = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call, self.layer)
        return project(self.o_proj, output.transpose(1, 2).reshape(x.shape))  # a view: output lies in memory as q


def _attend(q: Tensor, k: Tensor, v: Tensor, call: _Call, layer: int) -> Tensor:
    if call.cache is not None:
        k, v = call.cache.update(k, v, layer)
    length = call.seen + call.steps
    if call.own_mask and k.shape[2] > length:  # a static cache; what lies behind is not written yet
        k, v = k[:, :, :length], v[:, :, :length]
    if call.mask is None and (call.steps == 1 or call.seen == 0):
        return ops.scaled_dot_product_attention(q, k, v, dropout_p=call.dropout, is_causal=call.steps > 1)
    causal = "lower_right" if call.own_mask else None
    return ops.attention(q, k, v, mask=call.mask, causal=causal, dropout_p=call.dropout)


class TransformerMLP(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size, config.bias)
        self.down_proj = ResidualLinear(4 * config.hidden_size, config.hidden_size, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of x (B T, E), which has the shape of what is returned."""
        return project(self.down_proj, ops.gelu(project(self.up_proj, x)))


class TransformerLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.bias)
        self.self_attn = TransformerAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.bias)
        self.mlp = TransformerMLP(config)

    def forward(self, x: Tensor, call: _Call) -> Tensor:
        """Of x (B T, E), which has the shape of what is returned."""
        x = x + ops.dropout(self.self_attn(self.input_layernorm(x), call), call.dropout)
        return x + ops.dropout(self.mlp(self.post_attention_layernorm(x)), call.dropout)


class TransformerPreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config_class = TransformerConfig
    base_model_prefix = "model"
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = CACHE_NAMES
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws weights as GPT-2's: what is added to the residual is the smaller, the more layers add to it."""
        super()._init_weights(module)
        if isinstance(module, ResidualLinear):
            deviation = self.config.initializer_range / math.sqrt(2 * self.config.num_layers)
            initialization.normal_(module.weight, 0.0, deviation)


class TransformerModel(TransformerPreTrainedModel):
    """Embeddings, layers and last norm of a `TransformerConfig`.

    Initial weights are N(0, 0.02), those of the layers that add to the residual N(0, 0.02 / sqrt(2 layers)); biases 0.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TransformerLayer(config, layer) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.bias)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the layers, after the tokens in cache where there are any.

        Args:
            input_ids (Tensor, optional): (B, T), integers; or inputs_embeds.
            attention_mask (Tensor, optional): (B, S + T) after S cached tokens, 0 for padding; or, with causality in
                it, of 4 dimensions that broadcast against (B, heads, T, keys): bool, or floating to add to the scores.
                Outputs of padding mean nothing. Default: None, all ones.
            position_ids (Tensor, optional): (B, T) or (1, T). Without attention_mask and cached tokens, a text begins
                where they do not rise by one, and sees nothing of those before it. Default: None, the number of tokens
                before that are no padding (with a mask of 4 dimensions, of all tokens before).
            cache (Cache, optional): keys and values of S tokens; updated in place.
            inputs_embeds (Tensor, optional): (B, T, E).
            use_cache (bool, optional): return the keys and values. Default: None, the configuration's, in training
                False.
            return_dict (bool, optional): False gives a tuple. Default: None, the configuration's.
            past_key_values (Cache, optional): another name of cache.
            **kwargs: what transformers passes to other models; plays no part. It is told where that changes the result.

        Returns:
            BaseModelOutputWithPast: last_hidden_state (B, T, E) after the last norm, cache (None without use_cache;
                past_key_values before transformers 5.24).

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a cache under both names, a mask of another
                shape, a position beyond max_position_embeddings; a cache in training with gradient checkpointing.
            TypeError: cache is no Cache.
        """
        warn_of_missing(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        keep = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        name, cache = given_cache(cache, past_key_values)
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"{name}: expected a Cache of transformers, got {type(cache).__name__}")
        if self.training and self.layers[0].gradient_checkpointing:  # layers that run twice would fill it twice
            if keep or cache is not None:
                raise ValueError(f"{name}: expected none in training with gradient checkpointing, nor use_cache=True")
        elif keep and cache is None:
            cache = DynamicCache(config=self.config)
        seen = 0 if cache is None else cache.get_seq_length()
        if isinstance(seen, Tensor):
            seen = int(seen)  # of a static cache
        if attention_mask is not None and attention_mask.dim() != 4:
            attention_mask = _find_padding(attention_mask, inputs_embeds, seen)
            if attention_mask is not None and position_ids is None:
                position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        elif attention_mask is None and seen == 0:
            starts = find_starts(position_ids, *inputs_embeds.shape[:2])
            attention_mask = None if starts is None else causal_within(starts)
        output = self.run_layers(
            inputs_embeds, attention_mask, position_ids, cache, seen, self.config.dropout if self.training else 0.0
        )
        if not (self.config.return_dict if return_dict is None else return_dict):
            return (output, cache) if keep else (output,)
        return BaseModelOutputWithPast(output, cache if keep else None)

    def run_layers(
        self,
        embeddings: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        seen: int,
        dropout: float,
    ) -> Tensor:
        """What `forward` does after its checks.

        Args:
            embeddings (Tensor): (B, T, E), of tokens.
            mask (Tensor, optional): (B, S + T), bool; or of 4 dimensions, as of `forward`.
            position_ids (Tensor, optional): (B, T) or (1, T). Default: None, seen and what follows.
            cache: with update(key, value, layer), which returns all keys and values; None keeps nothing.
            seen (int): S, tokens in the cache.
            dropout (float): probability.
        """
        batch, steps, width = embeddings.shape
        own_mask = mask is None or mask.dim() == 2
        if mask is not None and own_mask:
            mask = mask[:, None, None]
        # As rows: a linear layer on (B, T, E) would make views before and after its product.
        x = ops.dropout((embeddings + self._embed_positions(position_ids, seen, steps)).reshape(-1, width), dropout)
        call = _Call(batch, steps, seen, mask, own_mask, cache, dropout)
        for layer in self.layers:
            x = layer(x, call)
        return self.norm(x).view(batch, steps, width)

    def _embed_positions(self, position_ids: Tensor | None, seen: int, steps: int) -> Tensor:
        """(B, T, E), (1, T, E) or (T, E)."""
        context = self.config.max_position_embeddings
        if position_ids is None:
            end = seen + steps
            if end > context:
                raise ValueError(f"input_ids: expected at most {context} tokens (max_position_embeddings), got {end}")
            weight = self.embed_positions.weight
            return weight if steps == context else weight[seen:end]
        if not torch.compiler.is_compiling() and position_ids.numel():
            low, high = position_ids.aminmax()
            if low < 0 or high >= context:
                raise ValueError(
                    f"position_ids: expected 0 to {context - 1} (max_position_embeddings - 1), got {int(low)} to "
                    f"{int(high)}"
                )
        return self.embed_positions(position_ids)


def _find_padding(mask: Tensor, embeddings: Tensor, seen: int) -> Tensor | None:
    """An attention mask as bool (B, S + T); None where every token is real."""
    expected = (embeddings.shape[0], seen + embeddings.shape[1])
    if mask.shape != expected:
        raise ValueError(f"attention_mask: expected shape {expected}, got {tuple(mask.shape)}")
    real = mask != 0
    # What depends on values would break a compiled graph.
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real


class TransformerForCausalLM(CausalLM, TransformerPreTrainedModel, GenerationMixin):
    """A `TransformerModel` and an output layer, whose weights are the embeddings unless tie_word_embeddings is False.

    Initial weights as in `TransformerModel`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.model = TransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next token after each token, and their loss.

        Args:
            input_ids (Tensor, optional): (B, T); or inputs_embeds.
            attention_mask (Tensor, optional): (B, S + T) or of 4 dimensions, as of `TransformerModel`.
            position_ids (Tensor, optional): (B, T) or (1, T), as of `TransformerModel`.
            cache (Cache, optional): keys and values of S tokens. Default: None.
            inputs_embeds (Tensor, optional): (B, T, E).
            labels (Tensor, optional): (B, T); the target of token t is labels[:, t + 1]. -100 is no target.
            use_cache (bool, optional): return the keys and values. Default: None, as of `TransformerModel`.
            logits_to_keep (int or Tensor): compute the logits of this many last tokens (0: all), or of these tokens.
                The loss takes all tokens in any case. Default: 0.
            skip_logits (bool, optional): compute the loss alone, which never holds all logits. Default: None, in
                training with labels.
            past_key_values (Cache, optional): another name of cache.
            **kwargs: shift_labels (Tensor), (B, T): the target of token t is shift_labels[:, t]; it goes before labels.
                num_items_in_batch (int or Tensor) divides the sum of losses in place of the number of targets.
                label_smoothing (default 0) and ignore_index (-100) are those of `ops.linear_cross_entropy`.

        Returns:
            CausalLMOutputWithPast: loss (with labels), logits (B, T, V) or None, cache (None without use_cache;
                past_key_values before transformers 5.24).

        Raises:
            ValueError: as `TransformerModel`; labels of another shape than (B, T); skip_logits without labels.
        """
        # A tuple, for transformers' outputs cost as much as a step of a small model.
        output, *kept = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, False, past_key_values
        )
        loss, logits = self._score(output, labels, logits_to_keep, skip_logits, **kwargs)
        return CausalLMOutputWithPast(loss, logits, kept[0] if kept else None)

    def _make_engine(self) -> Engine:
        return Engine(self)
