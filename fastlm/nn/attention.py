"""MultiheadAttention with the interface of torch.nn."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from fastlm.nn._twin import TorchTwin
from fastlm.ops import _common
from fastlm.ops._attention_op import ATTENTION, run_module
from fastlm.ops._attention_weights_op import ATTENTION_WITH_WEIGHTS


class MultiheadAttention(TorchTwin, torch.nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention (same arguments, parameters, results and errors) on the fused kernels.

    Unlike there, a query that may attend to nothing gives 0, not NaN, and weights 0, and what is returned does not
    depend on the mode. need_weights=True, the default as there, costs the weights' memory and the time to write them,
    and gradients through them are made in plain operations. Nested tensors go to torch's own attention.
    """

    torch_class = torch.nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Projects, attends with num_heads heads and projects back.

        Args:
            query: (L, N, E), (N, L, E) with batch_first, (L, E) unbatched.
            key: (S, N, kdim), (N, S, kdim) with batch_first, (S, kdim) unbatched.
            value: the same with vdim.
            key_padding_mask (optional): (N, S), (S,) unbatched; bool, True: ignored; or floating, added.
            need_weights (bool): return the weights too, which costs their size in memory and time. Default: True.
            attn_mask (optional): (L, S) or (N * num_heads, L, S); bool, True: not attended to; or floating, added.
            average_attn_weights (bool): weights averaged over heads, else of every head. Default: True.
            is_causal (bool): a hint that attn_mask, which must be given, is the causal mask. Default: False.

        Returns:
            output in the form of query, and the weights (N, L, S), (N, num_heads, L, S) if not averaged, without N
            unbatched, or None.

        Raises:
            AssertionError, RuntimeError: as torch.nn.MultiheadAttention.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            _common.plan("attention", (query, key, value), "attention has no kernel for nested tensors")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        # Keys of add_bias_kv and add_zero_attn stand behind the others, where causal masking would hide them.
        is_causal = is_causal and self.bias_k is None and not self.add_zero_attn
        batched = query.dim() == 3
        given_first = batched and self.batch_first
        batch_first = given_first or not batched  # an unbatched input becomes a batch of one
        self._check(query, key, value, key_padding_mask, attn_mask, given_first)
        if not batched:
            query, key, value = _once_each(lambda x: x.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value, given_first, batch_first)
        mask = self._mask(q, k, key_padding_mask, attn_mask, is_causal)
        k, v, mask = self._more_keys(k, v, mask)
        options: dict[str, Any] = {"mask": mask, "causal": is_causal, "scale": 1 / math.sqrt(self.head_dim)}
        options["dropout"] = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            average = bool(average_attn_weights)
            output, _, weights = run_module(ATTENTION_WITH_WEIGHTS, (average,), q, k, v, **options)
            weights = weights if batched else weights.squeeze(0)
        else:
            output, _ = run_module(ATTENTION, (), q, k, v, **options)
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        output = ops.linear(output.permute(order).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return (output if batched else output.squeeze(0)), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batch_first: bool,
    ) -> None:
        """Torch's errors for what does not fit."""
        same = query is key and key is value and self._qkv_same_embed_dim and query.shape[-1] == self.embed_dim
        if same and query.dim() == 3 and key_padding_mask is None and attn_mask is None:
            return  # the usual call, whose time a small one would feel
        F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        shapes = [x.shape for x in (query, key, value)]
        if batch_first:
            shapes = [torch.Size((shape[1], shape[0], shape[2])) for shape in shapes]
        of_query, of_key, of_value = shapes  # time first
        if of_query[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {of_query[-1]}")
        if self._qkv_same_embed_dim and of_key != of_value:
            raise AssertionError(f"key shape {of_key} does not match value shape {of_value}")
        if of_key[:-1] != of_value[:-1]:
            raise AssertionError(f"key's sequence and batch dims {of_key[:2]} do not match value's {of_value[:2]}")
        batch = of_query[1] if query.dim() == 3 else 1
        if query.dim() == 3 and of_key[1] != batch:
            raise AssertionError(f"key's batch {of_key[1]} does not match query's {batch}")
        if attn_mask is not None:
            sizes = (of_query[0], of_key[0])
            expected = sizes if attn_mask.dim() == 2 else (batch * self.num_heads, *sizes)
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
                )
        if key_padding_mask is not None and key_padding_mask.shape[-1:] != of_key[:1]:
            raise AssertionError(
                f"Expected key_padded_mask.shape[-1] to be {of_key[0]}, but got {key_padding_mask.shape[-1]}"
            )
        if key_padding_mask is not None and query.dim() == 3 and key_padding_mask.shape[0] != batch:
            raise AssertionError(
                f"Expected key_padded_mask.shape[0] to be {batch}, but got {key_padding_mask.shape[0]}"
            )

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, copies: bool, batch_first: bool
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values (N, H, T, D), side by side where one product can make them: kernels read them there.

        copies: of the inputs go to backward, as torch has them where the batch is first, so that `x += attn(x)` works.
        """
        width, bias = self.embed_dim, self.in_proj_bias
        together = self._qkv_same_embed_dim
        weights: tuple[Any, ...] = (self.in_proj_weight,)
        if not together:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if copies and torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            query, key, value = _once_each(torch.clone, query, key, value)
        if not together:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = map(ops.linear, (query, key, value), weights, biases)
            return tuple(self._heads(x, 1, batch_first)[0] for x in projected)
        (weight,) = weights
        if query is key and key is value:
            return self._heads(ops.linear(query, weight, bias), 3, batch_first)
        if key is value:
            biases = (None, None) if bias is None else (bias[:width], bias[width:])
            queries = self._heads(ops.linear(query, weight[:width], biases[0]), 1, batch_first)
            return queries + self._heads(ops.linear(key, weight[width:], biases[1]), 2, batch_first)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        projected = map(ops.linear, (query, key, value), weight.chunk(3), biases)
        return tuple(self._heads(x, 1, batch_first)[0] for x in projected)

    def _heads(self, x: Tensor, count: int, batch_first: bool) -> tuple[Tensor, ...]:
        """(N, T, count E) or (T, N, count E) as `count` of (N, H, T, D), in place."""
        parts = x.unflatten(-1, (count, self.num_heads, self.head_dim)).unbind(-3)
        return tuple([part.transpose(1, 2) if batch_first else part.permute(1, 2, 0, 3) for part in parts])

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Both masks as the op takes one: bool, True takes part, or floating, added."""
        other = F._none_or_dtype(attn_mask)
        if is_causal:
            attn_mask = None
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            both = padding.dtype == torch.bool and other in (None, torch.bool)
            if not both:  # torch's checks and warnings, and the floating form
                padding = F._canonical_mask(padding, "key_padding_mask", other, "attn_mask", q.dtype)
            assert padding is not None
            padding = padding[:, None, None]
            if attn_mask is not None and not both:
                attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, False)
        if attn_mask is not None and padding is None and attn_mask.dtype != torch.bool:
            attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, False)
        if padding is None or attn_mask is None:
            mask = attn_mask if padding is None else padding
        else:
            mask = attn_mask | padding if padding.dtype == torch.bool else attn_mask + padding
        if mask is None:
            return None
        return ~mask if mask.dtype == torch.bool else mask.to(q.dtype)

    def _more_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those of add_bias_kv and add_zero_attn behind them, which no mask hides."""
        if self.bias_k is not None:
            assert self.bias_v is not None
            more = (
                bias.view(1, self.num_heads, 1, self.head_dim).expand(k.shape[0], -1, -1, -1).to(k.dtype)
                for bias in (self.bias_k, self.bias_v)
            )
            k, v = (torch.cat((x, extra), 2) for x, extra in zip((k, v), more, strict=True))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        if mask is not None and added:
            mask = F.pad(mask, (0, added), value=1.0 if mask.dtype == torch.bool else 0.0)
        return k, v, mask


def _once_each(function: Any, *tensors: Tensor) -> list[Tensor]:
    """function(tensor) for each; the same tensor gives the same result."""
    made: dict[int, Tensor] = {}
    return [made.setdefault(id(tensor), function(tensor)) for tensor in tensors]
