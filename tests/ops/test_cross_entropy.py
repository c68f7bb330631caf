"""fastlm.ops.linear_cross_entropy against torch's linear and cross_entropy in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastlm
from fastlm.ops import reference
from tests.child import check_python
from tests.numerics import Outputs, check_all, check_case, forward_backward, kernels_only

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
REDUCTIONS = ("mean", "sum", "none")
BF16 = torch.bfloat16
linear_cross_entropy = fastlm.ops.linear_cross_entropy
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


@dataclass(frozen=True)
class Case:
    """The arguments of a call."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in ("hidden", "weight", "bias")}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "Case":
        return replace(self, **{name: function(name, tensor) for name, tensor in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> "Case":
        return self.map(lambda _, tensor: tensor.to(dtype))


def make(
    rows: int, vocab: int, dim: int, *, bias: bool = True, ignored: float = 0.2, dtype: Any = None, **options: Any
) -> Case:
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = options.get("ignore_index", -100)
    case = Case(normal(rows, dim), normal(vocab, dim) / dim**0.5, target, normal(vocab) if bias else None, **options)
    return case.to(dtype or torch.float32)


def call(function: Callable[..., Tensor], case: Case) -> Outputs:
    options = (case.ignore_index, case.reduction, case.label_smoothing)
    return {"loss": function(case.hidden, case.weight, case.target, case.bias, *options)}


run = partial(call, linear_cross_entropy)
run_reference = partial(call, reference.linear_cross_entropy)


def run_torch(case: Case) -> Outputs:
    """In float32 from bfloat16 logits on, as it is done in training; reduced apart, since torch's own mean in float64
    is off by ten units of rounding, too many for a truth."""
    logits = F.linear(case.hidden, case.weight, case.bias)
    logits = logits.float() if logits.dtype == BF16 else logits
    options: dict[str, Any] = {"ignore_index": case.ignore_index, "reduction": "none"}
    losses = F.cross_entropy(logits, case.target, label_smoothing=case.label_smoothing, **options)
    if case.reduction == "none":
        return {"loss": losses}
    rows = (case.target != case.ignore_index).sum() if case.reduction == "mean" else 1
    return {"loss": losses.sum() / rows}


# Around vectors, tiles of 6, panels of 16 and 64, blocks of 96 words and of 256 rows; one word, one part, all parts;
# few words with rows in one item, in some and in all, of several blocks.
SIZES = [
    (1, 1, 1), (1, 2, 3), (2, 7, 16), (5, 33, 17), (17, 64, 15), (64, 65, 64), (65, 97, 33),
    (255, 100, 31), (257, 513, 8), (300, 40, 130), (33, 3001, 63), (513, 127, 5), (600, 130, 9), (5400, 3, 5),
]  # fmt: skip


@reductions
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_torch(sizes: tuple[int, int, int], reduction: str) -> None:
    smoothing = 0.1 if sum(sizes) % 2 else 0.0
    # Over thousands of words torch's float64 is ten times less exact than ours: no truth for it.
    for dtype in (torch.float32, BF16) if sizes[1] > 3000 else (torch.float32, torch.float64, BF16):
        check_case(make(*sizes, dtype=dtype, reduction=reduction, label_smoothing=smoothing), run, run_torch)


# Rows that all count may get their gradients without a way round; words enough for one block, and some more.
@pytest.mark.parametrize(
    "sizes", [(1, 40, 16), (300, 100, 64), (600, 128, 48), (400, 129, 96), (700, 260, 40), (5400, 127, 33)], ids=str
)
def test_every_row_counts(sizes: tuple[int, int, int]) -> None:
    for dtype in (torch.float32, torch.float64, BF16):
        check_case(make(*sizes, dtype=dtype, ignored=0.0), run, run_torch)


@pytest.mark.parametrize("vocab", [45000, 90000, 170000])
def test_logits_that_need_much_room(vocab: int) -> None:
    """Of the most words they are made twice; in bfloat16 with tiles of all."""
    for dtype in (torch.float32, BF16):
        check_case(make(140, vocab, 4, dtype=dtype, label_smoothing=0.1), run, run_torch)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"ignored": 0.0},
        {"ignored": 0.9, "ignore_index": 3},
        {"ignored": 0.5, "ignore_index": -1, "label_smoothing": 0.3},
        {"label_smoothing": 1.0},
    ],
    ids=str,
)
@reductions
def test_options(options: dict[str, Any], reduction: str) -> None:
    check_case(make(70, 200, 24, reduction=reduction, **options), run, run_torch)


