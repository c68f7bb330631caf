"""Attention against all scores written out: sizes at the edges of blocks, and options."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

import fastlm
from tests.attention import (
    BF16,
    FP32,
    FP64,
    check_attention,
    dtypes,
    equal,
    full,
    make_attention,
    run_fastlm,
    run_reference,
    run_torch,
)
from tests.numerics import check, check_all, forward_backward

DIMS = (1, 3, 8, 16, 17, 31, 32, 33, 64, 80, 96, 128, 129, 256, 300)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257, 1000)

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


WINDOWS = [(0, 0), (3, -1), (-1, 3), (2, 5), (70, 0), (64, 64), (1000, 1000)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
def test_windows(window: tuple[int, int], causal: str | None) -> None:
    for q_len, k_len in ((5, 130), (130, 130), (150, 70)):
        check_attention(make_attention(1, 2, q_len, 8, k_len=k_len, window=window, causal=causal))


def test_windows_beyond_all_numbers() -> None:
    case = make_attention(1, 2, 20, 8)
    far = replace(case, window=(2**63 - 1, 2**63 - 1))
    assert all(map(torch.equal, run_fastlm(case).values(), run_fastlm(far).values()))


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


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference(options: dict, dtype: torch.dtype) -> None:
    """fastlm's plain reference too: forward and gradients."""
    case = make_attention(4, 4, 5, 8, kv_heads=2, k_len=70, causal="lower_right", dtype=dtype, **options)
    runs = ((run_reference, case), (run_torch, case), (run_torch, case.to(FP64)))
    check_all(*(forward_backward(run, given) for run, given in runs), scale=1.0)


@pytest.mark.parametrize("masked", [False, True])
def test_weights_of_backward_sum_to_one(isa: str, masked: bool) -> None:
    """An error of lse, or of the way from it to exponents, would be in all weights of a query alike."""
    q_len, generator = 20, torch.Generator().manual_seed(0)  # fewer would be decoding, whose products round otherwise
    directions = (torch.randn(400, 1, n, 4, generator=generator) for n in (q_len, 9))
    q, k = (5 * torch.nn.functional.normalize(direction, dim=-1) for direction in directions)
    mask = torch.zeros(q_len, 9) if masked else None
    v, each = torch.zeros(400, 1, 9, q_len), torch.eye(q_len).expand(400, 1, -1, -1)

    def sums(attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The gradient of the values holds the weights of query i in its column i."""
        values = v.clone().requires_grad_()
        scale = 0.6  # logarithms up to 15
        output = attend(q.requires_grad_(), k, values, mask, scale)
        (weights,) = torch.autograd.grad(output, values, each)
        return weights.double().sum(-2).float()

    def plain(q, k, v, mask, scale):
        scores = q @ k.mT * scale
        return torch.softmax(scores if mask is None else scores + mask, -1) @ v

    got = sums(lambda q, k, v, mask, scale: fastlm.ops.attention(q, k, v, mask=mask, scale=scale))
    check("sums of weights", got, sums(plain), torch.ones(got.shape, dtype=torch.float64), "gradient")
