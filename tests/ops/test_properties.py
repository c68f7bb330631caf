"""Shapes and flags drawn by hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.numerics import Recurrent, check, check_recurrent, forward_backward, make_recurrent, run_fastlm

# The same examples in every run; deadlines would only measure the machine.
repeatable = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> Recurrent:
    sizes = [draw(st.integers(1, top)) for top in (12, 20, 40, 70)]
    return make_recurrent(
        draw(st.sampled_from(("gru", "lstm"))),
        *sizes,
        dtype=draw(st.sampled_from((torch.float32, torch.float64))),
        bias=draw(st.sampled_from(("both", "ih", "hh", "none"))),
        state=draw(st.sampled_from(("both", "h0", "c0", "none"))),
        reverse=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@repeatable
@given(case=cases(), data=st.data())
def test_parity(case: Recurrent, data: st.DataObject) -> None:
    names = list(case.tensors())
    outputs = ["output", "h_n"] if case.kind == "gru" else ["output", "h_n", "c_n"]
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    arriving = data.draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
    check_recurrent(case, wanted=sorted(wanted), arriving=sorted(arriving))


@repeatable
@given(case=cases())
def test_reverse_is_flipping(case: Recurrent) -> None:
    flipped = make_flipped(case)
    got, expected = run_fastlm(case), run_fastlm(flipped)
    expected["output"] = expected["output"].flip(0)
    for name, value in got.items():
        check(name, value, expected[name], expected[name].double())


@repeatable
@given(case=cases(), cut=st.integers(0, 12))
def test_a_sequence_is_its_parts_one_after_the_other(case: Recurrent, cut: int) -> None:
    cut = cut % case.x.shape[0]
    case = make_flipped(case) if case.reverse else case
    whole = run_fastlm(case)
    if cut:
        first = run_fastlm(with_x(case, case.x[:cut]))
        states = {"h0": first["h_n"], "c0": first.get("c_n")}
        rest = run_fastlm(Recurrent(**{**vars(case), "x": case.x[cut:], **states}))
        rest["output"] = torch.cat((first["output"], rest["output"]))
        for name, value in rest.items():
            check(name, value, whole[name], whole[name].double())
    last = whole["output"][-1]
    assert torch.equal(last, whole["h_n"])


@repeatable
@given(case=cases(), data=st.data())
def test_rows_of_a_batch_do_not_meet(case: Recurrent, data: st.DataObject) -> None:
    """What one row holds, NaN included, changes no other row, forward or backward."""
    row = data.draw(st.integers(0, case.x.shape[1] - 1))
    spoilt = with_x(case, case.x.clone())
    spoilt.x[:, row] = float("nan")
    others = torch.arange(case.x.shape[1]) != row
    clean, dirty = (forward_backward(run_fastlm, c, wanted=["x"]) for c in (case, spoilt))
    for name, value in clean.items():
        rows = (slice(None), others) if value.dim() == 3 else others
        check(name, dirty[name][rows], value[rows], value[rows].double())


def with_x(case: Recurrent, x: torch.Tensor) -> Recurrent:
    return case.map(lambda name, tensor: x if name == "x" else tensor)


def make_flipped(case: Recurrent) -> Recurrent:
    return Recurrent(**{**vars(case), "x": case.x.flip(0), "reverse": not case.reverse})
