"""Attention against all scores written out: sizes at the edges of blocks, options, layouts, special values."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import _native
from fastlm.ops.reference import dropout_factors
from tests.attention import (
    Attention,
    check_attention,
    make_attention,
    make_varlen,
    run_fastlm,
    run_reference,
    run_torch,
)
from tests.child import check_python
from tests.numerics import Outputs, Runner, check, check_all, check_case, forward_backward

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=("fp32", "fp64", "bf16"))
kernels_only = pytest.mark.skipif(_native.module is None, reason="the promise is the kernels', not torch's")
full = pytest.mark.full

DIMS = (1, 3, 8, 16, 17, 31, 32, 33, 64, 80, 96, 128, 129, 256, 300)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257, 1000)


def equal(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) for name, value in expected.items())


def same_to_the_bit(case: Attention, expected: Attention) -> bool:
    return equal(forward_backward(run_fastlm, case), forward_backward(run_fastlm, expected))


# Sizes.


@dtypes
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(dtype: torch.dtype, dim: int) -> None:
    for q_len, k_len in ((19, 19), (3, 70)):  # tiles, and decoding
        v_dim = DIMS[-1 - DIMS.index(dim)]
        check_attention(make_attention(1, 2, q_len, dim, k_len=k_len, dtype=dtype))
        check_attention(make_attention(1, 2, q_len, dim, k_len=k_len, v_dim=v_dim, dtype=dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [None, "upper_left"])
def test_lengths(length: int, causal: str | None) -> None:
    # With one key the gradient of its score cancels but for that of lse, at the size of the products.
    check_attention(make_attention(1, 2, length, 24, causal=causal), scale=4.0 if length == 1 else 1.0)


@full
@dtypes
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", DIMS)
def test_all_sizes(dtype: torch.dtype, dim: int, length: int) -> None:
    for kv_heads, causal in ((1, "upper_left"), (2, None)):
        check_attention(
            make_attention(2, 2, length, dim, kv_heads=kv_heads, causal=causal, dtype=dtype), scale=dim**0.5
        )


# Queries, keys: more of either, at the edges of tiles (6), blocks (64, 128), chunks (256) and items (512).
UNEQUAL = [(1, 17), (2, 64), (5, 129), (6, 600), (13, 3), (70, 64), (129, 257), (300, 20), (65, 1100)]


@pytest.mark.parametrize(("q_len", "k_len"), UNEQUAL, ids=str)
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
def test_unequal_lengths(q_len: int, k_len: int, causal: str | None) -> None:
    check_attention(make_attention(1, 2, q_len, 16, kv_heads=1, k_len=k_len, causal=causal))


# Options.


MASK_SHAPES = [
    (5, 7),
    (1, 7),
    (5, 1),
    (7,),
    (1,),
    (1, 1, 5, 7),
    (2, 1, 1, 7),
    (2, 1, 5, 1),
    (1, 4, 1, 1),
    (2, 4, 5, 7),
    (1, 4, 5, 7),
    (2, 1, 5, 7),
    (2, 4, 1, 7),
    (4, 1, 7),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_mask_broadcasts(mask: str, shape: tuple[int, ...]) -> None:
    for q_len, kv_heads in ((5, 2), (5, 4), (40, 2)):  # 40: tiles instead of decoding
        shape = tuple(q_len if size == 5 else size for size in shape)
        check_attention(
            make_attention(2, 4, q_len, 8, kv_heads=kv_heads, k_len=7, mask=mask, mask_shape=shape),
        )


@dtypes
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masks_with_long_rows(dtype: torch.dtype, mask: str) -> None:
    for q_len, k_len in ((3, 600), (70, 300)):
        for shape in ((2, 1, 1, k_len), (q_len, k_len)):
            check_attention(make_attention(2, 2, q_len, 16, k_len=k_len, mask=mask, mask_shape=shape, dtype=dtype))


def strided_masks(mask: Tensor) -> dict[str, Tensor]:
    """The same mask (B, H, Tq, Tk) with unusual strides; or, expanded, with the values of one row or column."""
    wide = mask.new_zeros(*mask.shape[:-1], 3 * mask.shape[-1])
    wide[..., ::3] = mask
    return {
        "transposed": mask.mT.contiguous().mT,
        "every third": wide[..., ::3],
        "heads inside": mask.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        "expanded keys": mask[..., :1].expand_as(mask),
        "expanded queries": mask[..., :1, :].expand_as(mask),
        "expanded heads": mask[:, :1].expand_as(mask),
        "all expanded": mask[:1, :1, :1, :1].expand_as(mask),
        "reversed": mask.flip(-1).flip(-1),
        "offset": torch.cat((mask, mask), -1)[..., mask.shape[-1] :],
    }


@pytest.mark.parametrize("q_len", [3, 70])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_mask_strides(isa: str, mask: str, q_len: int) -> None:
    case = make_attention(2, 2, q_len, 8, k_len=130, mask=mask)
    for name, strided in strided_masks(case.mask).items():
        given, dense = (replace(case, mask=m) for m in (strided, strided.contiguous()))
        assert same_to_the_bit(given, dense), name


def test_float32_mask_with_bfloat16_inputs() -> None:
    case = make_attention(2, 2, 20, 8, mask="float", dtype=BF16)
    got = forward_backward(run_fastlm, replace(case, mask=case.mask.float()))
    expected = forward_backward(run_fastlm, case)
    assert got["grad_mask"].dtype == FP32
    assert equal({name: value.to(expected[name].dtype) for name, value in got.items()}, expected)


def test_a_mask_without_gradient_costs_none() -> None:
    case = make_attention(2, 2, 20, 8, mask="float")
    got = forward_backward(run_fastlm, case, wanted=("q", "k", "v"))
    expected = forward_backward(run_fastlm, case)
    for name in ("q", "k", "v"):
        assert torch.equal(got[f"grad_{name}"], expected[f"grad_{name}"])


WINDOWS = [(0, 0), (3, -1), (-1, 3), (2, 5), (70, 0), (64, 64), (1000, 1000)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
def test_windows(window: tuple[int, int], causal: str | None) -> None:
    for q_len, k_len in ((5, 130), (130, 130), (150, 70)):
        check_attention(make_attention(1, 2, q_len, 8, k_len=k_len, window=window, causal=causal))


OPTIONS = {
    "slopes": {"slopes": "heads"},
    "slopes of each": {"slopes": "batch"},
    "softcap": {"softcap": 1.5},
    "large softcap": {"softcap": 50.0},
    "softcap of none": {"softcap": 0.0},
    "sinks": {"sinks": True},
    "scale": {"scale": 0.5},
    "negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0},
    "lengths": {"kv_lengths": [3, 0, 70, 41]},
    "no keys": {"kv_lengths": [0, 0, 0, 0]},
    "dropout": {"dropout_p": 0.3},
    "all": {
        "slopes": "batch",
        "softcap": 3.0,
        "sinks": True,
        "kv_lengths": [70, 1, 0, 64],
        "dropout_p": 0.2,
        "window": (40, 7),
        "mask": "float",
        "mask_shape": (1, 4, 1, 70),
        "scale": 0.5,
    },
}


@pytest.mark.parametrize("q_len", [3, 70], ids=("decode", "tiles"))
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict, causal: str | None, q_len: int) -> None:
    check_attention(make_attention(4, 4, q_len, 8, kv_heads=2, k_len=70, causal=causal, **options))


@pytest.mark.parametrize("dtype", [FP64, BF16], ids=("fp64", "bf16"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_in_other_dtypes(options: dict, dtype: torch.dtype) -> None:
    for q_len in (3, 30):
        case = make_attention(4, 4, q_len, 8, kv_heads=2, k_len=70, causal="lower_right", dtype=dtype, **options)
        check_attention(case)


@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-30])
def test_any_scale_with_any_mask(mask: str, scale: float) -> None:
    for q_len in (3, 70):
        check_attention(
            make_attention(2, 2, q_len, 8, mask=mask, scale=scale, causal="upper_left", k_len=70), scale=1.0
        )


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 2), (6, 3), (8, 8), (13, 1), (12, 1)], ids=str)
def test_heads_that_share_keys(heads: tuple[int, int]) -> None:
    for q_len in (1, 2, 20):
        check_attention(
            make_attention(2, heads[0], q_len, 8, kv_heads=heads[1], k_len=66, causal="lower_right"), scale=1.0
        )


def test_lengths_in_every_form() -> None:
    case = make_attention(3, 2, 4, 8, k_len=9, kv_lengths=[9, 0, 5])
    expected = run_fastlm(case)
    for lengths in ([9, 0, 5], case.kv_lengths.int(), case.kv_lengths.to(torch.uint8), case.kv_lengths.repeat(2)[:3]):
        assert equal(run_fastlm(replace(case, kv_lengths=lengths)), expected)


@pytest.mark.parametrize("q_len", [3, 70])
def test_what_lies_past_a_length_plays_no_part(isa: str, q_len: int) -> None:
    case = make_attention(3, 2, q_len, 8, k_len=90, kv_lengths=[65, 0, 90], causal="lower_right", slopes="heads")
    expected = forward_backward(run_fastlm, case)
    past = case.k.isnan()
    for fill in (0.0, torch.inf, 1e30):
        other = replace(case, k=case.k.masked_fill(past, fill), v=case.v.masked_fill(past, fill))
        assert equal(forward_backward(run_fastlm, other), expected)
    for name in ("grad_k", "grad_v"):
        assert not expected[name][past].any()
    alone = make_attention(3, 2, q_len, 8, k_len=90, causal="lower_right", slopes="heads")
    one = replace(alone.map(lambda name, t: t[:1] if name == "q" else t[:1, :, :65]), kv_lengths=None)
    assert torch.equal(run_fastlm(one)["output"][0], expected["output"][0])


def test_rows_that_see_nothing(isa: str) -> None:
    for q_len, option in product(
        (4, 70),
        (
            {"causal": "lower_right", "k_len": 3},
            {"window": (0, 0), "k_len": 2},
            {"kv_lengths": [0, 0]},
            {"mask": "bool"},
            {"mask": "float"},
        ),
    ):
        case = make_attention(2, 2, q_len, 8, **option)
        if case.mask is not None:
            out = False if case.mask.dtype == torch.bool else -torch.inf
            case = replace(case, mask=case.mask.index_fill(2, torch.tensor([0, q_len - 1]), out))
        got = forward_backward(run_fastlm, case)
        blind = got["lse"] == -torch.inf
        assert blind.any()
        assert not got["output"][blind].any()
        assert not got["grad_q"][blind].any()
        assert all(value.isfinite().all() for name, value in got.items() if name != "lse")


# Layouts.


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values (B, H, T, D) in memory otherwise."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=tensor.dtype)
    wide[..., 2:-3] = tensor
    sparse = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    sparse[..., ::2] = tensor
    return {
        "BTHD": tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "TBHD": tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "slice of rows": wide[..., 2:-3],
        "every second": sparse[..., ::2],
        "BHDT": tensor.mT.contiguous().mT,
        "every second step": tensor.repeat_interleave(2, 2)[:, :, ::2],
    }


@pytest.mark.parametrize("q_len", [2, 40])
def test_layouts(isa: str, q_len: int) -> None:
    case = make_attention(2, 4, q_len, 17, kv_heads=2, k_len=70, causal="lower_right")
    made = {name: layouts(tensor) for name, tensor in case.tensors().items()}
    expected = forward_backward(run_fastlm, case)
    for layout in made["q"]:
        for names in (("q",), ("k", "v"), ("q", "k", "v")):
            other = case.map(lambda name, tensor, n=names, at=layout: made[name][at] if name in n else tensor)
            assert equal(forward_backward(run_fastlm, other), expected), (layout, names)


def test_expanded_inputs(isa: str) -> None:
    """Stride 0 over batch, heads, steps or width."""
    for q_len in (2, 40):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        for dim in range(4):
            expanded = case.map(lambda _, tensor, dim=dim: tensor.narrow(dim, 1, 1).expand_as(tensor))
            assert same_to_the_bit(expanded, expanded.map(lambda _, tensor: tensor.contiguous()))


def test_arriving_gradients_in_any_layout(isa: str) -> None:
    case = make_attention(2, 2, 20, 8, requires_grad=True)
    output, lse = run_fastlm(case).values()
    leaves = (case.q, case.k, case.v)
    for grad in (torch.ones(()).expand_as(output), torch.randn_like(output)[..., :1].expand_as(output)):
        for form in (grad, *layouts(grad.contiguous()).values()):
            got = torch.autograd.grad((output, lse), leaves, (form, torch.ones(()).expand_as(lse)), retain_graph=True)
            dense = (grad.contiguous(), torch.ones_like(lse))
            expected = torch.autograd.grad((output, lse), leaves, dense, retain_graph=True)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("arriving", [("output",), ("lse",)], ids=str)
def test_one_output_used(arriving: tuple[str, ...]) -> None:
    for q_len in (3, 40):
        case = make_attention(2, 4, q_len, 8, kv_heads=2, k_len=50, sinks=True, mask="float", mask_shape=(q_len, 50))
        check_attention(case, arriving=arriving)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("mask",), ("sinks",), ("q", "v")], ids=str)
def test_gradient_of_some_inputs(isa: str, wanted: tuple[str, ...]) -> None:
    case = make_attention(2, 2, 20, 8, mask="float", sinks=True)
    got, expected = forward_backward(run_fastlm, case, wanted=wanted), forward_backward(run_fastlm, case)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_strides_of_results(isa: str) -> None:
    """As the input they belong to: heads outside or inside."""
    for q_len in (2, 40):
        case = make_attention(2, 4, q_len, 8, kv_heads=2, k_len=50, v_dim=5, requires_grad=True)
        inside = case.map(lambda _, t: t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
        for given, order in ((case, (0, 1, 2, 3)), (inside, (0, 2, 1, 3))):
            output = fastlm.ops.attention(given.q, given.k, given.v)
            assert output.permute(order).is_contiguous()
            for grad in torch.autograd.grad(output.sum(), (given.q, given.k, given.v)):
                assert grad.permute(order).is_contiguous()


def test_results_share_no_memory(isa: str) -> None:
    for q_len, k_len in ((1, 1), (3, 50), (40, 40), (4, 0)):
        case = make_attention(1, 2, q_len, 8, k_len=k_len)
        got = forward_backward(run_fastlm, case)
        places = [t.untyped_storage().data_ptr() for t in (*got.values(), *case.tensors().values()) if t.numel()]
        assert len(set(places)) == len(places)


def test_inputs_stay_as_they_are(isa: str) -> None:
    case = make_attention(2, 2, 20, 8, mask="float", sinks=True, slopes="heads", kv_lengths=[7, 20], dropout_p=0.5)
    before = case.map(lambda _, tensor: tensor.clone())
    forward_backward(run_fastlm, case)
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor.view(torch.int32), before.tensors()[name].view(torch.int32)), name


# Values.


@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
@pytest.mark.parametrize("q_len", [3, 70])
def test_nan_is_seen_by_those_who_see_it(isa: str, name: str, q_len: int) -> None:
    case = make_attention(1, 2, q_len, 8, k_len=70, causal="lower_right", mask="float")
    place = (0, 1, 1, 0)
    spoilt = case.map(lambda key, t: t.index_put(tuple(map(torch.tensor, place)), torch.tensor(torch.nan))
                      if key == name else t)  # fmt: skip
    got, clean = run_fastlm(spoilt), run_fastlm(case)
    position = torch.arange(q_len) + 70 - q_len
    hit = position >= 1 if name in ("k", "v") else torch.arange(q_len) == 1
    if name == "v":
        assert got["output"][0, 1, hit, 0].isnan().all()
        assert torch.equal(got["lse"], clean["lse"])
    else:
        assert got["output"][0, 1, hit].isnan().all()
        assert torch.equal(got["lse"][0, 1].isnan(), hit)
    assert torch.equal(got["output"][0, 0], clean["output"][0, 0])


def test_nan_comes_through_backward(isa: str) -> None:
    for q_len in (3, 70):
        case = make_attention(1, 2, q_len, 8, k_len=70)
        spoilt = replace(case, q=case.q.index_fill(2, torch.tensor(1), torch.nan))
        got = forward_backward(run_fastlm, spoilt)
        assert got["grad_q"][:, :, 1].isnan().all()
        assert got["grad_k"].isnan().all()
        assert got["grad_v"].isnan().all()
        assert got["grad_q"][:, :, 0].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("q_len", [3, 70])
def test_infinite_values(value: float, q_len: int) -> None:
    case = make_attention(1, 1, q_len, 8, k_len=70)
    spoilt = case.v.clone()
    spoilt[0, 0, 40, 3] = value
    check_attention(replace(case, v=spoilt), wanted=())


def output_only(run: Runner) -> Runner:
    return lambda case: {"output": run(case)["output"]}


def run_torch_flash(case: Attention) -> Outputs:
    """torch's own fused attention; it too makes weights again from lse, whose rounding shows for large scores."""
    return {"output": F.scaled_dot_product_attention(case.q, case.k, case.v, case.mask, scale=case.scale)}


