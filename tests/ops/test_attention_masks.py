"""Masks of attention: shapes that broadcast, strides, dtypes, any scale."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attention import BF16, FP32, check_attention, dtypes, equal, make_attention, run_fastlm, same_to_the_bit
from tests.numerics import forward_backward

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
        case = make_attention(2, 4, q_len, 8, kv_heads=kv_heads, k_len=7, mask=mask, mask_shape=shape)
        if mask == "bool" or case.mask.numel() > 1:
            check_attention(case)
            continue
        # One number is the sum of all rows, 8 a query, each of which cancels. torch takes a row's sum from the
        # gradients themselves, and so by luck, on some CPUs, has a twentieth of the error of a kernel, which takes it
        # from the output.
        check_attention(case, wanted=("q", "k", "v"))
        check_attention(case, wanted=("mask",), scale=(8 * q_len) ** 0.5)


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


@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-30])
def test_any_scale_with_any_mask(mask: str, scale: float) -> None:
    for q_len in (3, 70):
        check_attention(
            make_attention(2, 2, q_len, 8, mask=mask, scale=scale, causal="upper_left", k_len=70), scale=1.0
        )
