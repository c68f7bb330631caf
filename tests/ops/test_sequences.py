"""Lengths, packed rows and resets: against a loop over single sequences, split where they start anew."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import _native
from tests.numerics import (
    Outputs,
    Recurrent,
    check_all,
    check_recurrent,
    forward_backward,
    kernels_only,
    make_recurrent,
    run_fastlm,
    run_reference,
    run_torch,
    with_sequences,
)

KINDS = ("gru", "lstm")
FORMS = ("lengths", "packed", "resets", "both")
BOTH_WAYS = pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
kinds = pytest.mark.parametrize("kind", KINDS)
forms = pytest.mark.parametrize("form", FORMS)

# (T, B, I, H): one step, one row, odd sizes, more rows than a tile, several chunks of time, rows read in place.
SHAPES = [(1, 1, 1, 1), (1, 9, 5, 17), (2, 3, 8, 16), (7, 1, 9, 33), (9, 13, 15, 31), (40, 20, 17, 64), (150, 6, 3, 8)]


def equal(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) for name, value in expected.items())


@kinds
@forms
@BOTH_WAYS
def test_against_single_sequences(kind: str, form: str, reverse: bool) -> None:
    for index, (seq_len, batch, *sizes) in enumerate(SHAPES):
        options = {"bias": ("both", "none", "ih")[index % 3], "state": ("both", "none", "h0")[index % 3]}
        case = make_recurrent(kind, seq_len, batch, *sizes, reverse=reverse, **options)
        case = replace(with_sequences(case, form, seed=index), all_states=kind == "lstm" and index % 2 == 0)
        check_recurrent(case)


@pytest.mark.bfloat16
@kinds
@forms
def test_in_other_dtypes(isa: str, kind: str, form: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        case = with_sequences(make_recurrent(kind, 9, 7, 6, 19, dtype=dtype), form)
        if dtype == torch.float64:
            check_recurrent(case)
            continue
        runs = ((run_fastlm, case), (run_torch, case), (run_torch, case.to(torch.float64)))
        check_all(*(forward_backward(run, given) for run, given in runs))


@kinds
@forms
@BOTH_WAYS
def test_reference_against_single_sequences(kind: str, form: str, reverse: bool) -> None:
    case = with_sequences(make_recurrent(kind, 6, 5, 4, 9, reverse=reverse), form)
    case = replace(case, all_states=kind == "lstm")
    runs = ((run_reference, case), (run_torch, case), (run_torch, case.to(torch.float64)))
    check_all(*(forward_backward(run, given) for run, given in runs))


@kinds
@BOTH_WAYS
@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 4, 0), (4, 4, 4), (4, 3, 0), (1, 1, 1)], ids=str)
def test_some_lengths(kind: str, reverse: bool, lengths: tuple[int, ...]) -> None:
    for state in ("both", "none"):
        case = make_recurrent(kind, 4, 3, 5, 17, state=state, reverse=reverse)
        check_recurrent(replace(case, lengths=torch.tensor(lengths)))


@kinds
def test_no_sequences_at_all(kind: str) -> None:
    check_recurrent(replace(make_recurrent(kind, 4, 0, 3, 5), lengths=torch.zeros(0, dtype=torch.int64)))
    check_recurrent(replace(make_recurrent(kind, 4, 0, 3, 5), reset_mask=torch.zeros(4, 0, dtype=torch.bool)))


@kernels_only
@kinds
@BOTH_WAYS
@pytest.mark.parametrize("fill", [False, True], ids=("never", "always"))
def test_resets_nowhere_and_everywhere(isa: str, kind: str, reverse: bool, fill: bool) -> None:
    case = make_recurrent(kind, 5, 3, 4, 17, reverse=reverse)
    case = replace(case, reset_mask=torch.full((5, 3), fill))
    check_recurrent(case)
    got = forward_backward(run_fastlm, case)
    if not fill:
        assert equal(got, forward_backward(run_fastlm, replace(case, reset_mask=None)))
    elif reverse:
        assert not got["h_n"].any()
    else:
        assert not got["grad_h0"].any()


@kinds
@BOTH_WAYS
def test_what_lies_past_a_length_plays_no_part(isa: str, kind: str, reverse: bool) -> None:
    case = with_sequences(make_recurrent(kind, 9, 6, 4, 17, reverse=reverse), "lengths")
    past = torch.arange(9)[:, None] >= case.lengths
    got = forward_backward(run_fastlm, case)
    for value in (0.0, float("inf"), 1e30):
        other = replace(case, x=case.x.masked_fill(past[..., None], value))
        assert equal(forward_backward(run_fastlm, other), got)
    for name in ("output", "grad_x"):
        assert not got[name][past].any()
    dirty = replace(case, reset_mask=past)
    assert equal(forward_backward(run_fastlm, dirty), got)


@kinds
def test_gradients_past_a_length_are_ignored(isa: str, kind: str) -> None:
    case = with_sequences(make_recurrent(kind, 9, 6, 4, 17), "lengths")
    past = torch.arange(9)[:, None] >= case.lengths

    def arriving(fill: float):
        def make(outputs: Outputs) -> Outputs:
            grad = torch.ones_like(outputs["output"])
            return {"output": grad.masked_fill(past[..., None], fill)}

        return make

    expected = forward_backward(run_fastlm, case, arriving=arriving(0.0))
    assert equal(forward_backward(run_fastlm, case, arriving=arriving(float("nan"))), expected)


@kernels_only
@kinds
@BOTH_WAYS
def test_every_way_to_say_it_gives_the_same(isa: str, kind: str, reverse: bool) -> None:
    case = with_sequences(make_recurrent(kind, 9, 6, 4, 17, reverse=reverse), "lengths")
    expected = run_fastlm(case)
    for lengths in (case.lengths.tolist(), case.lengths.int(), case.lengths.to(torch.uint8)):
        assert equal(run_fastlm(replace(case, lengths=lengths)), expected)
    order = case.lengths.argsort(descending=True)
    states = {name: tensor[order] for name, tensor in case.tensors().items() if name in ("h0", "c0")}
    sorted_case = replace(case, x=case.x[:, order], lengths=case.lengths[order], **states)
    for name, value in run_fastlm(sorted_case).items():
        assert torch.equal(value, expected[name][:, order] if name == "output" else expected[name][order])


@kinds
@kernels_only
def test_threads_give_the_same_bits(isa: str, kind: str) -> None:
    for (seq_len, batch, hidden), form, reverse in product(
        ((30, 33, 17), (20, 9, 256), (70, 40, 64), (1, 30, 100)), FORMS, (False, True)
    ):
        case = with_sequences(make_recurrent(kind, seq_len, batch, 24, hidden, reverse=reverse), form)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_backward(run_fastlm, case))
        assert all(equal(result, results[0]) for result in results), (seq_len, batch, hidden, form)


@kinds
@forms
def test_compiled(kind: str, form: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run_fastlm, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq_len, batch in ((5, 3), (8, 4)):
        case = with_sequences(make_recurrent(kind, seq_len, batch, 6, 8), form)
        case = replace(case, all_states=kind == "lstm")
        assert equal(forward_backward(compiled, case), forward_backward(run_fastlm, case))
    case = make_recurrent(kind, 5, 3, 6, 8)
    with pytest.raises((ValueError, RuntimeError), match="lengths: expected 0 to 5"):
        compiled(replace(case, lengths=torch.tensor([1, 6, 2])))


@kinds
def test_states_without_step_by_step_differences(kind: str) -> None:
    """Whole == one step at a time, with the state carried by hand."""
    case = make_recurrent(kind, 6, 3, 4, 17)
    whole = run_fastlm(replace(case, all_states=kind == "lstm"))
    carried = case
    for t in range(6):
        step = run_fastlm(replace(carried, x=case.x[t : t + 1]))
        carried = replace(carried, h0=step["h_n"], c0=step.get("c_n"))
        truth = run_torch(replace(case.to(torch.float64), x=case.x[: t + 1].double()))
        torch_same = run_torch(replace(case, x=case.x[: t + 1]))
        check_all(step, {**torch_same, "output": torch_same["output"][-1:]}, {**truth, "output": truth["output"][-1:]})
        if kind == "lstm":
            check_all({"c": whole["cells"][t]}, {"c": torch_same["c_n"]}, {"c": truth["c_n"]})


def call(case: Recurrent, **wrong: object) -> object:
    return run_fastlm(replace(case, **wrong))


ONES = torch.ones(3, dtype=torch.int64)
MASK = torch.ones(4, 3, dtype=torch.bool)
WRONG_SEQUENCES = {
    "negative": ({"lengths": [1, -1, 2]}, ValueError, r"lengths: expected 0 to 4 \(T\), got -1 at index 1"),
    "too long": ({"lengths": [1, 5, 2]}, ValueError, r"lengths: expected 0 to 4 \(T\), got 5"),
    "wrong count": ({"lengths": [1, 2]}, ValueError, r"lengths: expected shape \(B,\) = \(3,\), got \(2,\)"),
    "float": ({"lengths": ONES.float()}, ValueError, r"lengths: expected an integer dtype, got torch\.float32"),
    "list of float": ({"lengths": [1.0, 2, 3]}, TypeError, "lengths: expected whole numbers"),
    "bool": ({"lengths": ONES.bool()}, ValueError, "lengths: expected an integer dtype"),
    "number": ({"lengths": 3}, TypeError, "lengths: expected a Tensor or a list of int, got int"),
    "two dimensions": ({"lengths": ONES[None]}, ValueError, "lengths: expected shape"),
    "mask of int": ({"reset_mask": MASK.long()}, ValueError, r"reset_mask: expected dtype torch\.bool"),
    "mask transposed": ({"reset_mask": MASK.mT}, ValueError, r"reset_mask: expected shape \(T, B\) = \(4, 3\)"),
    "mask as list": ({"reset_mask": [[True]]}, TypeError, "reset_mask: expected a Tensor, got list"),
    "sizes, padded x": ({"batch_sizes": [3, 3]}, ValueError, r"x: expected 2 dimensions \(rows, I\) with batch_sizes"),
    "sizes and lengths": ({"batch_sizes": [3], "lengths": ONES}, ValueError, "lengths: expected None together with"),
    "sizes and mask": ({"batch_sizes": [3], "reset_mask": MASK}, ValueError, "reset_mask: expected None together"),
}


@kinds
@pytest.mark.parametrize(("wrong", "error", "text"), WRONG_SEQUENCES.values(), ids=WRONG_SEQUENCES)
def test_wrong_sequences(kind: str, wrong: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text if _native.module is not None else text.split(" at index")[0]):
        call(make_recurrent(kind, 4, 3, 5, 6), **wrong)


WRONG_SIZES = {
    "sum": ([3, 3], "batch_sizes: expected a sum of 7"),
    "growing": ([3, 1, 3], "batch_sizes: expected numbers that never grow"),
    "zero": ([3, 3, 1, 0], "batch_sizes: expected positive numbers"),
    "negative": ([3, 3, 2, -1], "batch_sizes: expected positive numbers"),
    "none": ([], "batch_sizes: expected at least one time step"),
    "batch": ([4, 3], "h0: expected"),
}


@kinds
@pytest.mark.parametrize(("sizes", "text"), WRONG_SIZES.values(), ids=WRONG_SIZES)
@pytest.mark.parametrize("where", ["kernel", "reference"])
def test_wrong_batch_sizes(kind: str, where: str, sizes: list[int], text: str) -> None:
    case = replace(make_recurrent(kind, 7, 1, 5, 6), batch_sizes=sizes)
    case = replace(case, x=case.x[:, 0], h0=torch.zeros(3, 6), c0=torch.zeros(3, 6) if kind == "lstm" else None)
    if where == "reference":
        with fastlm.backend("reference"), pytest.raises(ValueError, match=text):
            run_fastlm(case)
        return
    with pytest.raises((ValueError, RuntimeError), match=text):
        run_fastlm(case)


@kinds
def test_sum_of_batch_sizes_that_overflows(kind: str) -> None:
    """Four times 2**62 is 0 in 64 bits, the rows of an empty x."""
    case = make_recurrent(kind, 1, 0, 5, 6, state="none")
    with pytest.raises((ValueError, RuntimeError), match="batch_sizes: expected a sum of 0"):
        run_fastlm(replace(case, x=case.x[0], batch_sizes=[2**62] * 4))


def test_packed_rows_without_a_state() -> None:
    case = with_sequences(make_recurrent("gru", 5, 4, 3, 6, state="none"), "packed")
    zeros = replace(case, h0=torch.zeros(4, 6))
    assert equal(run_fastlm(case), run_fastlm(zeros))
    with fastlm.backend("reference"):
        assert run_fastlm(case)["h_n"].shape == (4, 6)
    doubled: Tensor = torch.func.grad(lambda x: run_fastlm(replace(case, x=x))["output"].sum())(case.x)
    assert doubled.shape == case.x.shape
