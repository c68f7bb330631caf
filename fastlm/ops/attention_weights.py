"""Attention that also gives its weights, in plain operations: what torch.nn.MultiheadAttention returns by default."""

import torch
from torch import Tensor

from fastlm import _trace
from fastlm.ops import _common, reference
from fastlm.ops.attention import checked_attention, empty_heads

_VALUES_IN_CACHE = 2**17  # scores that are worked on at a time


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    average: bool,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attention`, and its weights (B, Hq, Tq, Tk), or their average over heads (B, Tq, Tk); heads of k are those of q.

    Weights are those that met the values, dropped ones 0. They are made in plain operations: without gradients together
    with the output, some heads at a time that stay in cache; else apart from the kernel's, for they are seldom used.
    """
    seen = _seen(q, k, mask, causal)
    blind = None if seen is None else ~seen.any(-1, keepdim=True)
    eager = _common.has_values(q, k, v)
    if blind is not None and eager and not blind.any():
        blind = None
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    if bias is not None and not causal:
        seen = None  # it hides by itself
    if eager and not dropout_p and not _common.requires_grad(q, k, v, mask):
        if _trace.calls is not None:
            _trace.record("attention", "need_weights=True: weights are made in plain operations")
        return _by_heads(q * scale, k, v, average, seen, blind, bias)
    seed = _common.draw_seed() if dropout_p > 0 else None
    options = {"causal": "upper_left" if causal else None, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    output = checked_attention(q, k, v, mask=mask, **options)  # type: ignore[arg-type]
    assert isinstance(output, Tensor)
    weights = _weights(q * scale, k, seen, blind, bias, output.dtype)
    if seed is not None:
        factors = reference.dropout_factors(seed, dropout_p, q.shape[:3], k.shape[2])
        weights = weights * factors.to(q.device, weights.dtype)
    return output, (weights.mean(1) if average else weights).to(output.dtype)


def _seen(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which keys a query sees, 4 dimensions that broadcast against (B, H, Tq, Tk), or None for all."""
    seen = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask != -torch.inf
        seen = seen.view((1,) * (4 - seen.dim()) + seen.shape)
    if causal:
        triangle = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        seen = triangle[None, None] if seen is None else seen & triangle
    return seen


def _weights(
    q: Tensor, k: Tensor, seen: Tensor | None, blind: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Of q that is scaled, in the type of the arithmetic on dtype; blind: rows that see nothing, or None."""
    scores = (q @ k.mT).to(_common.compute_dtype(dtype))
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if blind is None:
        return torch.softmax(scores, -1)
    # A softmax of nothing would be NaN, its gradient too.
    return torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)


def _by_heads(
    q: Tensor, k: Tensor, v: Tensor, average: bool, seen: Tensor | None, blind: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = q.shape
    output, parts = empty_heads(q, v.shape[-1]), []
    group = max(1, min(heads, _VALUES_IN_CACHE // max(1, batch * q_len * k.shape[2])))
    for first in range(0, heads, group):
        of = slice(first, first + group)
        masks = [x if x is None or x.dim() < 4 or x.shape[1] == 1 else x[:, of] for x in (seen, blind, bias)]
        some = _weights(q[:, of], k[:, of], masks[0], masks[1], masks[2], q.dtype)
        output[:, of] = some.to(v.dtype) @ v[:, of]
        if not average:
            parts.append(some.to(q.dtype))
            continue
        total = some[:, 0] if some.shape[1] == 1 else some.sum(1)
        parts = [parts[0].add_(total) if parts else total]
    return output, parts[0].div_(heads).to(q.dtype) if average else torch.cat(parts, 1)