@dtypes
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores(dtype: torch.dtype, size: float) -> None:
    for q_len in (3, 70):
        case = make_attention(1, 2, q_len, 8, k_len=70, scale=size, dtype=dtype)
        # In multiples of 1/4 products are exact, so that large scores bring no error of their own.
        case = case.map(lambda _, tensor: (4 * tensor).round().clamp(-8, 8) / 4)
        assert all(value.isfinite().all() for value in forward_backward(run_fastlm, case).values())
        check_attention(case, wanted=("v",) if dtype == BF16 else ())
        if dtype == FP32:
            check_case(case, output_only(run_fastlm), run_torch_flash, scale=size)


LOW = {"-1e4": -1e4, "-1e9": -1e9, "finfo.min": torch.finfo(FP32).min}
lows = pytest.mark.parametrize("low", LOW.values(), ids=LOW)


@lows
def test_masks_of_large_numbers_instead_of_infinities(low: float) -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        mask = torch.where(torch.rand(q_len, 70) < 0.5, low, 0.0)
        mask[:, :65] = low  # a whole block
        mask[:, -1] = 0
        check_attention(replace(case, mask=mask), wanted=("q", "k", "v"))


def all_low(low: float) -> Attention:
    case = make_attention(2, 2, 70, 8)
    return replace(case, mask=torch.zeros(70, 70).index_fill(0, torch.tensor([0, 69]), low))


