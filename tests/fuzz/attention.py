"""Random calls of `attention`, `attention_varlen` and `scaled_dot_product_attention`."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import fastlm
from tests import attention
from tests.attention import SEED, Attention, make_attention, make_varlen
from tests.fuzz.layouts import lay_out
from tests.numerics import Outputs

# Around what is decoded and what is tiled, around vectors, tiles (6), blocks (64) and items.
QUERIES = (0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 33, 66)
KEYS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65)
MANY = (130, 257, 1100)
WIDTHS = (1, 2, 3, 5, 8, 8, 15, 16, 17, 24, 31, 32, 33, 64, 65)
FAR = 2**63 - 1


@dataclass(frozen=True)
class Torchs:
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The floating-point tensors present, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor) and value.is_floating_point()}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "Torchs":
        """The same case with every such tensor replaced by function(name, tensor)."""
        return replace(self, **{name: function(name, tensor) for name, tensor in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> "Torchs":
        return self.map(lambda _, tensor: tensor.to(dtype))

    def written_out(self) -> tuple[Attention, tuple[int, ...]]:
        """With 4 dimensions and nothing that broadcasts but the mask; and the leading dimensions of the result."""
        given = [
            tensor.expand(*(1,) * (3 - tensor.dim()), *tensor.shape) for tensor in (self.query, self.key, self.value)
        ]
        q_heads, *kv_heads = (tensor.shape[-3] for tensor in given)
        kv_count = min(kv_heads) if 0 in kv_heads else max(kv_heads)
        counts = (kv_count if q_heads == 1 else q_heads, kv_count, kv_count)
        batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in given))
        q, k, v = (
            tensor.expand(*batch, count, -1, -1).reshape(batch.numel(), count, *tensor.shape[-2:])
            for tensor, count in zip(given, counts, strict=True)
        )
        mask = self.attn_mask
        if mask is not None:
            mask = mask.expand(*batch, *q.shape[1:3], k.shape[2]).reshape(*q.shape[:3], k.shape[2])
        causal = "upper_left" if self.is_causal else None
        leading = () if all(t.dim() == 2 for t in (self.query, self.key, self.value)) else (*batch, counts[0])
        return Attention(q, k, v, mask, causal, scale=self.scale, dropout_p=self.dropout_p), leading


def draw(kind: str, number: int, dtype: torch.dtype, chance: random.Random) -> Attention | Torchs:
    dim = _width(chance)
    options = {
        "dtype": dtype,
        "seed": number,
        "v_dim": _width(chance),
        "scale": _scale(chance, dim),
        "dropout_p": chance.choice((0.0, 0.0, 0.0, 0.3, 1.0)),
    }
    if kind == "scaled_dot_product_attention":
        return _torchs(dim, options, chance)
    options |= {
        "causal": chance.choice((None, "upper_left", "lower_right")),
        "window": tuple(chance.choice((-1, -1, -1, 0, 1, 3, 20, 1000, FAR)) for _ in range(2)),
        "softcap": chance.choice((None, None, 0.0, 1.5, 30.0)),
        "slopes": chance.choice((None, None, "heads", "batch")),
        "sinks": chance.random() < 0.3,
    }
    q_heads, kv_heads = _heads(chance)
    if kind == "attention_varlen":
        batch = chance.choice((0, 1, 1, 2, 3, 5))
        q_lens, k_lens = ([one(chance) for _ in range(batch)] for one in (_q_len, _k_len))
        past = chance.choice((0, 0, 1, 9))
        return _starts(make_varlen(q_lens, k_lens, q_heads, dim, kv_heads=kv_heads, past=past, **options), chance)
    batch, q_len, k_len = chance.choice((0, 1, 1, 2, 3)), _q_len(chance), _k_len(chance)
    if chance.random() < 0.4:
        options |= {"kv_lengths": [chance.randint(0, k_len) for _ in range(batch)]}
    options |= _mask(chance, (batch, q_heads, q_len, k_len))
    case = make_attention(batch, q_heads, q_len, dim, kv_heads=kv_heads, k_len=k_len, **options)
    return replace(case, mask=_infinite(case.mask, chance))


def _width(chance: random.Random) -> int:
    return 0 if chance.random() < 0.03 else chance.choice(WIDTHS)


def _scale(chance: random.Random, dim: int) -> float | None:
    """None too large: rounding shows in weights that are made again from lse."""
    factor = chance.choice((None, None, 1.5, -1.0, 0.0))
    return None if factor is None else factor / math.sqrt(max(1, dim))


def _q_len(chance: random.Random) -> int:
    return chance.choice(QUERIES)


def _k_len(chance: random.Random) -> int:
    return chance.choice(MANY if chance.random() < 0.02 else KEYS)


def _heads(chance: random.Random) -> tuple[int, int]:
    kv_heads = chance.choice((1, 1, 1, 2, 2, 3)) if chance.random() < 0.98 else 0
    return kv_heads * chance.choice((1, 1, 1, 2, 3, 4, 13)), kv_heads


def _mask(chance: random.Random, full: tuple[int, ...]) -> dict[str, Any]:
    """A mask that broadcasts to the full shape from any dimensions of it."""
    mask = chance.choice((None, "bool", "float"))
    shape = tuple(chance.choice((1, size)) for size in full)[chance.randrange(len(full)) :]
    return {} if mask is None else {"mask": mask, "mask_shape": shape}


def _infinite(mask: Tensor | None, chance: random.Random) -> Tensor | None:
    """A float mask with some infinities, now and then."""
    if mask is None or mask.dtype == torch.bool or chance.random() < 0.5:
        return mask
    return mask.masked_fill(torch.rand(mask.shape) < chance.random(), -torch.inf)


def _starts(case: Attention, chance: random.Random) -> Attention:
    """What says where sequences are in one of the forms it may have."""
    form = chance.choice((None, torch.int64, torch.int32))
    if form is None:
        return case
    starts = {name: torch.tensor(getattr(case, name), dtype=form) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    return replace(case, **starts)


def _torchs(dim: int, options: dict[str, Any], chance: random.Random) -> Torchs:
    """Tensors of 2 to 6 dimensions, some of which broadcast."""
    rank, enable_gqa = chance.randint(2, 6), chance.random() < 0.5
    batch = tuple(chance.choice((0, 1, 1, 2, 2, 3)) for _ in range(rank - 3))
    q_heads, kv_heads = _heads(chance)
    q_len, k_len = _q_len(chance), _k_len(chance)

    def tensor(heads: int, length: int, width: int) -> Tensor:
        shape = tuple(size if chance.random() < 0.8 else 1 for size in (*batch, heads)) if rank > 2 else ()
        shape = shape[chance.randrange(rank - 2) :] if shape and chance.random() < 0.2 else shape
        return torch.randn(*shape, length, width, dtype=torch.float64).to(options["dtype"])

    case = Torchs(
        tensor(q_heads if enable_gqa else kv_heads, q_len, dim), tensor(kv_heads, k_len, dim),
        tensor(kv_heads, k_len, options["v_dim"]), None, options["dropout_p"], chance.random() < 0.5,
        options["scale"], enable_gqa,
    )  # fmt: skip
    _, leading = case.written_out()
    mask = _mask(chance, (*leading, q_len, k_len))
    if not mask:
        return case
    values = torch.randn(mask["mask_shape"], dtype=torch.float64)
    made = values > -0.5 if mask["mask"] == "bool" else values.to(options["dtype"])
    return replace(case, attn_mask=_infinite(made, chance))


def laid_out(case: Attention | Torchs, chance: random.Random) -> Attention | Torchs:
    """The tensors, the mask among them, in other memory layouts."""
    case = case.map(lambda _, tensor: lay_out(tensor, chance))
    name = "mask" if isinstance(case, Attention) else "attn_mask"
    mask = getattr(case, name)
    return case if mask is None or mask.is_floating_point() else replace(case, **{name: lay_out(mask, chance)})


def run_fastlm(case: Attention | Torchs) -> Outputs:
    if isinstance(case, Attention):
        return attention.run_fastlm(case)
    torch.manual_seed(SEED)
    given = {field.name: getattr(case, field.name) for field in fields(case)}
    return {"output": fastlm.ops.scaled_dot_product_attention(**given)}


def run_reference(case: Attention | Torchs) -> Outputs:
    if isinstance(case, Attention):
        return attention.run_reference(case)
    written_out, leading = case.written_out()
    output = attention.run_reference(written_out)["output"]
    return {"output": output.reshape(*leading, *output.shape[-2:])}


def scale(case: Attention | Torchs) -> float:
    """The size of sums of what is drawn: gradients of scores may cancel, over a row and over all that a mask is for."""
    written_out = case if isinstance(case, Attention) else case.written_out()[0]
    q, k, v, mask = written_out.q, written_out.k, written_out.v, written_out.mask
    if q.dtype == torch.bfloat16:  # its sums are of float32
        return 4.0
    terms = v.shape[-1] if mask is None else max(v.shape[-1], k.shape[-2])
    return max(4.0, math.sqrt(q.shape[:-1].numel() * terms))


def spoil(case: Attention | Torchs, chance: random.Random) -> tuple[str, Attention | Torchs]:
    """The case with one thing wrong, and what that is."""
    ways = _wrong_tensors(case, chance) | _wrong_options(case, chance)
    what = chance.choice(list(ways))
    return what, replace(case, **ways[what])


def _wrong_tensors(case: Attention | Torchs, chance: random.Random) -> dict[str, dict[str, Any]]:
    q_name, k_name, v_name = list(case.tensors())[:3]
    name = chance.choice((q_name, k_name, v_name))
    q, k, v = (case.tensors()[each] for each in (q_name, k_name, v_name))
    tensor = case.tensors()[name]
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    ways: dict[str, dict[str, Any]] = {
        f"{name} of another dtype": {name: tensor.to(other)},
        f"{name} of no dimensions": {name: tensor.new_zeros(())},
        f"{name} of one dimension": {name: tensor.new_zeros(3)},
        f"{name} as a list": {name: [1.0, 2.0]},
        f"{name} of whole numbers": {name: tensor.long()},
        "all of whole numbers": {q_name: q.long(), k_name: k.long(), v_name: v.long()},
        "other widths": {k_name: k.new_zeros(*k.shape[:-1], k.shape[-1] + 1)},
        "a value too many": {v_name: v.new_zeros(*v.shape[:-2], v.shape[-2] + 1, v.shape[-1])},
    }
    if isinstance(case, Attention):
        heads = (q.shape[1] + 1,)
        ways[f"{name} with one dimension more"] = {name: tensor.unsqueeze(0)}
        if q.shape[1]:
            ways["heads that do not divide"] = {
                each: t.new_zeros(t.shape[0], *heads, *t.shape[2:]) for each, t in ((k_name, k), (v_name, v))
            }
        if q.dim() == 4:
            ways["another batch"] = {each: torch.cat((t, t, t.new_zeros(1, *t.shape[1:])))
                                     for each, t in ((k_name, k), (v_name, v))}  # fmt: skip
    return ways


def _wrong_options(case: Attention | Torchs, chance: random.Random) -> dict[str, dict[str, Any]]:
    ways: dict[str, dict[str, Any]] = {
        "dropout_p": {"dropout_p": chance.choice((-0.1, 1.5, float("nan"), "0.5"))},
        "scale": {"scale": chance.choice(("one", [1.0], 1j, 2**2000))},
    }
    if isinstance(case, Torchs) or case.cu_seqlens_q is None:
        ways |= _wrong_masks(case, chance)
    if isinstance(case, Torchs):
        return ways
    heads = case.q.shape[1]
    ways |= {
        "causal": {"causal": chance.choice(("upper", True, 1))},
        "window": {"window": chance.choice(((-2, 0), (0, -(2**63)), (1,), (1.5, 2), 3, "ab", (None, 1)))},
        "softcap": {"softcap": chance.choice((-1.0, float("nan"), "one", [2.0]))},
        "alibi_slopes": {
            "alibi_slopes": chance.choice(
                (
                    torch.ones(heads + 1),
                    torch.ones(()),
                    torch.ones(1, 1, heads),
                    [1.0],
                    1.0,
                    torch.ones(heads).requires_grad_(),
                    torch.ones(heads, dtype=torch.int64),
                )
            )
        },
        "sinks": {
            "sinks": chance.choice((torch.ones(heads + 1), torch.ones(1, heads), [1.0], 0.0, torch.ones(heads).long()))
        },
    }
    if case.cu_seqlens_q is None:
        ways["kv_lengths"] = {"kv_lengths": _wrong_lengths(case, chance)}
    else:
        name = chance.choice(("cu_seqlens_q", "cu_seqlens_k"))
        ways |= {name: {name: _wrong_starts(case, name, chance)}}
        name = chance.choice(("max_seqlen_q", "max_seqlen_k"))
        ways |= {name: {name: chance.choice((-1, 2.5, "all"))}}
    return ways


def _wrong_masks(case: Attention | Torchs, chance: random.Random) -> dict[str, dict[str, Any]]:
    name, q, k = ("mask", case.q, case.k) if isinstance(case, Attention) else ("attn_mask", case.query, case.key)
    q_len, k_len = q.shape[-2], k.shape[-2]
    whole = torch.ones(q_len, k_len)
    wrong = (
        whole.half(), whole.long(), [[True]], 1.0, torch.ones(q_len, k_len + 2), torch.ones(q_len + 2, k_len) > 0,
        torch.ones(*(1,) * 6, q_len, k_len), torch.ones(k_len + 2),
    )  # fmt: skip
    return {name: {name: chance.choice(wrong)}}


def _wrong_lengths(case: Attention, chance: random.Random) -> object:
    batch, k_len = case.k.shape[0], case.k.shape[2]
    wrong: list[object] = [
        [0] * (batch + 1),
        torch.zeros(batch),
        [[0]],
        0,
        [0.0] * (batch + 1),
        torch.zeros(1, batch).long(),
    ]
    if batch:
        bad = chance.choice((-1, k_len + 1, 2**62, -(2**62)))
        lengths = [0] * batch
        lengths[chance.randrange(batch)] = bad
        wrong += [lengths, torch.tensor(lengths), [2**70] * batch]
    return chance.choice(wrong)


def _wrong_starts(case: Attention, name: str, chance: random.Random) -> object:
    starts = [int(start) for start in getattr(case, name)]
    rows = (case.q if name == "cu_seqlens_q" else case.k).shape[0]
    wrong: list[object] = [
        [], [*starts, starts[-1]], [1, *starts[1:]], torch.tensor(starts).float(), torch.tensor([starts]),
        [float(start) for start in starts], 3, [2**70] * len(starts), [-1, *starts[1:]],
    ]  # fmt: skip
    if len(starts) > 1:
        wrong += [[*starts[:-1], bad] for bad in (rows + 1, -1, 2**62, -(2**62))]
    return chance.choice(wrong)