@pytest.mark.full
@pytest.mark.parametrize("vocab", [1, 31, 32, 95, 96, 97, 192, 511, 1000, 10000])
@pytest.mark.parametrize("dim", [1, 7, 8, 16, 63, 64, 65, 257, 768])
def test_grid(vocab: int, dim: int) -> None:
    for rows in (1, 6, 16, 63, 256, 300):
        check_case(make(rows, vocab, dim, label_smoothing=0.1 if vocab > 1 else 0), run, run_torch)


@pytest.mark.parametrize("wanted", [["hidden"], ["weight"], ["bias"], ["hidden", "bias"]], ids="-".join)
@reductions
@pytest.mark.parametrize("rows", [70, 400])
def test_some_gradients(wanted: list[str], reduction: str, rows: int) -> None:
    check_case(make(rows, 200, 24, reduction=reduction), run, run_torch, wanted=wanted)


@reductions
def test_leading_shapes(reduction: str) -> None:
    case = make(24, 50, 8, reduction=reduction)
    whole = run(case)["loss"]
    shaped = run(replace(case, hidden=case.hidden.view(2, 3, 4, 8), target=case.target.view(2, 3, 4)))["loss"]
    assert torch.equal(shaped.flatten(), whole.flatten())
    one = run(replace(case, hidden=case.hidden[0], target=case.target[0].clamp(min=0)))["loss"]
    assert one.shape == ()


def test_strides_and_integer_dtypes(isa: str) -> None:
    case = make(24, 50, 8)
    expected = run(case)["loss"]
    turned = case.map(lambda _, x: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2])
    assert torch.equal(run(turned)["loss"], expected)
    assert torch.equal(run(replace(case, target=case.target.to(torch.int16)))["loss"], expected)


@reductions
@pytest.mark.parametrize("ignored", [0.0, 1.0], ids=("no_rows", "all_ignored"))
def test_nothing_to_learn(isa: str, reduction: str, ignored: float) -> None:
    case = make(7 if ignored else 0, 20, 5, ignored=ignored, reduction=reduction)
    got = forward_backward(run, case)
    if reduction == "mean":
        assert got.pop("loss").isnan()
    assert all(torch.equal(value, torch.zeros_like(value)) for value in got.values())


def test_ignored_rows_are_not_read(isa: str) -> None:
    case = make(70, 40, 9)
    dead = case.target == -100
    case = replace(case, hidden=case.hidden.masked_fill(dead[:, None], torch.nan))
    got = forward_backward(run, case)
    assert all(value.isfinite().all() for value in got.values())
    assert not got["grad_hidden"][dead].any()
    expected = forward_backward(run_reference, case)
    check_all(got, expected, forward_backward(run_reference, case.to(torch.float64)))


@reductions
def test_large_and_special_values(reduction: str) -> None:
    options: dict[str, Any] = {"reduction": reduction, "ignored": 0.0}
    case = make(40, 150, 32, **options)
    check_case(case.map(lambda _, tensor: tensor * 100), run, run_torch)
    masked = replace(case, bias=case.bias.masked_fill(torch.arange(150) % 7 == 0, -torch.inf))  # type: ignore[union-attr]
    masked = replace(masked, target=masked.target // 7 * 7 + 1)
    check_case(masked, run, run_torch)
    for value in (torch.nan, torch.inf, -torch.inf):
        hidden = case.hidden.clone()
        hidden[3, 5] = value
        # Which of the sums over an infinite gradient is NaN is all that can be asked for: the loss, and its row.
        got, expected = (forward_backward(function, replace(case, hidden=hidden)) for function in (run, run_torch))
        assert torch.equal(got["loss"].isnan(), expected["loss"].isnan())
        assert torch.equal(got["grad_hidden"].isnan(), expected["grad_hidden"].isnan())


@kernels_only
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16], ids=str)
def test_threads_give_the_same_bits(isa: str, dtype: torch.dtype, reduction: str) -> None:
    for sizes in ((300, 500, 100), (600, 2000, 40), (900, 65, 40)):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_backward(run, make(*sizes, dtype=dtype, reduction=reduction, label_smoothing=0.1)))
        torch.set_num_threads(1)
        for other in results[1:]:
            assert all(torch.equal(other[name], value) for name, value in results[0].items())