@lows
def test_rows_of_large_numbers_alone(low: float) -> None:
    """Such a row averages what it sees, as in torch."""
    check_attention(all_low(low), wanted=())


@lows
def test_gradients_of_rows_of_large_numbers_alone(low: float) -> None:
    check_case(all_low(low), output_only(run_fastlm), run_torch_flash, wanted=("q", "k", "v"))


@lows
def test_padded_rows_of_large_numbers_do_not_hurt_others(low: float) -> None:
    """Their results are not used, as padding's are not: the rest stays right."""

    def others(run: Runner) -> Runner:
        return lambda case: {"output": run(case)["output"][:, :, 1:-1]}

    check_case(all_low(low), others(run_fastlm), others(run_torch), wanted=("q", "k", "v"), scale=1.0)


def test_mask_of_infinities() -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        mask = torch.where(torch.rand(q_len, 70) < 0.5, -torch.inf, 0.0)
        mask[:, :65] = -torch.inf  # a whole block, and whole rows
        check_attention(replace(case, mask=mask))
        check_attention(replace(case, mask=mask == 0))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_huge_and_tiny_gradients(size: float) -> None:
    case = make_attention(1, 2, 20, 8)
    check_attention(case, arriving=lambda out: {"output": torch.full_like(out["output"], size)}, scale=size)


