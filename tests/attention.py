"""Cases of attention, what runs them, and the truth about them: all scores written out in plain torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.ops.reference import dropout_factors
from tests.numerics import Outputs, check_case, forward_backward, incoming

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=("fp32", "fp64", "bf16"))
full = pytest.mark.full

SEED = 7  # of torch's generator, from which a call with dropout draws its own


@dataclass(frozen=True)
class Attention:
    """The arguments of `attention`, or with cu_seqlens those of `attention_varlen`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    causal: str | None = None
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    kv_lengths: Tensor | list[int] | None = None
    dropout_p: float = 0.0
    cu_seqlens_q: Tensor | list[int] | None = None
    cu_seqlens_k: Tensor | list[int] | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors present that get a gradient, by name."""
        values = {name: getattr(self, name) for name in ("q", "k", "v", "mask", "sinks")}
        return {name: value for name, value in values.items() if value is not None and value.is_floating_point()}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "Attention":
        """The same case with every such tensor replaced by function(name, tensor)."""
        return replace(self, **{name: function(name, tensor) for name, tensor in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> "Attention":
        slopes = None if self.alibi_slopes is None else self.alibi_slopes.to(dtype)
        return replace(self.map(lambda _, tensor: tensor.to(dtype)), alibi_slopes=slopes)

    def arguments(self) -> dict[str, object]:
        """What is given to the public function."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def make_attention(
    batch: int = 2,
    q_heads: int = 2,
    q_len: int = 5,
    dim: int = 8,
    *,
    kv_heads: int | None = None,
    k_len: int | None = None,
    v_dim: int | None = None,
    mask: str | None = None,
    mask_shape: tuple[int, ...] | None = None,
    slopes: str | None = None,
    sinks: bool = False,
    kv_lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
    **options: object,
) -> Attention:
    """Random inputs. mask: bool or float, of mask_shape (default: the whole); slopes: heads or batch (one each).

    With kv_lengths what lies past them is NaN. Other options are those of Attention.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads, k_len, v_dim = (
        default if given is None else given for given, default in ((kv_heads, q_heads), (k_len, q_len), (v_dim, dim))
    )
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    given: dict[str, Tensor] = {
        "q": normal(batch, q_heads, q_len, dim),
        "k": normal(batch, kv_heads, k_len, dim),
        "v": normal(batch, kv_heads, k_len, v_dim),
    }
    if mask is not None:
        values = normal(mask_shape or (batch, q_heads, q_len, k_len))
        given["mask"] = values if mask == "float" else values > -0.5
    if slopes is not None:
        given["alibi_slopes"] = normal((q_heads,) if slopes == "heads" else (batch, q_heads)).abs() / 8
    if sinks:
        given["sinks"] = normal(q_heads)
    case = Attention(**given, **options).to(dtype)
    if kv_lengths is not None:
        past = torch.arange(k_len) >= torch.tensor(kv_lengths, dtype=torch.int64)[:, None]
        past = past[:, None, :, None]
        case = replace(
            case,
            k=case.k.masked_fill(past, torch.nan),
            v=case.v.masked_fill(past, torch.nan),
            kv_lengths=torch.tensor(kv_lengths, dtype=torch.int64),
        )
    return case.map(lambda _, tensor: tensor.requires_grad_(requires_grad))


def make_varlen(
    q_lengths: list[int],
    k_lengths: list[int],
    q_heads: int = 2,
    dim: int = 8,
    *,
    kv_heads: int | None = None,
    past: int = 0,
    slopes: str | None = None,
    **options: object,
) -> Attention:
    """Packed sequences of these lengths; `past` rows follow the last, and they are NaN."""
    rows = max(sum(q_lengths), sum(k_lengths)) + past
    case = make_attention(1, q_heads, rows, dim, kv_heads=kv_heads, **options)
    starts = [[0, *accumulate(lengths)] for lengths in (q_lengths, k_lengths)]

    def pack(name: str, tensor: Tensor) -> Tensor:
        if name not in ("q", "k", "v"):
            return tensor
        live = starts[0 if name == "q" else 1][-1]
        packed = tensor[0].transpose(0, 1)[: live + past].clone()
        packed[live:] = torch.nan
        return packed

    shape = (q_heads,) if slopes == "heads" else (len(q_lengths), q_heads)
    alibi = None if slopes is None else (torch.rand(shape) / 4).to(case.q.dtype)
    return replace(case.map(pack), cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], alibi_slopes=alibi)


def run_fastlm(case: Attention) -> Outputs:
    """The public op: output and lse."""
    if case.dropout_p:
        torch.manual_seed(SEED)
    op = fastlm.ops.attention if case.cu_seqlens_q is None else fastlm.ops.attention_varlen
    output, lse = op(**case.arguments(), return_lse=True)
    return {"output": output, "lse": lse}


def run_reference(case: Attention) -> Outputs:
    """The same by fastlm's plain reference."""
    with fastlm.backend("reference"):
        return run_fastlm(case)


def run_torch_with_weights(case: Attention) -> Outputs:
    """`run_torch`, and the weights (B, Hq, Tq, Tk), 0 past a length."""
    k_len = case.k.shape[2]
    weights = [_torch_sequence(case, *given)[2] for given in _padded(case)]
    padded = [torch.nn.functional.pad(each, (0, k_len - each.shape[-1])) for each in weights]
    return run_torch(case) | {"weights": torch.stack(padded)}


