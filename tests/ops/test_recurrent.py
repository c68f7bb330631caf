"""GRU and LSTM: outputs and every gradient against torch, over shapes, options, layouts, dtypes and ISAs."""

from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from tests.numerics import (
    Outputs,
    check,
    check_all,
    check_recurrent,
    forward_backward,
    incoming,
    make_recurrent,
    run_fastlm,
    run_reference,
    run_torch,
    scaled_to_float64,
)

KINDS = ("gru", "lstm")
BIASES = ("both", "none", "ih", "hh")
STATES = ("both", "none", "h0", "c0")
DTYPES = (torch.float32, torch.float64)

# Around the widths of vectors and tiles. Rotated against each other, every size stands once for every dimension.
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100)
ROTATED = [tuple(SIZES[(i + shift) % len(SIZES)] for shift in (4, 7, 11, 0)) for i in range(len(SIZES))]
# (T, B, I, H): several tiles of units or rows, time in several chunks, one input, more inputs than units; weight
# gradients deeper than one go over k, and in two chunks of time.
LARGER = [(3, 5, 200, 200), (20, 33, 64, 64), (40, 16, 128, 256), (300, 2, 32, 32), (50, 1, 1, 128), (4, 6, 300, 16)]
LARGER += [(50, 24, 16, 40), (200, 8, 2, 400)]
SHAPES = ROTATED + LARGER


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in zip("TBIH", shape, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    index = SHAPES.index(shape)
    options = {"bias": BIASES[index % 4], "state": STATES[index % 3], "reverse": index % 2 == 1}
    seq_len, batch, *sizes = shape
    if dtype == torch.float64:
        # The truth is float64 too: its gradients summed over thousands of rows are no better than what they judge.
        batch = min(batch, 1024 // seq_len)
    check_recurrent(make_recurrent(kind, seq_len, batch, *sizes, dtype=dtype, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_results_written_past_the_caches(kind: str) -> None:
    """More than 32 MB, of rows of whole cache lines; the last units are not a whole panel."""
    check_recurrent(make_recurrent(kind, 260, 32, 8, 208, reverse=kind == "gru"))


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("batch", SIZES)
def test_shapes_full(kind: str, batch: int, hidden_size: int) -> None:
    seeds = range(max(1, 64 // (batch * hidden_size)))  # of few numbers, more of them
    for dtype in DTYPES:
        shapes = product((1, 2, 9), (batch,), (1, 8, 33), (hidden_size,), seeds)
        check_recurrent([make_recurrent(kind, *shape, dtype=dtype, seed=seed) for *shape, seed in shapes])


@pytest.mark.parametrize(
    ("kind", "state"), [("gru", "h0"), ("gru", "none"), *(("lstm", state) for state in STATES)], ids="-".join
)
@pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
@pytest.mark.parametrize("bias", BIASES, ids=lambda bias: f"bias_{bias}")
def test_options(kind: str, state: str, bias: str, reverse: bool) -> None:
    for shape in ((4, 3, 5, 17), (1, 9, 5, 8)):
        check_recurrent(make_recurrent(kind, *shape, bias=bias, state=state, reverse=reverse))


def _sum_of_output(outputs: Outputs) -> Outputs:
    """What output.sum() sends: a gradient with zero strides."""
    return {"output": torch.ones((), dtype=outputs["output"].dtype).expand_as(outputs["output"])}


def _strided(outputs: Outputs) -> Outputs:
    made = incoming(outputs)
    return {name: grad.mT.contiguous().mT for name, grad in made.items()}


ARRIVING = {
    "output": ("output",),
    "h_n": ("h_n",),
    "c_n": ("c_n",),
    "states": ("h_n", "c_n"),
    "sum": _sum_of_output,
    "strided": _strided,
}


@pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
@pytest.mark.parametrize(
    ("kind", "arriving"),
    [(kind, a) for kind, a in product(KINDS, ARRIVING) if kind == "lstm" or a not in ("c_n", "states")],
    ids="-".join,
)
def test_gradients_arrive_at(kind: str, arriving: str, reverse: bool) -> None:
    check_recurrent(make_recurrent(kind, 5, 6, 7, 18, reverse=reverse), arriving=ARRIVING[arriving])


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in make_recurrent(kind, 1, 1, 1, 1).tensors()]
)
def test_gradient_of_one_input_alone(kind: str, name: str) -> None:
    case = make_recurrent(kind, 4, 3, 5, 9)
    check_recurrent(case, wanted=[name])
    leaves = case.map(lambda key, tensor: tensor.clone().requires_grad_(key == name))
    sum(out.sum() for out in run_fastlm(leaves).values()).backward()
    assert [key for key, tensor in leaves.tensors().items() if tensor.grad is not None] == [name]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_recorded_without_need(kind: str) -> None:
    case = make_recurrent(kind, 3, 2, 4, 5, requires_grad=True)
    with torch.no_grad():
        outputs = run_fastlm(case)
    frozen = run_fastlm(case.map(lambda _, tensor: tensor.detach()))
    with torch.inference_mode():
        inference = run_fastlm(case)
    assert all(out.is_inference() for out in inference.values())
    for name, recorded in run_fastlm(case).items():
        assert recorded.requires_grad
        for out in (outputs[name], frozen[name], inference[name]):
            assert not out.requires_grad
            assert torch.equal(out, recorded)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_tensors_as_inputs(kind: str) -> None:
    with torch.inference_mode():
        case = make_recurrent(kind, 3, 2, 4, 5)
    expected = run_fastlm(make_recurrent(kind, 3, 2, 4, 5))
    for name, out in run_fastlm(case).items():
        assert torch.equal(out, expected[name])


def _every_other(tensor: Tensor) -> Tensor:
    """The same values at every other place of a larger tensor filled with NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    wide[..., ::2] = tensor
    return wide[..., ::2]


LAYOUTS = {
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else _every_other(tensor),
    "strided": _every_other,
    "offset": lambda tensor: torch.cat((tensor.new_full((1,), float("nan")), tensor.flatten()))[1:].view(tensor.shape),
    "batch_first": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() == 3 else tensor,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kind: str, layout: str) -> None:
    case = make_recurrent(kind, 5, 9, 8, 17)
    check_recurrent(case.map(lambda _, tensor: LAYOUTS[layout](tensor)))


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_inputs(kind: str) -> None:
    case = make_recurrent(kind, 5, 4, 8, 17)
    check_recurrent(case.map(lambda name, t: t[:, :1].expand_as(t) if name == "x" else t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_cell_is_one_step(isa: str, kind: str, dtype: torch.dtype) -> None:
    for batch, input_size, hidden_size in ((1, 3, 5), (4, 16, 33), (9, 1, 64)):
        case = make_recurrent(kind, 1, batch, input_size, hidden_size, dtype=dtype)
        weights = (case.w_ih, case.w_hh, case.b_ih, case.b_hh)
        if kind == "gru":
            got = {"h_n": fastlm.ops.gru_cell(case.x[0], case.h0, *weights)}
        else:
            states = fastlm.ops.lstm_cell(case.x[0], (case.h0, case.c0), *weights)
            got = dict(zip(("h_n", "c_n"), states, strict=True))
        truth, same = run_torch(case.to(torch.float64)), run_torch(case.to(torch.float32))
        if dtype == torch.float64:
            same = scaled_to_float64(same, truth)
        for name, value in got.items():
            check(name, value, same[name], truth[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))
def test_one_step_of_dozens_of_rows(isa: str, kind: str, dtype: torch.dtype) -> None:
    """Weights that are read in place: rows around whole vectors and groups of them, and where packing begins."""
    sizes = (
        (13, 7, 65),
        (16, 300, 130),
        (23, 65, 9),
        (33, 16, 64),
        (47, 1, 100),
        (64, 33, 72),
        (96, 70, 71),
        (97, 9, 8),
    )
    for (batch, input_size, hidden_size), bias in zip(sizes, BIASES * 2, strict=True):
        check_recurrent(make_recurrent(kind, 1, batch, input_size, hidden_size, dtype=dtype, bias=bias))


@pytest.mark.parametrize("kind", KINDS)
def test_one_matrix_for_input_and_state(isa: str, kind: str) -> None:
    for seq_len, batch in ((1, 3), (1, 20), (4, 20)):
        case = make_recurrent(kind, seq_len, batch, 24, 24)
        check_recurrent(case.map(lambda name, tensor: case.w_ih if name == "w_hh" else tensor))  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True], ids=("ahead", "reverse"))
def test_reference_is_what_torch_computes(kind: str, reverse: bool) -> None:
    """The reference serves derivatives of higher order and every fallback."""
    for bias, state in product(BIASES, STATES):
        case = make_recurrent(kind, 6, 5, 7, 9, bias=bias, state=state, reverse=reverse)
        runs = ((run_reference, case), (run_torch, case), (run_torch, case.to(torch.float64)))
        check_all(*(forward_backward(run, given) for run, given in runs))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(isa: str, kind: str) -> None:
    case = make_recurrent(kind, 4, 0, 3, 5)
    check_recurrent(case)
    grads = forward_backward(run_fastlm, case)
    for name, tensor in case.tensors().items():
        assert grads[f"grad_{name}"].shape == tensor.shape
        assert not grads[f"grad_{name}"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone(isa: str, kind: str) -> None:
    case = make_recurrent(kind, 5, 3, 4, 17)
    before = case.map(lambda _, tensor: tensor.clone())
    forward_backward(run_fastlm, case)
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name
        assert tensor._version == 0


def test_lstm_without_a_state() -> None:
    case = make_recurrent("lstm", 4, 3, 5, 6)
    weights = (case.w_ih, case.w_hh, case.b_ih, case.b_hh)
    got, expected = (fastlm.ops.lstm(case.x, state, *weights) for state in (None, (None, None)))
    assert torch.equal(got[0], expected[0])
    cells = [fastlm.ops.lstm_cell(case.x[0], state, *weights)[0] for state in (None, (None, None))]
    assert torch.equal(*cells)