EMPTY = {
    "batch": {"batch": 0},
    "heads": {"q_heads": 0},
    "no keys": {"k_len": 0},
    "no queries": {"q_len": 0, "k_len": 4},
    "neither": {"q_len": 0},
}


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in EMPTY.items()),
        pytest.param({"dim": 0, "v_dim": 3}, id="no width"),
        pytest.param({"v_dim": 0}, id="no value"),
    ],
)
def test_empty(options: dict) -> None:
    for more in ({}, {"sinks": True}, {"mask": "float"}, {"mask": "bool", "causal": "lower_right"}, {"dropout_p": 0.5}):
        # Without width every score is 0, whatever the scale, which is not 1 / sqrt(0).
        check_attention(make_attention(**{"q_len": 3, "scale": 1.0, **options, **more}))


# Paths that must agree.


@pytest.mark.parametrize("k_len", [511, 512, 513, 1600])
def test_decoding_is_prefill(isa: str, k_len: int) -> None:
    """The last queries of a long sequence alone, against a cache: in several items, heads that share keys."""
    case = make_attention(2, 6, 20, 24, kv_heads=2, k_len=k_len, causal="lower_right", slopes="heads")
    whole, truth = run_fastlm(case), run_torch(case.to(FP64))
    same = run_torch(case)
    for queries in (1, 2, 4):
        last = run_fastlm(replace(case, q=case.q[:, :, -queries:]))
        for name, value in last.items():
            part = (slice(None), slice(None), slice(-queries, None))
            check(f"{name} of decoding", value, same[name][part], truth[name][part])
            check(f"{name} of prefill", whole[name][part], same[name][part], truth[name][part])


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"softcap": 2.0}, {"window": (600, 0)}], ids=str)
@pytest.mark.parametrize("lengths", [None, [1300, 0], [513, 512]], ids=str)
def test_long_cache(lengths: list[int] | None, options: dict) -> None:
    case = make_attention(
        2, 4, 3, 16, kv_heads=1, k_len=1300, kv_lengths=lengths, causal="lower_right", slopes="batch", **options
    )
    check_attention(case)


