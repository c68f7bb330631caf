"""scaled_dot_product_attention against torch's, over shapes, masks and torch's own samples of it."""

import sys
import types
import unittest
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from tests.numerics import Outputs, check, check_all, each_isa, incoming, scaled_to_float64

Function = Callable[..., Tensor]
OURS, THEIRS = fastlm.ops.scaled_dot_product_attention, F.scaled_dot_product_attention


def results(function: Function, dtype: torch.dtype, inputs: tuple[Tensor, ...], options: dict) -> Outputs:
    """Output and gradients of q, k, v and a floating mask."""
    names = ["query", "key", "value"]
    given = dict(zip(names, inputs, strict=True)) | options
    leaves = {
        name: value.detach().to(dtype).requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    torch.manual_seed(0)
    output = function(**{**given, **leaves})
    grads = torch.autograd.grad(output, list(leaves.values()), incoming({"output": output})["output"])
    return {"output": output, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check_against_torch(*inputs: Tensor, **options: object) -> None:
    dtype = inputs[0].dtype
    truth = results(THEIRS, torch.float64, inputs, options)
    if dtype == torch.float64:
        same = scaled_to_float64(results(THEIRS, torch.float32, inputs, options), truth)
    else:
        same = results(THEIRS, dtype, inputs, options)
    for _ in each_isa(dtype):
        check_all(results(OURS, dtype, inputs, options), same, truth, 1.0)


def inputs(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    return torch.randn(q), torch.randn(k), torch.randn(v or k)


# Shapes of query and key; value is as key.
SHAPES = [
    ((5, 8), (7, 8)),
    ((3, 5, 8), (3, 7, 8)),
    ((1, 5, 8), (1, 7, 8)),
    ((2, 3, 5, 8), (2, 3, 7, 8)),
    ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8)),
    ((2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8)),
    ((3, 5, 8), (2, 3, 7, 8)),
    ((2, 3, 5, 8), (3, 7, 8)),
    ((2, 3, 5, 8), (1, 3, 7, 8)),
    ((1, 3, 5, 8), (2, 3, 7, 8)),
    ((2, 3, 5, 8), (7, 8)),
    ((5, 8), (2, 3, 7, 8)),
    ((2, 3, 5, 8), (2, 1, 7, 8)),
    ((2, 1, 5, 8), (2, 3, 7, 8)),
    ((4, 1, 3, 5, 8), (2, 3, 7, 8)),
]
shapes = pytest.mark.parametrize("shapes", SHAPES, ids=str)


@shapes
@pytest.mark.parametrize("is_causal", [False, True], ids=("all", "causal"))
def test_shapes(shapes: tuple, is_causal: bool) -> None:
    check_against_torch(*inputs(*shapes), is_causal=is_causal)


def mask_shapes(q: tuple[int, ...], k: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Everything that broadcasts against the scores, of the rank that torch allows: theirs, or 2."""
    full = (*torch.broadcast_shapes(q[:-2], k[:-2]), q[-2], k[-2])
    yield from {full, full[-2:], (1, full[-1]), (full[-2], 1), (*(1,) * (len(full) - 2), *full[-2:])}


@shapes
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masks(shapes: tuple, mask: str) -> None:
    for shape in mask_shapes(*shapes):
        values = torch.randn(shape)
        if mask == "bool":
            values = values > -0.5
            values[..., :1] = True  # torch's back ends disagree on rows that see nothing
        check_against_torch(*inputs(*shapes), attn_mask=values)


@pytest.mark.parametrize("q_len", [4, 40])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_values_of_other_width_and_scale(rank: int, q_len: int) -> None:
    lead = (2, 2, 3)[: rank - 2] if rank < 5 else (2, 2, 3)
    for is_causal in (False, True):
        given = inputs((*lead, q_len, 8), (*lead, 70, 8), (*lead, 70, 11))
        check_against_torch(*given, scale=0.3, is_causal=is_causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3), (8, 2)])
def test_enable_gqa(heads: int, kv_heads: int) -> None:
    for q_len, is_causal in product((4, 40), (False, True)):
        given = inputs((2, heads, q_len, 8), (2, kv_heads, 50, 8))
        check_against_torch(*given, enable_gqa=True, is_causal=is_causal)
        mask = torch.randn(q_len, 50) > 0
        mask[:, 0] = True
        check_against_torch(*given, enable_gqa=True, attn_mask=mask)
    given = inputs((heads, 4, 8), (kv_heads, 5, 8))
    check_against_torch(*given, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=("bf16", "fp64"))
def test_other_dtypes(dtype: torch.dtype) -> None:
    for q_len, is_causal in product((4, 70), (False, True)):
        given = [tensor.to(dtype) for tensor in inputs((2, 4, q_len, 16), (2, 4, 70, 16))]
        check_against_torch(*given, is_causal=is_causal)
    check_against_torch(*given, attn_mask=torch.randn(q_len, 70).to(dtype))


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_empty(rank: int) -> None:
    lead = (2, 2, 3)[: rank - 2] if rank < 5 else (2, 2, 3)
    for q_len, k_len in ((0, 4), (0, 0)):
        check_against_torch(*inputs((*lead, q_len, 8), (*lead, k_len, 8)))
    if rank > 2:
        lead = (0, *lead[1:])
        check_against_torch(*inputs((*lead, 3, 8), (*lead, 4, 8)))


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_memory_order_follows_query(rank: int) -> None:
    """Heads inside: the result is in the same order, so that a reshape to (B, T, H * D) copies nothing."""
    lead = (2, 2, 3)[-(rank - 2) :] if rank > 2 else ()
    q, k, v = inputs((*lead, 5, 8), (*lead, 7, 8))
    assert OURS(q, k, v).is_contiguous()
    if rank == 4:
        q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v))
        assert OURS(q, k, v).transpose(1, 2).is_contiguous()


def test_key_and_value_broadcast_apart() -> None:
    check_against_torch(*inputs((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 9)))
    check_against_torch(*inputs((2, 4, 5, 8), (4, 7, 8), (7, 9)))
    check_against_torch(*inputs((4, 5, 8), (1, 7, 8), (4, 7, 9)))


# Where torch's own back ends disagree, what the docstring says.


def test_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs((1, 2, 5, 8), (1, 2, 7, 8)))
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    output = OURS(q, k, v, attn_mask=mask)
    assert not output[:, :, 2].any()
    grads = torch.autograd.grad(output.sum(), (q, k, v))
    assert not grads[0][:, :, 2].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_is_causal_and_attn_mask_combine() -> None:
    """torch does so for 4 dimensions, and refuses both at once for others."""
    given = inputs((2, 3, 5, 8), (2, 3, 7, 8))
    causal = torch.ones(5, 7, dtype=torch.bool).tril()
    for mask in (torch.rand(5, 7) < 0.8, torch.randn(5, 7)):
        both = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)
        assert torch.equal(OURS(*given, attn_mask=mask, is_causal=True), OURS(*given, attn_mask=both))
        one = [tensor[0] for tensor in given]
        assert torch.equal(OURS(*one, attn_mask=mask, is_causal=True), OURS(*one, attn_mask=both))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale_with_any_mask(scale: float) -> None:
    """torch's fused kernel multiplies after the largest score is found: a scale below zero overflows there."""
    given = inputs((2, 3, 5, 8), (2, 3, 7, 8))
    mask = torch.rand(5, 7) < 0.5
    mask[:, 0] = True

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT * scale).masked_fill(~mask, -torch.inf), -1) @ v

    doubles = (tensor.double() for tensor in given)
    check("output", OURS(*given, attn_mask=mask, scale=scale), written_out(*given), written_out(*doubles))


