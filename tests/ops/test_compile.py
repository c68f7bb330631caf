"""Registration of the ops, and what stands on it: torch.compile, torch.export, fake tensors, functional_call."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from tests.numerics import Outputs, Recurrent, check_all, forward_backward, make_recurrent, run_fastlm, run_torch

KINDS = ("gru", "lstm")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def states_of(case: Recurrent) -> tuple[Tensor | None, ...]:
    return (case.h0,) if case.kind == "gru" else (case.h0, case.c0)


def opcheck_forward(case: Recurrent, save: bool) -> None:
    # With lengths the end of the reserve is not written, so that two runs differ there; test_sequences.py compiles it.
    checks = [name for name in OPCHECKS if case.lengths is None or name != "test_aot_dispatch_dynamic"]
    op = getattr(torch.ops.fastlm, f"{case.kind}_forward").default
    torch.library.opcheck(op, case.op_arguments(save), test_utils=checks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["both", "none"], ids=("all_inputs", "bare"))
@pytest.mark.parametrize("save", [True, False], ids=("save", "no_save"))
def test_opcheck_forward(kind: str, given: str, save: bool) -> None:
    for dtype, reverse in ((torch.float32, False), (torch.float64, True)):
        options = {"dtype": dtype, "bias": given, "state": given, "reverse": reverse}
        opcheck_forward(make_recurrent(kind, 3, 2, 4, 5, requires_grad=save, **options), save)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_forward_whose_backward_has_nothing_saved(kind: str) -> None:
    opcheck_forward(make_recurrent(kind, 2, 2, 2, 2, requires_grad=True), save=False)


# Sequences of a case with T 3, B 2: what the op's arguments can be.
SEQUENCES = {
    "whole": {},
    "lengths": {"lengths": torch.tensor([1, 3]), "reset_mask": torch.tensor([[False, True]] * 3)},
    "packed": {"batch_sizes": torch.tensor([2, 2, 1])},
}
sequences = pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)


def with_sequences(case: Recurrent, sequences: dict[str, Tensor]) -> Recurrent:
    case = replace(case, **sequences)
    return replace(case, x=case.x.flatten(0, 1)[:5]) if case.batch_sizes is not None else case


@pytest.mark.parametrize("kind", KINDS)
@sequences
def test_opcheck_sequences(kind: str, sequences: dict[str, Tensor]) -> None:
    case = with_sequences(make_recurrent(kind, 3, 2, 4, 5), replace_all_states(kind, sequences))
    opcheck_forward(case.map(lambda _, tensor: tensor.detach().requires_grad_()), True)


def replace_all_states(kind: str, sequences: dict[str, Tensor]) -> dict:
    return {**sequences, "all_states": kind == "lstm"}


def backward_arguments(case: Recurrent, needs: tuple[bool, ...], arriving: str = "all") -> tuple:
    """Arguments of the registered backward op; needs: x, states, weights, biases."""
    *outputs, reserve = getattr(torch.ops.fastlm, f"{case.kind}_forward")(*case.op_arguments(True))
    torch.manual_seed(0)
    grads = [torch.randn_like(out) if out.numel() else None for out in outputs]
    grads[0] = None if arriving == "states" else grads[0]
    grads[1:] = [None] * len(grads[1:]) if arriving == "output" else grads[1:]
    need_x, need_states, *need_weights = needs
    state = case.h0 if need_states else None
    weights = (case.w_ih, case.w_hh)
    return (*grads, case.x, state, *weights, *case.sequences().values(), reserve, case.reverse, need_x, *need_weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arriving", ["all", "output", "states"])
@sequences
def test_opcheck_backward(kind: str, arriving: str, sequences: dict[str, Tensor]) -> None:
    case = with_sequences(make_recurrent(kind, 3, 2, 4, 5), sequences)
    op = getattr(torch.ops.fastlm, f"{kind}_backward").default
    for needs in ((True, True, True, True), (False, True, False, True), (True, False, True, False)):
        torch.library.opcheck(op, backward_arguments(case, needs, arriving))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layered", [False, True], ids=("B_H", "1_B_H"))
@pytest.mark.parametrize("one_step", [False, True], ids=("steps", "one_step"))
def test_forms_of_states(kind: str, layered: bool, one_step: bool) -> None:
    """x may be one step's (B, I); states given have either form, the last ones a module's but for one step."""
    flat = make_recurrent(kind, 1 if one_step else 3, 2, 4, 5)
    case = flat.map(
        lambda name, t: t[0] if name == "x" and one_step else t[None] if name in ("h0", "c0") and layered else t
    )
    opcheck_forward(case.map(lambda _, tensor: tensor.detach().requires_grad_()), True)
    needs = (True,) * 4
    for name, arguments in (
        ("forward", lambda c: c.op_arguments(True)),
        ("backward", lambda c: backward_arguments(c, needs)),
    ):
        op = getattr(torch.ops.fastlm, f"{kind}_{name}").default
        torch.library.opcheck(op, arguments(case))
        for got, expected in zip(op(*arguments(case)), op(*arguments(flat)), strict=True):
            assert torch.equal(got.flatten(), expected.flatten())
    last = getattr(torch.ops.fastlm, f"{kind}_forward")(*case.op_arguments(True))[1]
    assert last.shape == ((2, 5) if one_step else (1, 2, 5))
    grad = getattr(torch.ops.fastlm, f"{kind}_backward")(*backward_arguments(case, needs))[1]
    assert grad.shape == case.h0.shape


@pytest.mark.parametrize("kind", KINDS)
def test_backward_computes_what_is_asked_for(isa: str, kind: str) -> None:
    case = make_recurrent(kind, 3, 2, 4, 5)
    op = getattr(torch.ops.fastlm, f"{kind}_backward")
    whole = op(*backward_arguments(case, (True,) * 4))
    states = len(states_of(case))
    for needs in product((False, True), repeat=4):
        need_x, need_h0, need_weights, need_bias = needs
        got = op(*backward_arguments(case, needs))
        asked = [need_x, *[need_h0] * states, need_weights, need_weights]
        asked += [need_bias] * (len(got) - len(asked))
        for value, full, need in zip(got, whole, asked, strict=True):
            assert torch.equal(value, full) if need else value.numel() == 0


@pytest.mark.parametrize("form", list(product((False, True), repeat=2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("fp32", "fp64"))
def test_opcheck_gemm(dtype: torch.dtype, form: tuple[bool, bool]) -> None:
    a, b = (
        torch.randn((4, 3) if form[0] else (3, 4), dtype=dtype),
        torch.randn((5, 4) if form[1] else (4, 5), dtype=dtype),
    )
    torch.library.opcheck(torch.ops.fastlm.gemm.default, (a, b, *form))
    torch.library.opcheck(torch.ops.fastlm.gemm.default, (a, b, *form, torch.randn(5, dtype=dtype)))


def equal(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["both", "none"], ids=("all_inputs", "bare"))
def test_compile_once_for_all_lengths_and_batches(kind: str, given: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_fastlm, fullgraph=True, dynamic=True, backend=counter)
    for seq_len, batch in ((5, 3), (9, 4), (2, 7), (30, 2)):
        case = make_recurrent(kind, seq_len, batch, 6, 8, bias=given, state=given)
        assert equal(forward_backward(compiled, case), forward_backward(run_fastlm, case))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_compile_marked_dynamic_without_grad(kind: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_fastlm, fullgraph=True, backend=counter)
    for seq_len, batch in ((5, 3), (9, 4), (2, 7)):
        case = make_recurrent(kind, seq_len, batch, 6, 8, state="none", reverse=True)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(case.x, dim)
        with torch.no_grad():
            assert equal(compiled(case), run_fastlm(case))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_compile_with_inductor(kind: str) -> None:
    case = make_recurrent(kind, 5, 3, 6, 8)
    compiled = torch.compile(lambda given: {k: v.sin() for k, v in run_fastlm(given).items()}, fullgraph=True)
    runs = (compiled, lambda given: {k: v.sin() for k, v in run_torch(given).items()})
    check_all(
        *(forward_backward(run, given) for run, given in
          ((runs[0], case), (runs[1], case), (runs[1], case.to(torch.float64))))
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_errors_are_the_same(kind: str) -> None:
    case = make_recurrent(kind, 5, 3, 6, 8)
    wrong = case.map(lambda name, tensor: tensor[:-1] if name == "w_hh" else tensor)
    compiled = torch.compile(run_fastlm, backend="aot_eager")
    for run in (run_fastlm, compiled):
        with pytest.raises(ValueError, match="w_hh: expected shape"):
            run(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_under_autocast(kind: str) -> None:
    case = make_recurrent(kind, 5, 3, 6, 8)
    compiled = torch.compile(run_fastlm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(compiled(case), run_fastlm(case))


class Layer(torch.nn.Module):
    """One layer with its tensors as parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.case = make_recurrent(kind, 5, 3, 6, 8, state="none")
        for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
            setattr(self, name, torch.nn.Parameter(self.case.tensors()[name]))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.w_ih, self.w_hh, self.b_ih, self.b_hh)
        if self.case.kind == "gru":
            return fastlm.ops.gru(x, None, *weights)[0]
        return fastlm.ops.lstm(x, (None, None), *weights)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str) -> None:
    layer = Layer(kind)
    dynamic = {0: torch.export.Dim("T", min=1), 1: torch.export.Dim("B", min=1)}
    program = torch.export.export(layer, (layer.case.x,), dynamic_shapes=(dynamic,))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(getattr(torch.ops.fastlm, f"{kind}_forward").default) == 1
    for seq_len, batch in ((5, 3), (9, 2), (1, 1)):
        x = torch.randn(seq_len, batch, 6)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str) -> None:
    layer, x = Layer(kind), torch.randn(4, 2, 6)
    doubled = {name: (2 * value).detach().requires_grad_() for name, value in layer.named_parameters()}
    got = torch.func.functional_call(layer, doubled, (x,))
    got.sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    expected = layer(x)
    expected.sum().backward()
    assert torch.equal(got, expected)
    for name, parameter in layer.named_parameters():
        assert torch.equal(doubled[name].grad, parameter.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_without_data(kind: str, where: str) -> None:
    case = make_recurrent(kind, 5, 3, 6, 8)
    expected = forward_backward(run_fastlm, case)
    if where == "fake":
        with FakeTensorMode() as mode:
            got = forward_backward(run_fastlm, case.map(lambda _, tensor: mode.from_tensor(tensor)))
    else:
        got = forward_backward(run_fastlm, case.map(lambda _, tensor: tensor.to("meta")))
    for name, value in got.items():
        assert (value.shape, value.dtype, value.stride()) == (
            expected[name].shape, expected[name].dtype, expected[name].stride()
        ), name  # fmt: skip


def test_compile_tells_of_the_reference_at_once() -> None:
    module = fastlm.nn.LSTM(3, 4, proj_size=2)
    x = torch.randn(5, 2, 3)
    with pytest.warns(fastlm.FastlmFallbackWarning, match="projection"):
        output = torch.compile(module, backend="aot_eager", fullgraph=True)(x)[0]
    assert torch.equal(output, module(x)[0])


@pytest.mark.parametrize("name", ["GRUCell", "GRU", "LSTM"])
def test_compile_of_a_transform(name: str) -> None:
    module = getattr(fastlm.nn, name)(3, 4)
    parameters = dict(module.named_parameters())
    x = torch.randn(*((2,) if name == "GRUCell" else (5, 2)), 3)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output = torch.func.functional_call(module, parameters, (x,))
        return (output if isinstance(output, Tensor) else output[0]).pow(2).sum()

    grads = torch.func.grad(loss)
    compiled = torch.compile(grads, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(parameters, x).values(), grads(parameters, x).values(), strict=True):
        torch.testing.assert_close(got, expected)
    plain = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(plain(parameters, x), loss(parameters, x))