def test_largest_score_in_any_part() -> None:
    """Partial results of decoding meet, whichever part has the largest score, or sees nothing."""
    for part in range(3):
        case = make_attention(1, 1, 2, 8, k_len=1300)
        bias = torch.zeros(1300)
        bias[part * 512 : part * 512 + 100] = 80.0
        bias[(part + 1) % 3 * 512 : (part + 1) % 3 * 512 + 512] = -torch.inf
        check_attention(replace(case, mask=bias), wanted=("q", "k", "v"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 1},
        {"mask": "float", "mask_shape": (1, 1100)},
        {"mask": "float", "mask_shape": (70, 1)},
        {"mask": "float", "mask_shape": (1, 2, 1, 1100)},
        {"mask": "float", "mask_shape": (2, 1, 70, 1100)},
        {"mask": "bool"},
        {"kv_lengths": [1100, 30]},
        {"window": (100, 3)},
        {"dropout_p": 0.3},
        {"softcap": 1.0, "slopes": "heads"},
    ],
    ids=str,
)
def test_backward_in_parts(options: dict) -> None:
    """Few heads and many keys: the keys of a head are cut into parts, whose gradients of q meet."""
    check_attention(make_attention(2, 2, 70, 8, k_len=1100, causal="lower_right", **options), scale=8.0)


