"""Softmax attention: the public functions."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastlm.ops import _common
from fastlm.ops._attention_checks import (
    NAMES,
    as_keep_or_bias,
    check_dense,
    check_heads_broadcast,
    check_mask,
    check_sinks,
    check_slopes,
    check_tensors,
    checked_numbers,
    default_scale,
)
from fastlm.ops._attention_op import ATTENTION, are_plain, run
from fastlm.ops._attention_options import UNLIMITED, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlm.ops._attention_types import AttentionOptions, ScoreOptions

_Lengths = Tensor | list[int]
_TORCHS_NAMES = ("query", "key", "value", "attn_mask")
_ALL_KEYS = (UNLIMITED, UNLIMITED)
_LARGE = 1e30  # a scale that any dtype of the kernels can hold


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for torch.nn.functional.scaled_dot_product_attention.

    Args:
        query (Tensor): (..., Hq, Tq, D), or (Tq, D); float32, float64 or bfloat16. Any strides.
        key (Tensor): (..., H, Tk, D).
        value (Tensor): (..., H, Tk, Dv).
        attn_mask (Tensor, optional): broadcasts against (..., Hq, Tq, Tk). bool: True takes part; floating: added to
            the scores, of query's dtype or float32, gets a gradient. Default: None.
        dropout_p (float): probability of dropping a weight, in evaluation too. Default: 0.
        is_causal (bool): query i sees the keys j <= i, besides attn_mask. Default: False.
        scale (float, optional): factor of the scores. Default: 1 / sqrt(D).
        enable_gqa (bool): H may divide Hq; query head h then reads head h // (Hq / H). Default: False.

    Returns:
        output (Tensor): (..., Hq, Tq, Dv), in memory in the order of query's dimensions.

    Differs from torch where torch's own back ends disagree: a row that sees nothing gives 0, NaN in what a row sees
    propagates, is_causal and attn_mask combine, and any scale works with any mask.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a number is out of range.
        TypeError: an argument is no Tensor.
    """
    plain = not dropout_p and are_plain(query, key, value, attn_mask)
    if plain and (enable_gqa or query.shape[1] == key.shape[1]) and _is_plain_scale(scale):
        try:
            return _plain(query, key, value, attn_mask, is_causal, scale)
        except (RuntimeError, ValueError):
            pass  # what follows says it by the argument's name, or knows more shapes
    tensors = {"query": query, "key": key, "value": value}
    _common.check_same(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions, got shape {tuple(tensor.shape)}")
    check_heads_broadcast(tensors, enable_gqa)
    q, k, v, batch = _four_dims(query, key, value)
    mask = None if attn_mask is None else _mask_of_four_dims(attn_mask, batch, (q.shape[-2], k.shape[-2]))
    causal = "upper_left" if is_causal else None
    options = {"causal": causal, "scale": scale, "dropout_p": dropout_p}
    output = checked_attention(q, k, v, mask=mask, **options, names=_TORCHS_NAMES)  # type: ignore[arg-type]
    return output.reshape(*batch, *output.shape[-2:])  # type: ignore[union-attr]


def _is_plain_scale(scale: Any) -> bool:
    return scale is None or (type(scale) is float and abs(scale) < _LARGE)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """The common case, with no checks but the op's: a call for a single token would feel them."""
    right = 0 if is_causal else UNLIMITED
    scale = default_scale(q) if scale is None else scale
    if mask is None and not _common.requires_grad(q, k, v):
        return ATTENTION.unrecorded(q, k, v, scale, right)[0]
    keep, bias = as_keep_or_bias(mask)
    if _common.requires_grad(q, k, v, bias):
        return ATTENTION.recorded(q, k, v, *Options(scale, right, keep, bias))[0]
    return ATTENTION.unrecorded(q, k, v, scale, right, keep, bias)[0]


def _four_dims(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Sequence[int]]:
    """The three as (B, H, T, D), and the leading dimensions of the result."""
    leading = [tensor.shape[:-2] for tensor in (query, key, value)]
    same = all(len(shape) == 2 for shape in leading) and leading[0][0] == leading[1][0] and leading[1] == leading[2]
    if same and (leading[0][1] != 1 or leading[1][1] == 1):  # a single head of query broadcasts
        return query, key, value, leading[0]
    heads = [shape[-1] if shape else 1 for shape in leading]
    try:
        batch = torch.broadcast_shapes(*(shape[:-1] for shape in leading))
    except RuntimeError:
        raise ValueError(
            "query, key, value: expected leading dimensions that broadcast, got "
            + ", ".join(str(tuple(shape)) for shape in leading)
        ) from None
    kv_heads = max(heads[1:]) if 0 not in heads[1:] else 0
    q_heads = heads[0] if heads[0] != 1 else kv_heads
    made = [
        tensor.expand(*batch, count, *tensor.shape[-2:]).reshape(math.prod(batch), count, *tensor.shape[-2:])
        for tensor, count in zip((query, key, value), (q_heads, kv_heads, kv_heads), strict=True)
    ]
    ranked = batch if all(len(shape) == 0 for shape in leading) else (*batch, q_heads)
    return made[0], made[1], made[2], ranked


def _mask_of_four_dims(mask: Any, batch: Sequence[int], sizes: tuple[int, int]) -> Tensor:
    """A mask against (*batch, Tq, Tk) as one of at most 4 dimensions against (B, H, Tq, Tk)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a Tensor, got {type(mask).__name__}")
    if mask.dim() <= 4 and len(batch) == 2:
        return mask
    full = (*batch, *sizes)
    try:
        torch.broadcast_shapes(mask.shape, full)
        if mask.dim() > len(full):
            raise RuntimeError
    except RuntimeError:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}") from None
    if mask.dim() <= 2 or not batch:
        return mask
    mask = mask.expand(*batch[:-1], mask.shape[-3], *mask.shape[-2:])
    return mask.reshape(math.prod(batch[:-1]), *mask.shape[-3:])


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: "Unpack[AttentionOptions]"
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: "Unpack[AttentionOptions]"
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: "Unpack[AttentionOptions]"
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: str | None = None,
    window: tuple[int, int] = _ALL_KEYS,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | list[int] | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The product softmax(q k^T) v with all that models put into the scores; nothing of size Tq x Tk is stored.

    Query i stands at position p = i, or i + Tk - Tq with causal="lower_right", where Tk is kv_lengths[b] if given. The
    score of key j is made in this order: q k^T times scale, softcap, ALiBi, float mask; then keys are masked out.

    Args:
        q (Tensor): (B, Hq, Tq, D); float32, float64 or bfloat16. Any strides but those of D are read in place.
        k (Tensor): (B, Hkv, Tk, D). Hkv divides Hq; query head h reads head h // (Hq / Hkv).
        v (Tensor): (B, Hkv, Tk, Dv).
        mask (Tensor, optional): broadcasts against (B, Hq, Tq, Tk), not materialised. bool: True takes part; floating:
            added, of q's dtype or float32, differentiable. Default: None.
        causal (str, optional): "upper_left": query i sees keys j <= i. "lower_right": j <= i + Tk - Tq, for new queries
            against a cache. Default: None.
        window (tuple of int): (left, right), query at p sees p - left <= j <= p + right; -1 means unlimited. Default:
            (-1, -1).
        scale (float, optional): Default: 1 / sqrt(D).
        softcap (float, optional): c > 0: scores become c tanh(score / c) (Gemma Team 2024). Default: None.
        alibi_slopes (Tensor, optional): (Hq,) or (B, Hq), adds -slope |p - j| (Press et al. 2022). No gradient.
        sinks (Tensor, optional): (Hq,), a score per head that takes part in the softmax but has no value (Xiao et al.
            2024). Differentiable. Default: None.
        kv_lengths (Tensor or list of int, optional): keys of every sequence, (B,), 0 to Tk; what lies past them is not
            read. Default: None, all.
        dropout_p (float): probability of dropping a weight, in [0, 1]; replayed in backward. Default: 0.
        return_lse (bool): also return the log-sum-exp of the scores. Default: False.

    Returns:
        output (Tensor): (B, Hq, Tq, Dv), in memory in the order of q's dimensions. Rows that see nothing are 0.
        lse (Tensor): with return_lse; (B, Hq, Tq), float32 (float64 for float64), -inf where a row sees nothing,
            differentiable; with sinks it counts them.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a number is out of range (the message names the argument,
            expected and got).
        TypeError: an argument has the wrong type.

    Numerics: products and sums in float32 for bfloat16. Error against a float64 reference at most 2x (gradients 3x)
    that of torch's attention, plus rounding. Results do not depend on the number of threads. Subnormal numbers count
    as zero.
    Flash attention: Dao et al. 2022 (arXiv:2205.14135).
    """
    nothing = softcap is None and alibi_slopes is None and sinks is None and kv_lengths is None
    if nothing and window is _ALL_KEYS and return_lse is False and are_plain(q, k, v, mask):
        known = type(dropout_p) is float and dropout_p == 0
        if known and _is_plain_scale(scale) and (causal is None or (type(causal) is str and causal == "upper_left")):
            try:
                return _plain(q, k, v, mask, causal is not None, scale)
            except (RuntimeError, ValueError):
                pass  # what follows says it by the argument's name
    return checked_attention(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_lengths=kv_lengths,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )


def checked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: str | None = None,
    window: tuple[int, int] = (UNLIMITED, UNLIMITED),
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | list[int] | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    names: tuple[str, str, str, str] = NAMES,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention`, with dropout's seed, a float mask besides a bool one, and what errors call q, k, v and mask."""
    plain = are_plain(q, k, v)  # the op then checks these itself: a call for a single token would feel it
    if not plain:
        check_dense((q, k, v), names)
    batch, q_heads, q_len, _ = q.shape
    keep = added = None
    if mask is not None or bias is not None:
        full = (batch, q_heads, q_len, k.shape[2])
        keep, added = check_mask(mask, q, full, names)
        if bias is not None:
            added = check_mask(bias, q, full, names)[1]
    if kv_lengths is not None:
        kv_lengths = _common.integers("kv_lengths", kv_lengths)
        _common.check_shape("kv_lengths", kv_lengths, (batch,), "(B,)")
    slopes = None if alibi_slopes is None else check_slopes(alibi_slopes, q, batch, q_heads)
    numbers = checked_numbers(q, causal, window, scale, softcap, dropout_p)
    if dropout_p and seed is None:
        seed = _common.draw_seed()
    options = Options(keep=keep, bias=added, slopes=slopes, kv_lengths=kv_lengths, seed=seed, **numbers)
    sinks = None if sinks is None else check_sinks(sinks, q, q_heads)
    try:
        return _attend(q, k, v, options, sinks, return_lse, plain)
    except (RuntimeError, ValueError):
        if plain:
            check_dense((q, k, v), names)  # says it by the argument's name
        raise


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: _Lengths,
    cu_seqlens_k: _Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[ScoreOptions]",
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: _Lengths,
    cu_seqlens_k: _Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    **options: "Unpack[ScoreOptions]",
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: _Lengths,
    cu_seqlens_k: _Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool,
    **options: "Unpack[ScoreOptions]",
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: _Lengths,
    cu_seqlens_k: _Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: str | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences of several lengths that lie packed one after another, without padding.

    Args:
        q (Tensor): (total_q, Hq, D), the queries of all sequences.
        k (Tensor): (total_k, Hkv, D).
        v (Tensor): (total_k, Hkv, Dv).
        cu_seqlens_q (Tensor or list of int): (B + 1,), any integer dtype: sequence b has the rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1]; from 0 rising to at most total_q. Rows past the last give 0.
        cu_seqlens_k (Tensor or list of int): (B + 1,), likewise for k and v.
        max_seqlen_q (int, optional): the longest; taken as in other libraries, known from cu_seqlens_q here.
        max_seqlen_k (int, optional): likewise.
        causal (str, optional): as for `attention`, within each sequence; so what follows.
        window (tuple of int): Default: (-1, -1), unlimited.
        scale (float, optional): Default: 1 / sqrt(D).
        softcap (float, optional): Default: None.
        alibi_slopes (Tensor, optional): (Hq,) or (B, Hq). Default: None.
        sinks (Tensor, optional): (Hq,). Default: None.
        dropout_p (float): Default: 0.
        return_lse (bool): also return lse. Default: False.

    Returns:
        output (Tensor): (total_q, Hq, Dv).
        lse (Tensor): with return_lse; (Hq, total_q).

    Raises:
        ValueError: shapes, dtypes or devices disagree, cu_seqlens does not rise or goes beyond the rows.
        TypeError: an argument has the wrong type.
    """
    check_tensors((q, k, v), NAMES, 3, "(total, H, D)")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"v: expected shape (total_k, Hkv, Dv) = {(*k.shape[:2], 'Dv')}, got {tuple(v.shape)}")
    q_starts = _common.integers("cu_seqlens_q", cu_seqlens_q)
    k_starts = _common.integers("cu_seqlens_k", cu_seqlens_k)
    for name, starts in (("cu_seqlens_q", q_starts), ("cu_seqlens_k", k_starts)):
        if starts.dim() != 1 or starts.shape[0] == 0:
            raise ValueError(f"{name}: expected shape (B + 1,), got {tuple(starts.shape)}")
    _common.check_shape("cu_seqlens_k", k_starts, (q_starts.shape[0],), "(B + 1,)")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None and (not isinstance(longest, int | torch.SymInt) or longest < 0):
            raise ValueError(f"{name}: expected an int of at least 0, got {longest!r}")
    slopes = check_slopes(alibi_slopes, q, q_starts.shape[0] - 1, q.shape[1])
    numbers = checked_numbers(q, causal, window, scale, softcap, dropout_p)
    seed = _common.draw_seed() if dropout_p else None
    options = Options(slopes=slopes, q_starts=q_starts, k_starts=k_starts, seed=seed, **numbers)
    plain = _common.is_plain(q, k, v)
    return _attend(q, k, v, options, check_sinks(sinks, q, q.shape[1]), return_lse, plain)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, options: Options, sinks: Tensor | None, return_lse: bool, plain: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """plain: q, k and v are (the bias has q's dtype and device, so that it is as well)."""
    if return_lse not in (True, False):
        raise TypeError(f"return_lse: expected True or False, got {return_lse!r}")
    output, lse = run(ATTENTION, (), q, k, v, options, plain=plain)
    if sinks is not None:
        # The sink joins the sum of exponentials: a factor exp(lse) / (exp(lse) + exp(sink)) for all weights of a row.
        packed = options.q_starts is not None
        sink = sinks.to(lse.dtype)[:, None]
        share = share_beside_sink(lse, sink)
        output = output * (share.mT if packed else share).unsqueeze(-1).to(output.dtype)
        if return_lse:
            blind = lse == -torch.inf
            lse = torch.where(blind, sink, torch.logaddexp(lse.masked_fill(blind, 0), sink))
        if options.q_starts is not None:  # rows past the last sequence stay 0 and give the sinks no gradient
            lse = lse.masked_fill(torch.arange(q.shape[0], device=q.device) >= options.q_starts[-1], 0)
    return (output, lse) if return_lse else output


def share_beside_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """What of a row's weights is left beside a sink; 0 for a row that sees nothing, whatever the sink."""
    return torch.sigmoid((lse - sink).masked_fill(lse == -torch.inf, -torch.inf))