def run_torch(case: Attention) -> Outputs:
    """A loop over single sequences, every score written out."""
    packed = case.cu_seqlens_q is not None
    results = [_torch_sequence(case, *given)[:2] for given in (_packed(case) if packed else _padded(case))]
    q_heads, v_dim = case.q.shape[1], case.v.shape[-1]
    if packed:
        past = case.q.shape[0] - int(case.cu_seqlens_q[-1])
        results.append((case.q.new_zeros(q_heads, past, v_dim), case.q.new_zeros(q_heads, past)))
        output, lse = (torch.cat(each, 1) for each in zip(*results, strict=True))
        output = output.transpose(0, 1)
    elif results:
        output, lse = (torch.stack(each) for each in zip(*results, strict=True))
    else:
        output, lse = case.q.new_zeros(*case.q.shape[:3], v_dim), case.q.new_zeros(case.q.shape[:3])
    return {"output": output, "lse": lse.float() if lse.dtype == torch.bfloat16 else lse}


_Sequence = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _padded(case: Attention) -> list[_Sequence]:
    """q, k, v, mask, slopes and factors of dropout of every sequence of a batch, what lies past kv_lengths cut off."""
    batch, q_heads, q_len, _ = case.q.shape
    k_len = case.k.shape[2]
    lengths = [k_len] * batch if case.kv_lengths is None else [int(length) for length in case.kv_lengths]
    mask = None if case.mask is None else case.mask.expand(batch, q_heads, q_len, k_len)
    slopes = None if case.alibi_slopes is None else case.alibi_slopes.expand(batch, q_heads)
    factors = _factors(case, case.q.shape[:3], k_len)
    return [
        (
            case.q[b],
            case.k[b, :, :n],
            case.v[b, :, :n],
            None if mask is None else mask[b, :, :, :n],
            None if slopes is None else slopes[b],
            None if factors is None else factors[b, :, :, :n],
        )
        for b, n in enumerate(lengths)
    ]


def _packed(case: Attention) -> list[_Sequence]:
    """The same of packed sequences."""
    ends = [pairwise(int(start) for start in starts) for starts in (case.cu_seqlens_q, case.cu_seqlens_k)]
    made = []
    for b, ((first, last), (k_first, k_last)) in enumerate(zip(*ends, strict=True)):
        slopes = case.alibi_slopes
        factors = _factors(case, (case.q.shape[1], case.q.shape[0]), k_last - k_first)
        rows = (case.q[first:last], case.k[k_first:k_last], case.v[k_first:k_last])
        made.append(
            (
                *(tensor.transpose(0, 1) for tensor in rows),
                None,
                slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
                None if factors is None else factors[:, first:last],
            )
        )
    return made


def _factors(case: Attention, shape: Iterable[int], k_len: int) -> Tensor | None:
    """What dropout multiplies weights with, by the seed that `run_fastlm` draws."""
    if not case.dropout_p:
        return None
    torch.manual_seed(SEED)
    return dropout_factors(torch.randint(2**63 - 1, ()), case.dropout_p, tuple(shape), k_len).to(case.q.dtype)


def _torch_sequence(
    case: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (H, Tq, Dv), lse (H, Tq) and weights (H, Tq, Tk) of one sequence."""
    heads, q_len, dim = q.shape
    k_len = k.shape[1]
    k, v = (tensor.repeat_interleave(heads // max(1, tensor.shape[0]), 0) for tensor in (k, v))
    scores = q @ k.mT * (dim**-0.5 if case.scale is None else case.scale)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    position = torch.arange(q_len)[:, None] + (k_len - q_len if case.causal == "lower_right" else 0)
    key = torch.arange(k_len)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (position - key).abs()
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    if case.causal:
        seen = seen & (key <= position)
    for limit, distance in zip(case.window, (position - key, key - position), strict=True):
        if limit >= 0:
            seen = seen & (distance <= limit)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~seen, -torch.inf)
    # The sink's score stands behind the others, -inf where there is none: then a row may see nothing.
    sink = scores.new_full((heads,), -torch.inf) if case.sinks is None else case.sinks
    scores = torch.cat((scores, sink[:, None, None].expand(-1, q_len, -1)), -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0)
    weights = torch.softmax(scores, -1)[..., :-1]
    weights = (weights if factors is None else weights * factors).masked_fill(blind, 0)
    return weights @ v, torch.logsumexp(scores, -1).masked_fill(blind[..., 0], -torch.inf), weights


def check_attention(
    case: Attention,
    *,
    wanted: Iterable[str] | None = None,
    arriving: Iterable[str] | Callable[[Outputs], Outputs] = incoming,
    scale: float = 1.0,
) -> None:
    """Checks output, lse and every gradient, on every ISA, against torch in the same dtype and in float64.

    Gradients of scores cancel, in a row they add up to 0: scale is the size of what they are made of.
    """
    check_case(case, run_fastlm, run_torch, wanted=wanted, arriving=arriving, scale=scale)


def equal(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) for name, value in expected.items())


def same_to_the_bit(case: Attention, expected: Attention) -> bool:
    return equal(forward_backward(run_fastlm, case), forward_backward(run_fastlm, expected))