@reductions
@pytest.mark.parametrize("options", [{}, {"bias": False, "label_smoothing": 0.2}], ids=str)
def test_gradcheck(isa: str, reduction: str, options: dict[str, Any]) -> None:
    case = make(5, 9, 3, dtype=torch.float64, reduction=reduction, **options).map(lambda _, x: x.requires_grad_())

    def function(*tensors: Tensor) -> Tensor:
        return run(replace(case, **dict(zip(case.tensors(), tensors, strict=True))))["loss"]

    assert torch.autograd.gradcheck(function, tuple(case.tensors().values()))
    assert torch.autograd.gradgradcheck(function, tuple(case.tensors().values()))
    assert torch.autograd.gradcheck(
        function, tuple(case.tensors().values()), check_forward_ad=True, check_backward_ad=False
    )


def test_func_transforms() -> None:
    case = make(6, 11, 4, dtype=torch.float64, ignored=0.0)

    def loss(function: Callable, hidden: Tensor) -> Tensor:
        return function(replace(case, hidden=hidden))["loss"]

    got, expected = (torch.func.hessian(partial(loss, function))(case.hidden) for function in (run, run_torch))
    assert torch.allclose(got, expected)
    batch = torch.stack([case.hidden, case.hidden * 2])
    got, expected = (torch.func.vmap(partial(loss, function))(batch) for function in (run, run_torch))
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("factor", [1.0, 2.5], ids=str)
def test_backward_twice_with_what_arrives(isa: str, factor: float) -> None:
    """Gradients formed in forward are neither used up nor changed by what the caller does with them."""
    case = make(40, 30, 12)
    leaves = case.map(lambda _, tensor: tensor.clone().requires_grad_())
    loss = run(leaves)["loss"] * factor
    loss.backward(retain_graph=True)
    once = {name: tensor.grad.clone() for name, tensor in leaves.tensors().items()}
    loss.backward()
    assert all(torch.equal(tensor.grad, 2 * once[name]) for name, tensor in leaves.tensors().items())
    theirs = case.map(lambda _, tensor: tensor.clone().requires_grad_())
    (run_torch(theirs)["loss"] * factor).backward()
    assert all(torch.allclose(once[name], tensor.grad, atol=1e-6) for name, tensor in theirs.tensors().items())


@reductions
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_opcheck(dtype: torch.dtype, reduction: str) -> None:
    case = make(6, 11, 4, dtype=dtype).map(lambda _, tensor: tensor.requires_grad_())
    given = (case.hidden, case.weight, case.bias, case.target, -100, 0.1, REDUCTIONS.index(reduction))
    number = {"none": 0, "mean": 1, "sum": 2}[reduction]
    needed = (False,) * 3 if reduction == "none" else (True,) * 3
    forward = torch.ops.fastlm.linear_cross_entropy_forward.default
    # What is returned for rows that do not count is 0, so that nothing is left unwritten.
    torch.library.opcheck(forward, (*given[:6], number, *needed), test_utils=OPCHECKS)
    plain = [tensor.detach() for tensor in given[:4]]  # type: ignore[union-attr]
    statistics = forward(*plain, -100, 0.1, 0, False, False, False)[1]
    backward = torch.ops.fastlm.linear_cross_entropy_backward.default
    torch.library.opcheck(backward, (torch.randn(6), *plain, statistics, -100, 0.1, True, True, False))


