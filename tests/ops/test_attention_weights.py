"""The op that gives attention's weights too: values and gradients of both, autograd's other forms, threads."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint

import fastlm
from fastlm.ops._attention_op import Route
from fastlm.ops._attention_weights_op import ATTENTION_WITH_WEIGHTS
from tests.attention import (
    BF16,
    FP64,
    Attention,
    dtypes,
    equal,
    make_attention,
    run_fastlm,
    run_torch_with_weights,
)
from tests.numerics import Outputs, check_all, check_case, forward_backward, kernels_only

average = pytest.mark.parametrize("average", [True, False], ids=("average", "heads"))
OP = torch.ops.fastlm.attention_weights_forward.default


def run_weights(case: Attention, average: bool = False, calls: list[tuple] | None = None) -> Outputs:
    """Output, lse and weights, with the arguments that `attention` makes; these are noted in `calls`."""
    given = []

    def keep(function: Callable) -> Callable:
        def run(*arguments: object) -> tuple:
            if calls is not None:
                calls.append((*arguments[:3], average, *arguments[3:]))
            output, lse, weights = function(*arguments[:3], average, *arguments[3:])
            given.append(weights)
            return output, lse

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fastlm.ops.attention.__globals__, "ATTENTION", Route(*map(keep, ATTENTION_WITH_WEIGHTS)))
        return run_fastlm(case) | {"weights": given[0]}


def truth_of(case: Attention, average: bool) -> Outputs:
    outputs = run_torch_with_weights(case)
    return outputs | {"weights": outputs["weights"].mean(1)} if average else outputs


def check_weights(case: Attention, average: bool) -> None:
    ours, theirs = (lambda given, run=run: run(given, average) for run in (run_weights, truth_of))
    check_case(case, ours, theirs, scale=1.0)


SIZES = {
    "one": (1, 1, 1, 1, 1),
    "few": (2, 3, 5, 17, 15),
    "a panel": (1, 2, 16, 8, 64),
    "more than a panel": (1, 2, 33, 32, 65),
    "more than a chunk": (1, 2, 9, 16, 300),
    "several items": (3, 2, 130, 8, 70),
}


@average
@dtypes
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes: tuple[int, ...], dtype: torch.dtype, average: bool) -> None:
    batch, heads, q_len, dim, k_len = sizes
    check_weights(make_attention(batch, heads, q_len, dim, k_len=k_len, v_dim=dim + 3, dtype=dtype), average)


OPTIONS = {
    "causal": {"causal": "upper_left"},
    "shared keys": {"q_heads": 6, "kv_heads": 2, "causal": "lower_right"},
    "bool mask": {"mask": "bool"},
    "float mask": {"mask": "float", "mask_shape": (20, 90)},
    "mask and causal": {"mask": "bool", "mask_shape": (2, 1, 1, 90), "causal": "upper_left"},
    "lengths": {"kv_lengths": [70, 0]},
    "window": {"window": (3, 2), "slopes": "batch"},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "dropout": {"dropout_p": 0.4},
    "dropout and mask": {"dropout_p": 0.4, "causal": "lower_right", "mask": "float"},
}


@average
@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict, dtype: torch.dtype, average: bool) -> None:
    given = {"q_heads": 3, "k_len": 90, "dtype": dtype} | options
    check_weights(make_attention(2, given.pop("q_heads"), 20, 8, **given), average)


@average
def test_a_row_that_sees_nothing(isa: str, average: bool) -> None:
    case = make_attention(2, 2, 20, 8, k_len=40)
    mask = torch.rand(2, 2, 20, 40) > 0.3
    mask[:, :, 3] = mask[0, :, :12] = False
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        outputs = run_weights(replace(case, mask=given), average)
        weights = outputs["weights"] if average else outputs["weights"].mean(1)
        seen = mask.any(-1).any(1)
        assert not weights[~seen].any()
        torch.testing.assert_close(weights.sum(-1), seen.float())


@average
def test_no_weight_where_nothing_may_be_seen(isa: str, average: bool) -> None:
    """Exactly 0, whatever lies there: NaN past a length, keys above the diagonal."""
    case = make_attention(2, 3, 30, 8, kv_lengths=[21, 9], causal="upper_left")
    weights = run_weights(case, average)["weights"]
    assert not weights.isnan().any()
    past = torch.arange(30) >= case.kv_lengths[:, None, None]
    hidden = past | torch.ones(30, 30, dtype=torch.bool).triu(1)
    assert not (weights if average else weights.sum(1))[hidden].any()


@pytest.mark.parametrize("window", [(-1, -1), (5, 0), (-1, 3)], ids=str)
def test_nan_stays_with_its_query(isa: str, window: tuple[int, int]) -> None:
    """And with the keys that it sees."""
    case = make_attention(1, 2, 20, 8, k_len=24, window=window)
    case.q[0, 1, 7, 3] = torch.nan
    weights = run_weights(case)["weights"]
    left, right = window
    keys = torch.arange(24)
    seen = ((keys >= 7 - left) | (left < 0)) & ((keys <= 7 + right) | (right < 0))
    assert torch.equal(weights[0, 1, 7].isnan(), seen)
    weights[0, 1, 7] = 0
    assert not weights.isnan().any()


@average
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 0, 40, 100), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(sizes: tuple[int, ...], kv_heads: int | None, average: bool) -> None:
    batch, heads, q_len, k_len = sizes
    outputs = run_weights(make_attention(batch, heads, q_len, 8, kv_heads=kv_heads, k_len=k_len), average)
    assert outputs["weights"].shape == ((batch, q_len, k_len) if average else (batch, heads, q_len, k_len))
    assert not outputs["output"].any()
    assert not outputs["weights"].any()


@average
def test_the_output_is_attentions(average: bool) -> None:
    """But for the order of sums over the keys, which are all one chunk here."""
    for k_len in (40, 700):
        case = make_attention(2, 4, 50, 16, kv_heads=2, k_len=k_len, causal="lower_right")
        torch.testing.assert_close(run_weights(case, average)["output"], run_fastlm(case)["output"])


@average
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_threads_do_not_count(average: bool, dtype: torch.dtype, isa: str) -> None:
    case = make_attention(2, 4, 300, 16, kv_heads=2, k_len=130, mask="bool", dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_weights(case, average))
    finally:
        torch.set_num_threads(before)
    assert all(equal(result, results[0]) for result in results)


@average
def test_memory_orders(average: bool) -> None:
    """Heads may be the inner dimension, as a module's are: the same bits, and the output in that order."""
    case = make_attention(2, 3, 20, 8)
    inner = case.map(lambda _, x: x.transpose(1, 2).contiguous().transpose(1, 2))
    assert equal(run_weights(inner, average), run_weights(case, average))
    output = run_weights(inner, average)["output"]
    assert output.transpose(1, 2).is_contiguous()


