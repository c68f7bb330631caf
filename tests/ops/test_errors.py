"""Bad input is a clear Python error that names the argument, what was expected and what came."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastlm
from tests.numerics import kernels_only, make_recurrent

OPS = ("gru", "lstm", "gru_cell", "lstm_cell")


def call(op: str, **wrong: Any) -> Any:
    """Calls the op with T 4, B 3, I 5, H 6, where the named arguments are replaced."""
    kind = op.split("_")[0]
    given = {**make_recurrent(kind, 4, 3, 5, 6).tensors(), **wrong}
    x = given.pop("x")
    x = x[0] if op.endswith("cell") and "x" not in wrong else x
    h0 = given.pop("h0")
    state = h0 if kind == "gru" else given.pop("state", (h0, given.pop("c0")))
    return getattr(fastlm.ops, op)(x, state, **given)


def rows(op: str) -> int:
    return 18 if op.startswith("gru") else 24


def wrong_arguments(op: str) -> list[tuple[dict[str, Any], type[Exception], str]]:
    """(wrong arguments, exception, text) for one op."""
    f = torch.zeros
    sequence = not op.endswith("cell")
    x_shape = (4, 3, 5) if sequence else (3, 5)
    cases = [
        ({"x": f(*x_shape, 1)}, ValueError, "x: expected"),
        ({"x": f(5)}, ValueError, "x: expected"),
        ({"x": f(*x_shape[:-1], 4)}, ValueError, r"w_ih: expected shape .*= \(\d+, 4\), got \(\d+, 5\)"),
        ({"w_hh": f(rows(op))}, ValueError, "w_hh: expected 2 dimensions"),
        ({"w_hh": f(rows(op), 7)}, ValueError, r"w_hh: expected shape .*, got \(\d+, 7\)"),
        ({"w_hh": f(rows(op) + 1, 6)}, ValueError, "w_hh: expected shape"),
        ({"w_ih": f(rows(op) - 1, 5)}, ValueError, "w_ih: expected shape"),
        ({"w_ih": f(rows(op))}, ValueError, "w_ih: expected"),
        ({"b_ih": f(rows(op) + 1)}, ValueError, rf"b_ih: expected shape .*\({rows(op)},\), got \({rows(op) + 1},\)"),
        ({"b_hh": f(rows(op), 1)}, ValueError, "b_hh: expected shape"),
        ({"h0": f(2, 6)}, ValueError, r"h0: expected shape \(B, H\) = \(3, 6\), got \(2, 6\)"),
        ({"h0": f(3, 7)}, ValueError, r"h0: expected shape .*got \(3, 7\)"),
        ({"h0": f(2, 3, 6)}, ValueError, r"h0: expected shape \(1, B, H\) = \(1, 3, 6\), got \(2, 3, 6\)"),
        ({"h0": f(1, 1, 3, 6)}, ValueError, r"h0: expected shape .*got \(1, 1, 3, 6\)"),
        ({"x": f(x_shape, dtype=torch.float64)}, ValueError, "expected dtype torch.float64 .*got torch.float32"),
        ({"w_hh": f(rows(op), 6, dtype=torch.float64)}, ValueError, "w_hh: expected dtype torch.float32"),
        ({"b_ih": f(rows(op), dtype=torch.bfloat16)}, ValueError, "b_ih: expected dtype torch.float32"),
        ({"h0": f(3, 6, dtype=torch.int64)}, ValueError, "h0: expected dtype torch.float32"),
        ({"w_ih": f(rows(op), 5, device="meta")}, ValueError, "w_ih: expected device cpu .*got meta"),
        ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
        ({"x": None}, TypeError, "x: expected a Tensor, got NoneType"),
        ({"w_ih": None}, TypeError, "w_ih: expected a Tensor, got NoneType"),
        ({"w_hh": None}, TypeError, "w_hh: expected a Tensor, got NoneType"),
        ({"h0": 0}, TypeError, "h0: expected a Tensor, got int"),
        ({"b_hh": True}, TypeError, "b_hh: expected a Tensor, got bool"),
    ]
    if sequence:
        cases.append(({"x": f(0, 3, 5)}, ValueError, "T >= 1"))
        cases.append(({"lengths": [1, 2**70, 1]}, ValueError, "lengths: expected .*got"))
        cases.append(({"batch_sizes": [1, 2**70], "x": f(3, 5)}, ValueError, "batch_sizes: expected .*got"))
    if op.startswith("lstm"):
        cases += [
            ({"c0": f(3, 5)}, ValueError, r"c0: expected shape .*got \(3, 5\)"),
            ({"c0": f(1, 3, 6)}, ValueError, r"c0: expected shape \(B, H\) = \(3, 6\), got \(1, 3, 6\)"),
            ({"h0": f(1, 3, 6)}, ValueError, r"c0: expected shape \(1, B, H\) = \(1, 3, 6\), got \(3, 6\)"),
            ({"c0": f(3, 6).double()}, ValueError, "c0: expected dtype"),
            ({"state": f(3, 6)}, TypeError, "state: expected a pair"),
            ({"state": (f(3, 6),)}, TypeError, "state: expected a pair"),
        ]
    return cases


@pytest.mark.parametrize(
    ("op", "wrong", "error", "text"),
    [
        pytest.param(op, *case, id=f"{op}-{next(iter(case[0]))}-{index}")
        for op in OPS
        for index, case in enumerate(wrong_arguments(op))
    ],
)
def test_wrong_argument(op: str, wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    call(op)  # the rest is right
    with pytest.raises(error, match=text):
        call(op, **wrong)


@pytest.mark.parametrize("op", OPS)
def test_all_integers(op: str) -> None:
    kind = op.split("_")[0]
    case = {name: tensor.long() for name, tensor in make_recurrent(kind, 4, 3, 5, 6).tensors().items()}
    case["x"] = case["x"][0] if op.endswith("cell") else case["x"]
    with pytest.raises(ValueError, match=r"x: expected a floating-point dtype, got torch\.int64"):
        call(op, **case)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_projection_is_checked(device: str) -> None:
    case = make_recurrent("lstm", 4, 3, 5, 6).map(lambda _, tensor: tensor.to(device))

    def projected(**wrong: torch.Tensor) -> Any:
        right = {"x": case.x, "h0": None, "w_ih": case.w_ih, "w_hh": case.w_hh[:, :2], "b_ih": case.b_ih,
                 "w_hr": case.w_hh[:2, :6]}  # fmt: skip
        given = {**right, **wrong}
        with fastlm.backend("reference"):
            return fastlm.ops.lstm(given.pop("x"), (given.pop("h0"), given.pop("c0", None)), **given)

    assert projected()[0].shape == (4, 3, 2)
    zeros = torch.zeros
    for wrong, text in (
        ({"w_hr": zeros(2, 6, 1, device=device)}, "w_hr: expected 2 dimensions"),
        ({"w_hr": zeros(3, 6, device=device)}, "w_hh: expected shape"),
        ({"w_ih": zeros(24, 4, device=device)}, "w_ih: expected shape"),
        ({"x": zeros(3, 5, device=device)}, "x: expected 3 dimensions"),
        ({"x": zeros(0, 3, 5, device=device)}, "T >= 1"),
        ({"h0": zeros(3, 6, device=device)}, r"h0: expected shape .*\(3, 2\)"),
        ({"c0": zeros(3, 2, device=device)}, r"c0: expected shape .*\(3, 6\)"),
        ({"b_ih": zeros(23, device=device)}, "b_ih: expected shape"),
    ):
        with pytest.raises(ValueError, match=text):
            projected(**wrong)


@kernels_only
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_op_called_directly_with_wrong_tensors(kind: str) -> None:
    """Whoever goes round the public function gets an error too, never a read out of bounds."""
    case = make_recurrent(kind, 4, 3, 5, 6)
    op = getattr(torch.ops.fastlm, f"{kind}_forward")

    def direct(**wrong: torch.Tensor) -> Any:
        return op(*replace(case, **wrong).op_arguments(False))

    direct()
    for name, tensor in case.tensors().items():
        for wrong in (tensor.double(), tensor[..., :-1]):
            with pytest.raises((RuntimeError, ValueError)):
                direct(**{name: wrong})


@kernels_only
def test_gemm_with_wrong_tensors() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    for first, second in ((a, a), (a.double(), b), (a[0], b), (a, b[:, 0])):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.fastlm.gemm(first, second, False, False)