@reductions
def test_compiled(reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        case = make(rows, 30, 8, reduction=reduction, label_smoothing=0.1)
        got, expected = (forward_backward(function, case) for function in (compiled, run))
        check_all(got, expected, forward_backward(run_torch, case.to(torch.float64)))


def test_autocast() -> None:
    case = make(40, 50, 16)
    with torch.autocast("cpu", dtype=BF16):
        got = forward_backward(run, case)
    assert got["loss"].dtype == torch.float32
    assert got["grad_weight"].dtype == torch.float32
    expected = forward_backward(run, case.to(BF16))
    assert torch.equal(got["loss"], expected["loss"])
    assert torch.equal(got["grad_weight"], expected["grad_weight"].float())


# Peak resident memory above the inputs and results, in a process of its own.
PEAK = """
import resource
from torch.nn.functional import cross_entropy, linear
from fastlm.ops import linear_cross_entropy
rows, vocab, dim = {sizes}
hidden = torch.empty(rows, dim).normal_().requires_grad_()
weight = torch.empty(vocab, dim).normal_(0, 0.1).requires_grad_()
target = torch.randint(0, vocab, (rows,))
small = [x.detach()[:32].clone().requires_grad_() for x in (hidden, weight)]
function = {function}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
function(*small, target[:32] % 32).backward()
before = peak()
function(hidden, weight, target).backward()
print((peak() - before) * 1024 - hidden.nbytes - weight.nbytes)
"""


@kernels_only
@pytest.mark.parametrize("sizes", [(2048, 10000, 256), (1024, 50257, 768)])
def test_memory_is_a_tenth_of_torchs(sizes: tuple[int, int, int]) -> None:
    ours = int(check_python(PEAK.format(sizes=sizes, function="linear_cross_entropy")))
    theirs = int(check_python(PEAK.format(sizes=sizes, function="lambda h, w, t: cross_entropy(linear(h, w), t)")))
    assert ours < theirs / 10


good = make(6, 10, 4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"hidden": 1.0}, TypeError, "hidden"),
        ({"hidden": torch.zeros(6, 5)}, ValueError, "weight"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden"),
        ({"hidden": torch.zeros(6, 4).long(), "weight": torch.zeros(10, 4).long()}, ValueError, "hidden"),
        ({"weight": torch.zeros(10)}, ValueError, "weight"),
        ({"weight": torch.zeros(10, 4).double()}, ValueError, "weight"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "weight"),
        ({"weight": None}, TypeError, "weight"),
        ({"bias": torch.zeros(9)}, ValueError, "bias"),
        ({"bias": torch.zeros(10).bfloat16()}, ValueError, "bias"),
        ({"target": torch.zeros(5).long()}, ValueError, "target"),
        ({"target": torch.zeros(6)}, ValueError, "target"),
        ({"target": torch.zeros(6, 10)}, ValueError, "target"),
        ({"target": [0] * 6}, TypeError, "target"),
        ({"target": torch.tensor([0, 1, 2, 10, 4, 5])}, ValueError, "target.*0 to 9.*got 10 at index 3"),
        ({"target": torch.tensor([0, 1, -1, 0, 4, 5])}, ValueError, "target.*got -1 at index 2"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"label_smoothing": "0"}, ValueError, "label_smoothing"),
    ],
    ids=str,
)
def test_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    bias = None if "weight" in wrong or wrong.get("hidden") is not None else good.bias
    given = {"hidden": good.hidden, "weight": good.weight, "target": good.target, "bias": bias}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**given, **wrong})


def test_a_bad_target_is_told_under_compile_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="target"):
        compiled(good.hidden, good.weight, torch.full((6,), 10))


def test_gradients_of_several_losses_at_once() -> None:
    hidden, target, weight = torch.randn(3, 4), torch.randint(7, (3,)), torch.randn(7, 4)

    def loss(weight: Tensor) -> Tensor:
        return fastlm.ops.linear_cross_entropy(hidden, weight, target)

    expected = torch.autograd.functional.jacobian(loss, weight)
    torch.testing.assert_close(torch.autograd.functional.jacobian(loss, weight, vectorize=True), expected)
    weight = torch.randn(7, 4, device="meta", requires_grad=True)
    fastlm.ops.linear_cross_entropy(hidden.to("meta"), weight, target.to("meta")).backward()
    assert weight.grad is not None
    assert weight.grad.shape == (7, 4)


def test_gradients_of_one_graph_are_apart() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.arange(6))
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    expected = [grad.clone() for grad in second]
    for grad in first:
        grad.zero_()
    for grads in (second, torch.autograd.grad(loss, (hidden, weight))):
        assert all(torch.equal(grad, value) for grad, value in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_rows_without_width(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    bias, target = torch.randn(5), torch.ones(leading, dtype=dtype)
    loss = linear_cross_entropy(torch.zeros(*leading, 0), torch.zeros(5, 0), target, bias)
    torch.testing.assert_close(loss, -bias.log_softmax(-1)[1])