@kernels_only
@dtypes
def test_threads_give_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    cases = [
        make_attention(2, 4, 150, 33, kv_heads=2, causal="upper_left", dtype=dtype),
        make_attention(1, 2, 70, 16, kv_heads=1, k_len=1600, dtype=dtype),
        make_attention(1, 1, 300, 16, k_len=1100, mask="float", mask_shape=(1, 1100), dtype=dtype),
        make_attention(2, 8, 1, 64, kv_heads=2, k_len=1600, kv_lengths=[1600, 700], dtype=dtype),
        make_attention(3, 4, 60, 16, dropout_p=0.4, slopes="batch", dtype=dtype),
        make_varlen([90, 0, 33], [120, 5, 33], 4, 16, kv_heads=2, past=3, causal="lower_right", dtype=dtype),
    ]
    for case in cases:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_backward(run_fastlm, case))
        assert all(same_bits(result, results[0]) for result in results[1:]), case.arguments().keys()


def same_bits(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name].nan_to_num(9), value.nan_to_num(9)) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference(options: dict, dtype: torch.dtype) -> None:
    """fastlm's plain reference too: forward and gradients."""
    case = make_attention(4, 4, 5, 8, kv_heads=2, k_len=70, causal="lower_right", dtype=dtype, **options)
    runs = ((run_reference, case), (run_torch, case), (run_torch, case.to(FP64)))
    check_all(*(forward_backward(run, given) for run, given in runs), scale=1.0)


# Packed sequences.