def test_heads_must_agree_without_enable_gqa() -> None:
    with pytest.raises(ValueError, match=r"key: expected 4 heads .*got 2"):
        OURS(*inputs((1, 4, 5, 8), (1, 2, 5, 8)))


def test_dropout_in_evaluation_too() -> None:
    q, k, v = inputs((2, 4, 30, 8), (2, 4, 40, 8))
    torch.manual_seed(0)
    first = OURS(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(OURS(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(OURS(q, k, v, dropout_p=0.5), first)
    mean = torch.stack([OURS(q, k, v, dropout_p=0.5) for _ in range(400)]).mean(0)
    assert (mean - OURS(q, k, v)).abs().max() < 0.25


# torch's own samples.


@pytest.fixture(scope="module")
def samples() -> list:
    """What OpInfo tests scaled_dot_product_attention with; torch's test code wants a package that few have."""
    if "expecttest" not in sys.modules:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    made = methods.sample_inputs_scaled_dot_product_attention(None, "cpu", torch.float32, False)
    return [(sample.input, sample.args, sample.kwargs) for sample in made]


def test_samples_of_torch(samples: list) -> None:
    assert len(samples) > 20
    for query, (key, value), options in samples:
        if options["dropout_p"]:
            output = OURS(query, key, value, **options)
            assert output.shape == THEIRS(query, key, value, **options).shape
            assert output.isfinite().all()
        else:
            # Drawn from -9 to 9: scores of hundreds would show the rounding of lse, which torch's unfused path lacks.
            check_against_torch(query / 4, key / 4, value / 4, **options)
