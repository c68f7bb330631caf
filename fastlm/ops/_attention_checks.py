"""What attention's functions check of their arguments; errors by the names that the caller has for them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import _common
from fastlm.ops._attention_options import UNLIMITED

NAMES = ("q", "k", "v", "mask")  # of the first arguments, in errors
_CAUSAL = (None, "upper_left", "lower_right")
_FAR = 2**60  # a larger window is this one: sums with positions stay within 64 bits


def check_heads_broadcast(tensors: dict[str, Tensor], enable_gqa: bool) -> None:
    """Heads of size 1 broadcast, as in torch; with enable_gqa those of query are another matter."""
    counts = {name: tensor.shape[-3] for name, tensor in tensors.items() if tensor.dim() > 2 and tensor.shape[-3] != 1}
    if enable_gqa:
        counts.pop("query", None)
    for name, count in counts.items():
        first, expected = next(iter(counts.items()))
        if count != expected:
            without = "" if enable_gqa else " without enable_gqa"
            raise ValueError(f"{name}: expected {expected} heads (those of {first}){without}, got {count}")


def check_dense(tensors: tuple[Any, Any, Any], names: Sequence[str]) -> None:
    """q, k and v (B, H, T, D), called `names`."""
    check_tensors(tensors, names, 4, "(B, H, T, D)")
    q, k, v = tensors
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{names[1]}: expected batch {q.shape[0]} (that of {names[0]}), got {k.shape[0]}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{names[2]}: expected shape (B, Hkv, Tk, Dv) = {(*k.shape[:3], 'Dv')}, got {tuple(v.shape)}")


def check_tensors(tensors: tuple[Any, Any, Any], names: Sequence[str], rank: int, layout: str) -> None:
    """What q, k and v, called `names`, have in common; heads are dimension 1."""
    for name, tensor in zip(names, tensors, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {tuple(tensor.shape)}")
    _common.check_same(dict(zip(names, tensors, strict=False)))
    q, k, _ = tensors
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{names[1]}: expected D = {q.shape[-1]} (that of {names[0]}), got {k.shape[-1]}")
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if q_heads % kv_heads if kv_heads else q_heads:
        raise ValueError(f"{names[1]}: expected a number of heads that divides {names[0]}'s {q_heads}, got {kv_heads}")


def check_mask(
    mask: Any, q: Tensor, full: tuple[int, ...], names: Sequence[str]
) -> tuple[Tensor | None, Tensor | None]:
    """The mask as keep (bool) or bias (floating), with 4 dimensions."""
    if mask is None:
        return None, None
    of, _, _, name = names
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, q.dtype, torch.float32):
        allowed = f"torch.bool, {q.dtype} (that of {of}) or torch.float32"
        raise ValueError(f"{name}: expected dtype {allowed}, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} (that of {of}), got {mask.device}")
    if mask.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor (torch.strided), got {mask.layout}")
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=False)):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to (B, Hq, Tq, Tk) = {tuple(full)}, got {tuple(mask.shape)}"
        )
    return as_keep_or_bias(mask if mask.dtype in (torch.bool, q.dtype) else mask.to(q.dtype))


def as_keep_or_bias(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask of the right dtype as the op's keep (bool) or bias (floating), with 4 dimensions."""
    if mask is None:
        return None, None
    if mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return (mask, None) if mask.dtype == torch.bool else (None, mask)


def check_slopes(slopes: Any, q: Tensor, batch: int, heads: int) -> Tensor | None:
    """alibi_slopes as (B or 1, Hq, 1, 1)."""
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes: expected a Tensor, got {type(slopes).__name__}")
    if slopes.requires_grad:
        raise ValueError(
            "alibi_slopes: expected a Tensor without requires_grad (they get no gradient), got one with it"
        )
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: expected shape (Hq,) = ({heads},) or (B, Hq) = ({batch}, {heads}), "
            f"got {tuple(slopes.shape)}"
        )
    if not slopes.is_floating_point():
        raise ValueError(f"alibi_slopes: expected a floating-point dtype, got {slopes.dtype}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    slopes = slopes.to(q.device, dtype)[..., None, None]
    return slopes if slopes.dim() == 4 else slopes[None]


def check_sinks(sinks: Any, q: Tensor, heads: int) -> Tensor | None:
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks: expected a Tensor, got {type(sinks).__name__}")
    _common.check_shape("sinks", sinks, (heads,), "(Hq,)")
    if not sinks.is_floating_point():
        raise ValueError(f"sinks: expected a floating-point dtype, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected device {q.device} (that of q), got {sinks.device}")
    return sinks


def checked_numbers(q: Tensor, causal: Any, window: Any, scale: Any, softcap: Any, dropout_p: Any) -> dict[str, Any]:
    """The op's numbers, by their names in it."""
    if causal not in _CAUSAL:
        raise ValueError(f"causal: expected None, 'upper_left' or 'lower_right', got {causal!r}")
    if not (isinstance(window, tuple | list) and len(window) == 2 and all(isinstance(n, int) for n in window)):
        raise TypeError(f"window: expected two whole numbers (left, right), got {window!r}")
    left, right = window
    if left < UNLIMITED or right < UNLIMITED:
        raise ValueError(f"window: expected numbers of at least 0, or -1 for unlimited, got {tuple(window)}")
    check_dropout("dropout_p", dropout_p)
    scale = default_scale(q) if scale is None else _number("scale", scale, q)
    softcap = 0.0 if softcap is None else _number("softcap", softcap, q)
    if softcap < 0:
        raise ValueError(f"softcap: expected a number above 0, or None, got {softcap!r}")
    if causal is not None:
        right = 0 if right == UNLIMITED else min(right, 0)
    return {
        "scale": scale,
        "right": min(right, _FAR),
        "softcap": softcap,
        "dropout": float(dropout_p),
        "lower_right": causal == "lower_right",
        "left": min(left, _FAR),
    }


def check_dropout(name: str, probability: Any) -> None:
    if not isinstance(probability, int | float) or not 0 <= probability <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {probability!r}")


def _number(name: str, value: Any, q: Tensor) -> float:
    """A number that the arithmetic on q can hold."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name}: expected a number (it gets no gradient), got a Tensor that requires one")
    try:
        number = float(value + 0)  # no text
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    dtype = _common.compute_dtype(q.dtype) if q.is_floating_point() else torch.float64
    if not abs(number) <= torch.finfo(dtype).max:
        raise ValueError(f"{name}: expected a number that {dtype} can hold, got {value!r}")
    return number


def default_scale(q: Tensor) -> float:
    width = q.shape[-1]
    return 1 / math.sqrt(width) if width else 1.0
