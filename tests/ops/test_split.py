"""Float32 products by tile registers, from three bfloat16 parts: sizes that are split, and what cannot be."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import fastlm
from fastlm import _native
from tests import attention
from tests.numerics import (
    check_all,
    check_case,
    forward_backward,
    kernels_only,
    make_recurrent,
    run_fastlm,
    run_torch,
    with_sequences,
)
from tests.ops import test_cross_entropy as cross_entropy
from tests.ops.test_special_values import spoil

KINDS = ("gru", "lstm")
# (T, B, I, H): recurrent weights that are split, near and far, or not; odd sizes, ends of groups and of tiles.
SHAPES = [(20, 16, 40, 130), (12, 37, 70, 100), (9, 32, 33, 66), (8, 33, 129, 209), (40, 8, 130, 200), (6, 48, 5, 97)]
# Sets of instructions that split floats, and those whose products of floats they have otherwise.
PLAIN = {"avx512_amx": "avx512", "wide_amx": "wide"}

check_recurrent = partial(check_case, ours=run_fastlm, theirs=run_torch, split=True)
check_attention = partial(check_case, ours=attention.run_fastlm, theirs=attention.run_torch, split=True, scale=1.0)
check_cross_entropy = partial(check_case, ours=cross_entropy.run, theirs=cross_entropy.run_torch, split=True)
kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = kernels_only


@pytest.fixture(params=[pair for pair in PLAIN.items() if _native.module and pair[0] in _native.module.cpu_isas()])
def pair(request: pytest.FixtureRequest):
    """Two sets of instructions; the first, which splits, is in use."""
    previous = _native.module.cpu_isa()
    _native.module.set_cpu_isa(request.param[0])
    yield request.param
    _native.module.set_cpu_isa(previous)


def in_both(pair: tuple[str, str], run) -> list:
    results = []
    for isa in pair:
        _native.module.set_cpu_isa(isa)
        results.append(run())
    return results


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
def test_recurrent(kind: str, shape: tuple[int, ...], reverse: bool) -> None:
    check_recurrent(make_recurrent(kind, *shape, reverse=reverse, bias="ih" if reverse else "both"))


@kinds
@pytest.mark.parametrize("form", ["lengths", "packed", "resets", "both"])
def test_sequences(kind: str, form: str) -> None:
    for seq_len, batch, *sizes in ((24, 34, 17, 100), (60, 9, 130, 193)):
        case = with_sequences(make_recurrent(kind, seq_len, batch, *sizes), form)
        check_recurrent(replace(case, all_states=kind == "lstm"))


@kinds
@pytest.mark.parametrize("wanted", [["x"], ["w_ih"], ["w_hh"], ["h0"], ["x", "w_hh"]], ids="-".join)
def test_some_gradients(kind: str, wanted: list[str]) -> None:
    check_recurrent(make_recurrent(kind, 12, 33, 40, 100), wanted=wanted)


@kinds
def test_it_is_done(pair: tuple[str, str], kind: str) -> None:
    """The sizes here are split: else their tests would prove nothing."""
    for shape in SHAPES:
        case = make_recurrent(kind, *shape)
        split, plain = in_both(pair, lambda: forward_backward(run_fastlm, case))  # noqa: B023
        names = ("output", "grad_w_hh") if shape[3] >= 96 else ("output",)
        assert not any(torch.equal(split[name], plain[name]) for name in names), shape
    a, b = torch.randn(400, 100), torch.randn(100, 70)
    assert not torch.equal(*in_both(pair, lambda: torch.ops.fastlm.gemm(a, b, False, False)))


@pytest.mark.parametrize("form", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(
    "sizes", [(400, 70, 100), (390, 64, 1100), (385, 129, 65), (1000, 80, 2100), (384, 65, 64)], ids=str
)
def test_products(isa: str, sizes: tuple[int, int, int], form: tuple[bool, bool]) -> None:
    m, n, k = sizes
    a, b = torch.randn((k, m) if form[0] else (m, k)), torch.randn((n, k) if form[1] else (k, n))
    bias = torch.randn(n)
    x, y = a.mT if form[0] else a, b.mT if form[1] else b
    runs = [torch.ops.fastlm.gemm(a, b, *form, bias), x @ y + bias, x.double() @ y.double() + bias]
    check_all(*({"product": value} for value in runs))


def test_products_of_integers_are_exact(isa: str) -> None:
    """All 24 bits of a float arrive, in every place of the parts."""
    a = torch.randint(-(2**23), 2**23, (390, 96)).float()
    b = torch.zeros(96, 96)
    b[torch.arange(96), torch.randperm(96)] = 1.0
    assert torch.equal(torch.ops.fastlm.gemm(a, b, False, False), a @ b)
    assert torch.equal(
        torch.ops.fastlm.gemm(b.repeat(4, 1), a[:96].contiguous(), False, False), b.repeat(4, 1) @ a[:96]
    )


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], ids=hex)
def test_every_nan_remains(isa: str, bits: int) -> None:
    """Whatever its other bits: rounding must not carry them away."""
    a, b = torch.ones(390, 96), torch.ones(96, 70)
    a.view(torch.int32)[7, 50] = bits
    assert torch.ops.fastlm.gemm(a, b, False, False).isnan().sum(1).tolist() == [70 * (row == 7) for row in range(390)]


@pytest.mark.parametrize("size", [2.0**57, 2.0**70, 1e25], ids=str)
def test_products_that_overflow(isa: str, size: float) -> None:
    """Finite numbers whose products are not: infinite with the sign that they have in floats, and no NaN."""
    a, b = torch.rand(390, 96) + 1, torch.rand(96, 70) + 1
    runs = [torch.ops.fastlm.gemm(x, y, False, False) for x, y in ((a * size, b * size), (-a * size, b * size))]
    for got, expected in zip(runs, ((a * size) @ (b * size), (-a * size) @ (b * size)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@kinds
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(isa: str, kind: str, threads: int) -> None:
    for shape in SHAPES[:5]:
        case = make_recurrent(kind, *shape)
        expected = forward_backward(run_fastlm, case)
        torch.set_num_threads(threads)
        got = forward_backward(run_fastlm, case)
        torch.set_num_threads(1)
        assert all(torch.equal(got[name], value) for name, value in expected.items()), shape


@kinds
@pytest.mark.parametrize("name", ["x", "h0", "w_ih", "w_hh"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
def test_values_that_are_not_finite(kind: str, name: str, value: float) -> None:
    for shape in ((12, 33, 40, 100), (40, 8, 130, 200)):
        check_recurrent(spoil(make_recurrent(kind, *shape), name, value))


def test_infinity_is_left_to_floats(pair: tuple[str, str]) -> None:
    case = spoil(make_recurrent("gru", 12, 33, 40, 100), "x", float("inf"))
    split, plain = in_both(pair, lambda: run_fastlm(case))
    assert torch.equal(split["output"], plain["output"])


@kinds
@pytest.mark.parametrize("exponent", [-90, -40, 40])
def test_sizes_of_numbers(kind: str, exponent: int) -> None:
    case = make_recurrent(kind, 12, 33, 40, 100)
    check_recurrent(case.map(lambda name, tensor: tensor * 2.0**exponent if name == "x" else tensor))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sizes", [(300, 600, 100), (1100, 150, 97), (170, 700, 129), (2900, 300, 64)], ids=str)
def test_cross_entropy(sizes: tuple[int, int, int], reduction: str) -> None:
    case = cross_entropy.make(*sizes, reduction=reduction, label_smoothing=0.1)
    check_cross_entropy(case)
    check_cross_entropy(case, wanted=[])


def test_cross_entropy_is_split(pair: tuple[str, str]) -> None:
    case = cross_entropy.make(300, 700, 100)
    split, plain = in_both(pair, lambda: forward_backward(cross_entropy.run, case))
    assert not torch.equal(split["grad_weight"], plain["grad_weight"])


# Ends of tiles, groups, blocks and spans of queries; parts of the keys; blocks that see nothing.
ATTENTION = [
    {"q_len": 130, "dim": 64},
    {"q_len": 150, "dim": 72, "k_len": 170, "v_dim": 50, "kv_heads": 1},
    {"q_len": 140, "dim": 25, "v_dim": 31, "mask": "float"},
    {"q_len": 140, "dim": 24, "mask": "float", "mask_shape": (1, 1, 1, 140), "softcap": 2.0},
    {"q_len": 150, "dim": 64, "kv_lengths": [77, 150]},
    {"q_len": 330, "dim": 48, "causal": "upper_left", "batch": 1, "slopes": "heads"},
    {"q_len": 300, "dim": 50, "window": (70, 33), "batch": 1},
    {"q_len": 400, "dim": 24, "k_len": 313, "causal": "lower_right", "kv_heads": 1, "batch": 1},
    {"q_len": 300, "dim": 130, "k_len": 128, "batch": 1, "q_heads": 1, "sinks": True},
    {"q_len": 128, "dim": 24, "k_len": 1100, "batch": 1, "q_heads": 1},
    {"q_len": 150, "dim": 64, "dropout_p": 0.3},
]


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention(options: dict) -> None:
    check_attention(attention.make_attention(**options))


def test_attention_of_packed_sequences() -> None:
    check_attention(attention.make_varlen([140, 3, 0, 129], [130, 20, 7, 200], dim=40, kv_heads=1, past=5))


def test_attention_with_blocks_that_see_nothing() -> None:
    case = attention.make_attention(1, 1, 300, 32)
    block = torch.arange(300) // 40
    check_attention(replace(case, mask=(block[:, None] % 3 == block % 3)[None, None]))


def test_attention_is_split(pair: tuple[str, str]) -> None:
    for options in ATTENTION:
        case = attention.make_attention(**options)
        split, plain = in_both(pair, lambda: forward_backward(attention.run_fastlm, case))  # noqa: B023
        for name in ("output", "grad_q", "grad_k", "grad_v"):
            assert not torch.equal(split[name].nan_to_num(), plain[name].nan_to_num()), (name, options)


@pytest.mark.parametrize("threads", [2, 3])
def test_attention_gives_the_same_bits(isa: str, threads: int) -> None:
    for options in ATTENTION:
        case = attention.make_attention(**options)
        expected = forward_backward(attention.run_fastlm, case)
        torch.set_num_threads(threads)
        got = forward_backward(attention.run_fastlm, case)
        torch.set_num_threads(1)
        for name, value in expected.items():
            assert torch.equal(got[name].nan_to_num(), value.nan_to_num()), (name, options)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
def test_attention_of_values_that_are_not_finite(pair: tuple[str, str], name: str, value: float) -> None:
    case = spoil(attention.make_attention(1, 2, 130, 24, mask="float"), name, value)
    split, plain = in_both(pair, lambda: forward_backward(attention.run_fastlm, case))
    for key, expected in plain.items():
        torch.testing.assert_close(split[key], expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("size", [2.0**60, float("inf")], ids=str)
def test_gradients_of_attention_are_left_to_floats(pair: tuple[str, str], size: float) -> None:
    """Where one is too large to be split, those of the mask, which are added up, as well."""
    case = attention.make_attention(1, 2, 130, 24, mask="float", mask_shape=(1, 1, 1, 130), requires_grad=True)
    grad = torch.randn(1, 2, 130, 24)
    grad[0, 1, 70, 3] = size
    _native.module.set_cpu_isa(pair[1])  # of one forward pass
    output = attention.run_fastlm(case)["output"]
    tensors = list(case.tensors().values())
    split, plain = in_both(pair, lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True))
    for ours, theirs in zip(split, plain, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_forcing_another_set_of_instructions_changes_no_more_than_rounding(pair: tuple[str, str]) -> None:
    layer = fastlm.nn.LSTM(64, 128)
    x = torch.randn(20, 32, 64)
    split, plain = in_both(pair, lambda: layer(x)[0])
    torch.testing.assert_close(split, plain, rtol=1e-5, atol=1e-6)