def op_arguments(form: str, average: bool, requires_grad: bool = False) -> tuple:
    case = {
        "masks": lambda: make_attention(2, 2, 3, 4, mask="float", softcap=2.0),
        "keep": lambda: make_attention(2, 4, 3, 4, kv_heads=2, k_len=5, mask="bool", mask_shape=(3, 5)),
        "dropout": lambda: make_attention(1, 2, 3, 4, dropout_p=0.5, causal="upper_left"),
        "bfloat16": lambda: make_attention(2, 2, 3, 4, dtype=BF16),
    }[form]()
    calls: list[tuple] = []
    run_weights(case.map(lambda _, x: x.detach().requires_grad_(requires_grad)), average, calls)
    return calls[0]


forms = pytest.mark.parametrize("form", ["masks", "keep", "dropout", "bfloat16"])


@kernels_only
@average
@forms
def test_opcheck(form: str, average: bool) -> None:
    torch.library.opcheck(OP, op_arguments(form, average, requires_grad=True))


@average
@pytest.mark.parametrize("options", [{"causal": "upper_left", "softcap": 2.0}, {"dropout_p": 0.3, "mask": "float"}])
def test_gradcheck(options: dict, average: bool) -> None:
    case = make_attention(1, 2, 3, 3, k_len=4, dtype=FP64, requires_grad=True, **options)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(case.tensors(), tensors, strict=True))
        return tuple(run_weights(case.map(lambda name, _: named[name]), average).values())

    assert torch.autograd.gradcheck(run, tuple(case.tensors().values()))
    assert torch.autograd.gradgradcheck(run, tuple(case.tensors().values()))


@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoint(early_stop: bool) -> None:
    """What is saved may be unpacked once."""
    case = make_attention(2, 2, 5, 4, requires_grad=True)
    tensors = list(case.tensors().values())

    def loss(*_: torch.Tensor) -> torch.Tensor:
        outputs = run_weights(case, True)
        return outputs["weights"].square().sum() + outputs["output"].sin().sum()

    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        checkpointed = torch.utils.checkpoint.checkpoint(loss, *tensors, use_reentrant=False)
    grads = [torch.autograd.grad(out, tensors) for out in (checkpointed, loss())]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@average
def test_reference(average: bool) -> None:
    case = make_attention(2, 4, 9, 8, kv_heads=2, k_len=30, mask="float", causal="lower_right", dropout_p=0.2)
    with fastlm.backend("reference"):
        got = forward_backward(lambda given: run_weights(given, average), case)
    truth, same = (forward_backward(lambda x: truth_of(x, average), case.to(kind)) for kind in (FP64, torch.float32))
    check_all(got, same, truth, 1.0)


def test_packed_rows_are_refused() -> None:
    q = torch.randn(6, 2, 4)
    starts = torch.tensor([0, 6])
    with pytest.raises(ValueError, match="q_starts: expected none"):
        OP(q, q, q, True, q_starts=starts, k_starts=starts)