PACKED = {
    "one": ([5], [5]),
    "three": ([5, 17, 2], [5, 17, 2]),
    "empty ones": ([0, 5, 0, 7, 0], [3, 0, 0, 9, 0]),
    "all empty": ([0, 0], [0, 0]),
    "none": ([], []),
    "decoding": ([1, 1, 2], [40, 600, 3]),
    "long": ([130, 70], [140, 65]),
}


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), PACKED.values(), ids=PACKED)
def test_packed(q_lengths: list[int], k_lengths: list[int], past: int) -> None:
    for options in ({}, {"causal": "lower_right"}, {"causal": "upper_left", "sinks": True, "slopes": "batch"}):
        check_attention(make_varlen(q_lengths, k_lengths, 4, kv_heads=2, past=past, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"window": (3, 1)},
        {"window": (6, -1), "causal": "lower_right", "slopes": "heads"},
        {"softcap": 2.0},
        {"dropout_p": 0.4},
        {"scale": -0.5},
        {"dtype": FP64},
        {"dtype": BF16, "causal": "lower_right", "slopes": "heads", "sinks": True},
        {"v_dim": 3},
    ],
    ids=str,
)
def test_packed_options(options: dict) -> None:
    check_attention(make_varlen([7, 0, 30, 1], [9, 4, 25, 1], 4, kv_heads=1, past=2, **options))


def test_packed_keys_in_parts_with_rows_past_the_last() -> None:
    """Gradients of q are then kept by part: the rows past the last sequence have places among them."""
    check_attention(make_varlen([30], [1100], 2, past=900), wanted=("q", "k", "v"), scale=8.0)


def test_windows_beyond_all_numbers() -> None:
    case = make_attention(1, 2, 20, 8)
    far = replace(case, window=(2**63 - 1, 2**63 - 1))
    assert all(map(torch.equal, run_fastlm(case).values(), run_fastlm(far).values()))


@full
def test_packed_over_many_lengths() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths = [torch.randint(0, 200, (6,), generator=generator).tolist() for _ in range(2)]
        for causal in (None, "upper_left", "lower_right"):
            check_attention(make_varlen(*lengths, 4, 16, kv_heads=2, past=seed % 3, causal=causal))


def test_packed_starts_in_every_form() -> None:
    case = make_varlen([5, 0, 3], [4, 2, 3])
    expected = run_fastlm(case)
    for form in (torch.tensor, lambda starts: torch.tensor(starts, dtype=torch.int32)):
        starts = {name: form(getattr(case, name)) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        assert equal(run_fastlm(replace(case, **starts)), expected)
    rows = (case.q, case.k, case.v, case.cu_seqlens_q, case.cu_seqlens_k)
    assert torch.equal(fastlm.ops.attention_varlen(*rows, 5, 4), expected["output"])


def test_packed_is_padded(isa: str) -> None:
    """The same sequences in a batch of one length, to the bit."""
    padded = make_attention(3, 4, 20, 8, kv_heads=2, causal="upper_left", slopes="heads")
    starts = [0, 20, 40, 60]
    packed = replace(
        padded.map(lambda _, tensor: tensor.transpose(1, 2).flatten(0, 1)), cu_seqlens_q=starts, cu_seqlens_k=starts
    )
    expected, got = run_fastlm(padded), run_fastlm(packed)
    assert torch.equal(got["output"], expected["output"].transpose(1, 2).flatten(0, 1))
    assert torch.equal(got["lse"], expected["lse"].transpose(0, 1).flatten(1))


def test_packed_layouts(isa: str) -> None:
    """Heads outside, rows of a wider matrix, as slices of one projection."""
    case = make_varlen([7, 9], [7, 9], 4, 8)
    expected = forward_backward(run_fastlm, case)
    fused = torch.cat((case.q, case.k, case.v), -1)
    slices = dict(zip(("q", "k", "v"), fused.split(8, -1), strict=True))
    outside = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in case.tensors().items()}
    for given in (slices, outside):
        assert equal(forward_backward(run_fastlm, case.map(lambda name, _, g=given: g[name])), expected)


# Dropout.


