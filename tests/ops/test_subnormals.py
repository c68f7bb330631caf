"""Numbers below the smallest normal one: kernels take them for zero, and after a call they are numbers again."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.ops.gemm import gemm
from tests.numerics import (
    Outputs,
    check_recurrent,
    forward_backward,
    kernels_only,
    make_recurrent,
    run_fastlm,
    run_torch,
)

pytestmark = kernels_only
TINY = torch.finfo(torch.float32).tiny


def subnormal(x: Tensor) -> Tensor:
    return (x != 0) & (x.abs() < TINY)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_gradients_that_vanish_over_time(kind: str, isa: str) -> None:
    """What arrives at the last step comes to nothing on the way to the first; subnormal numbers would take many
    times as long."""
    case = make_recurrent(kind, 400, 3, 8, 20)
    true = forward_backward(run_torch, case.to(torch.float64), arriving=["h_n"])["grad_x"][0]
    assert 0 < true.abs().max() < TINY
    for name, value in forward_backward(run_fastlm, case, arriving=["h_n"]).items():
        assert not subnormal(value).any(), name


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_gradients_that_vanish_are_as_exact_as_torchs(kind: str) -> None:
    check_recurrent(make_recurrent(kind, 300, 7, 5, 33), arriving=["h_n"])


@pytest.mark.parametrize("names", [("x", "h0", "c0"), ("w_ih",), ("w_hh",)], ids=lambda names: names[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("fp32", "fp64"))
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_inputs(kind: str, dtype: torch.dtype, names: tuple[str, ...], isa: str) -> None:
    case = make_recurrent(kind, 4, 3, 5, 9, dtype=dtype, bias="none")

    def results(factor: float) -> Outputs:
        scaled = case.map(lambda name, tensor: tensor * factor if name in names else tensor)
        return forward_backward(run_fastlm, scaled)

    zeros = results(0.0)
    for name, value in results(torch.finfo(dtype).tiny / 64).items():
        assert torch.equal(value, zeros[name]), name


def test_products(isa: str) -> None:
    a = torch.full((40, 70), 1e-25)
    assert (gemm(a, a, False, True) == 0).all()
    assert (gemm(a * 1e-15, torch.ones(70, 40), False, False) == 0).all()


def call_recurrent() -> None:
    for kind, batch in product(("gru", "lstm"), (1, 16)):
        forward_backward(run_fastlm, make_recurrent(kind, 12, batch, 24, 256))


def call_stream() -> None:
    fastlm.nn.Stream(fastlm.nn.LSTM(64, 512), 32).step(torch.randn(32, 64))


def call_attention() -> None:
    q = torch.randn(2, 4, 256, 64, requires_grad=True)
    fastlm.ops.scaled_dot_product_attention(q, q, q).sum().backward()


def call_decode() -> None:
    kv = torch.randn(1, 8, 4096, 64)
    fastlm.ops.scaled_dot_product_attention(torch.randn(1, 8, 1, 64), kv, kv)


def call_output_layer() -> None:
    hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
    fastlm.ops.linear_cross_entropy(hidden, weight, torch.randint(0, 1000, (512,))).backward()


def call_product() -> None:
    gemm(torch.randn(256, 256), torch.randn(256, 256), False, False)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(
    "call", [call_recurrent, call_stream, call_attention, call_decode, call_output_layer, call_product]
)
def test_flush_to_zero_is_left_as_found(call: Callable[[], None], flush: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    tiny = torch.full((100_000,), 1e-40)
    try:
        assert torch.set_flush_denormal(flush)
        before = tiny * 0.5
        call()
        after = tiny * 0.5
    finally:
        torch.set_flush_denormal(False)
    assert bool(before[0] == 0) == flush
    assert torch.equal(before, after)