def kept_weights(case: Attention) -> Tensor:
    """Which weights remain: values are the unit matrix, so that the output is the weights."""
    k_len = case.k.shape[2]
    unit = torch.eye(k_len).expand(*case.k.shape[:2], -1, -1)
    return run_fastlm(replace(case, v=unit))["output"] != 0


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_how_many_weights_are_dropped(dropout_p: float) -> None:
    """Over all, over rows, columns and heads, and for neighbours together: as of independent coins."""
    kept = kept_weights(make_attention(2, 4, 100, 8, k_len=200, dropout_p=dropout_p)).double()
    p = 1 - dropout_p

    def deviations(sample: Tensor, mean: float, variance: float, count: int) -> float:
        return float(((sample - mean) / (variance / count) ** 0.5).abs().max())

    coin = p * (1 - p)
    assert deviations(kept.mean(), p, coin, kept.numel()) < 4.5
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3), (3,)):
        count = kept.numel() // kept.mean(dims).numel()
        assert deviations(kept.mean(dims), p, coin, count) < 5.5, dims
    for dim, distance in product(range(4), (1, 2, 16)):
        size = kept.shape[dim]
        if distance >= size:
            continue
        both = kept.narrow(dim, 0, size - distance) * kept.narrow(dim, distance, size - distance)
        # Pairs overlap, which adds 2 p^3 (1 - p) at most to the variance of a product of two coins.
        variance = p**2 * (1 - p**2) + 2 * p**3 * (1 - p)
        assert deviations(both.mean(), p**2, variance, both.numel()) < 4.5, (dim, distance)


def test_dropout_of_all_and_of_none(isa: str) -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70)
        gone = forward_backward(run_fastlm, replace(case, dropout_p=1.0))
        expected = forward_backward(run_fastlm, case)
        assert not gone["output"].any()
        assert not gone["grad_v"].any()
        assert torch.equal(gone["lse"], expected["lse"])
        assert same_to_the_bit(replace(case, dropout_p=0), case)
    state = torch.get_rng_state()
    run_fastlm(case)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_follows_the_seed(isa: str) -> None:
    for q_len in (3, 70):
        case = make_attention(2, 2, q_len, 8, k_len=70, dropout_p=0.5)
        arguments = case.arguments()
        torch.manual_seed(1)
        first, second = fastlm.ops.attention(**arguments), fastlm.ops.attention(**arguments)
        torch.manual_seed(1)
        assert torch.equal(fastlm.ops.attention(**arguments), first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("q_len", [3, 70])
def test_dropout_is_the_references(isa: str, q_len: int) -> None:
    """The same weights fall in every implementation, forward and backward."""
    case = make_attention(2, 4, q_len, 8, kv_heads=2, k_len=130, dropout_p=0.4, causal="lower_right")
    truth = forward_backward(run_reference, case.to(FP64))
    check_all(forward_backward(run_fastlm, case), forward_backward(run_reference, case), truth, 1.0)
    unit = replace(case, mask=None, causal=None, k=case.k[:, :, :70], v=case.v[:, :, :70])
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, ())
    assert torch.equal(kept_weights(unit), dropout_factors(seed, 0.4, unit.q.shape[:3], 70) > 0)


def test_dropout_gradients_are_finite_differences(isa: str) -> None:
    for q_len, k_len in ((2, 5), (14, 3)):
        case = make_attention(1, 1, q_len, 3, k_len=k_len, dropout_p=0.4, dtype=FP64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *qkv, c=case: run_fastlm(
            replace(c, **dict(zip("qkv", qkv, strict=True))))["output"], (case.q, case.k, case.v))  # fmt: skip


# Memory.

PEAK = """
import re
from pathlib import Path
from tests.attention import make_attention, run_fastlm
torch.set_num_threads(1)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

for options in (
    {"causal": "upper_left", "dropout_p": 0.1, "slopes": "heads", "softcap": 5.0},
    {"mask": "float", "mask_shape": (1, 4096)},
    {"kv_heads": 1},
):
    case = make_attention(1, 2, 4096, 16, **options)
    if options.get("dropout_p"):
        forward_backward(run_fastlm, case.map(lambda _, t: t[:, :, :300]))
        before = peak()
    forward_backward(run_fastlm, case)
print(peak() - before)
"""


@kernels_only
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_nothing_of_all_scores_is_stored() -> None:
    """The scores of one head would take 64 MiB."""
    assert int(check_python(PEAK)) < 24 * 2**20


def test_kept_for_backward() -> None:
    """The inputs, output and lse, and nothing else."""
    case = make_attention(2, 4, 70, 16, kv_heads=2, mask="float", mask_shape=(1, 70), requires_grad=True)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run_fastlm(case)
    allowed = sum(t.untyped_storage().nbytes() for t in (*case.tensors().values(), *outputs.values()))
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) <= allowed
