"""The one tolerance function, and the inputs and runners that tests and benchmarks share.

Tests compare floating-point results by it, save where they ask for equality to the bit, or only whether a result is the
right one at all (a fixed bound, far above rounding).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import _native
from fastlm.ops import reference

# How much worse than torch's own rounding error a result may be, and the units of rounding granted on top, since torch
# is lucky at times; a gradient sums over all steps and rows and may cancel.
FACTOR = {"forward": 2.0, "gradient": 3.0}
FLOOR_EPS = {"forward": 4.0, "gradient": 8.0}

kernels_only = pytest.mark.skipif(_native.module is None, reason="of the kernels alone, and there are none")


def bytes_saved(run: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward of run()."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    del outputs
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def check(
    name: str, got: Tensor, same_dtype: Tensor, reference64: Tensor, kind: str = "forward", scale: float = 0.0
) -> None:
    """Asserts err(got) <= k * err(torch in the same dtype) + a few eps * max|reference|, for maximum and RMS errors.

    scale stands for max|reference| where that is smaller: the size of what went in, for results that may cancel.
    Errors are taken against reference64 where everything is finite; NaN and infinities must stand where torch has them.
    """
    assert got.shape == reference64.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(reference64.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: dtype {got.dtype}, expected {same_dtype.dtype}"
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    got, same_dtype, reference64 = (tensor.detach().double() for tensor in (got, same_dtype, reference64))
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        places, expected = test(got), test(same_dtype)
        assert torch.equal(places, expected), (
            f"{name}: {what} in {int(places.sum())} places, torch has it in {int(expected.sum())}; "
            f"they differ first at {(places != expected).nonzero()[0].tolist()}"
        )
    finite = torch.isfinite(same_dtype) & torch.isfinite(reference64)
    if not finite.any():
        return
    truth = reference64[finite]
    error, baseline = (tensor[finite] - truth for tensor in (got, same_dtype))
    floor = FLOOR_EPS[kind] * eps * truth.abs().max().clamp(min=scale)
    for norm, measure in (("max", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        limit = FACTOR[kind] * measure(baseline) + floor
        assert measure(error) <= limit, (
            f"{name}: {norm} error {measure(error):.3e} against float64, torch's own {measure(baseline):.3e}, "
            f"limit {limit:.3e}; largest value {truth.abs().max():.3e}"
        )


@dataclass(frozen=True)
class Recurrent:
    """The inputs of one layer and direction; c0 is None for a GRU."""

    kind: str  # "gru" or "lstm"
    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    reverse: bool = False
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None  # x is packed
    reset_mask: Tensor | None = None
    all_states: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The floating-point tensors present, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor) and value.is_floating_point()}

    def sequences(self) -> dict[str, Tensor | None]:
        """Which steps the sequences have, as the public ops take it."""
        return {"lengths": self.lengths, "batch_sizes": self.batch_sizes, "reset_mask": self.reset_mask}

    def op_arguments(self, save: bool) -> tuple:
        """Arguments of the registered forward op."""
        states = (self.h0,) if self.kind == "gru" else (self.h0, self.c0)
        weights = (self.w_ih, self.w_hh, self.b_ih, self.b_hh)
        options = (self.reverse, save) if self.kind == "gru" else (self.reverse, save, self.all_states)
        return (self.x, *states, *weights, *self.sequences().values(), *options)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "Recurrent":
        """The same case with every tensor present replaced by function(name, tensor)."""
        return replace(self, **{name: function(name, tensor) for name, tensor in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> "Recurrent":
        return self.map(lambda _, tensor: tensor.to(dtype))


def make_recurrent(
    kind: str,
    seq_len: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: str = "both",
    state: str = "both",
    reverse: bool = False,
    seed: int = 0,
    requires_grad: bool = False,
) -> Recurrent:
    """Random inputs, weights as torch.nn draws them; bias: both, ih, hh or none; state: both, h0, c0 or none."""
    generator = torch.Generator().manual_seed(seed)
    rows = (3 if kind == "gru" else 4) * hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / hidden_size**0.5

    case = Recurrent(
        kind,
        normal(seq_len, batch, input_size),
        normal(batch, hidden_size) if state in ("both", "h0") else None,
        normal(batch, hidden_size) if kind == "lstm" and state in ("both", "c0") else None,
        uniform(rows, input_size),
        uniform(rows, hidden_size),
        uniform(rows) if bias in ("both", "ih") else None,
        uniform(rows) if bias in ("both", "hh") else None,
        reverse,
    )
    return case.map(lambda _, tensor: tensor.to(dtype).requires_grad_(requires_grad))


def with_sequences(case: Recurrent, form: str, *, seed: int = 0) -> Recurrent:
    """The case over sequences of random lengths, zero among them ("lengths"; "packed" as well, but none of zero), with
    random resets ("resets"), or "both" lengths and resets. What lies past a length is NaN."""
    generator = torch.Generator().manual_seed(seed)
    seq_len, batch, _ = case.x.shape
    lengths = torch.randint(0, seq_len + 1, (batch,), generator=generator)
    reset_mask = torch.rand(seq_len, batch, generator=generator) < 0.3
    if form == "resets":
        return replace(case, reset_mask=reset_mask)
    if form == "packed":
        lengths = lengths.clamp(min=1).sort(descending=True).values
        inside = torch.arange(int(lengths.max()))[:, None] < lengths
        return replace(case, x=case.x[: len(inside)][inside], batch_sizes=inside.sum(1))
    past = torch.arange(seq_len)[:, None] >= lengths
    x = case.x.masked_fill(past[..., None], float("nan"))
    return replace(case, x=x, lengths=lengths, reset_mask=reset_mask if form == "both" else None)


Outputs = dict[str, Tensor]
Runner = Callable[[Any], Outputs]


def run_fastlm(case: Recurrent) -> Outputs:
    """The public op: output, h_n and, for an LSTM, c_n."""
    return _run(fastlm.ops.gru, fastlm.ops.lstm, case)


def run_reference(case: Recurrent) -> Outputs:
    """fastlm's plain reference."""
    return _run(reference.gru, reference.lstm, case)


def _run(gru: Callable, lstm: Callable, case: Recurrent) -> Outputs:
    weights = (case.w_ih, case.w_hh, case.b_ih, case.b_hh)
    options = {**case.sequences(), "reverse": case.reverse}
    if case.kind == "gru":
        output, h_n = gru(case.x, case.h0, *weights, **options)
        return {"output": output, "h_n": h_n}
    if case.all_states and lstm is fastlm.ops.lstm:
        options["return_all_states"] = True
    output, (h_n, c_n), *cells = lstm(case.x, (case.h0, case.c0), *weights, **options)
    return {"output": output, "h_n": h_n, "c_n": c_n, **({"cells": cells[0]} if case.all_states else {})}


def run_torch(case: Recurrent) -> Outputs:
    """What torch.nn.GRU and torch.nn.LSTM compute: the functions their forward calls."""
    hidden = case.w_hh.shape[1]
    plain = all(value is None for value in case.sequences().values()) and not case.all_states
    batch = int(case.batch_sizes[0]) if case.batch_sizes is not None else case.x.shape[1]
    h0, c0 = (case.x.new_zeros(batch, hidden) if state is None else state for state in (case.h0, case.c0))
    states = (h0,) if case.kind == "gru" else (h0, c0)
    output, *states = _torch_whole(case, case.x, states) if plain or batch == 0 else _torch_one_by_one(case, states)
    names = ("h_n",) if case.kind == "gru" else ("h_n", "c_n", "cells")
    return {"output": output, **dict(zip(names, states, strict=False))}


def _torch_whole(case: Recurrent, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    """output and last states of torch over x (T, B, I), all of whose steps belong to one sequence each."""
    weights = [case.w_ih, case.w_hh]
    biased = case.b_ih is not None or case.b_hh is not None
    if biased:
        weights += [case.w_ih.new_zeros(case.w_ih.shape[0]) if b is None else b for b in (case.b_ih, case.b_hh)]
    hx = [state.unsqueeze(0) for state in states]
    options = (biased, 1, 0.0, False, False, False)
    x = x.flip(0) if case.reverse else x
    output, *last = (
        torch.gru(x, hx[0], weights, *options) if case.kind == "gru" else torch.lstm(x, hx, weights, *options)
    )
    return [output.flip(0) if case.reverse else output, *(state.squeeze(0) for state in last)]


def _torch_one_by_one(case: Recurrent, states: tuple[Tensor, ...]) -> list[Tensor]:
    """The truth about lengths and resets: a loop over single sequences, split where they start anew."""
    batch = states[0].shape[0]
    if case.batch_sizes is None:
        lengths = [case.x.shape[0]] * batch if case.lengths is None else case.lengths.tolist()
        rows = [[t * batch + b for t in range(length)] for b, length in enumerate(lengths)]
    else:
        first = [0, *torch.cumsum(case.batch_sizes, 0).tolist()]
        rows = [[first[t] + b for t, size in enumerate(case.batch_sizes.tolist()) if b < size] for b in range(batch)]
    x = case.x.flatten(0, -2)
    kinds = len(states) if case.all_states else 1
    made = [x.new_zeros(x.shape[0], case.w_hh.shape[1]) for _ in range(kinds)]
    finals = []
    for b, places in enumerate(rows):
        resets = [] if case.reset_mask is None else case.reset_mask[: len(places), b].nonzero().flatten().tolist()
        each, final = _torch_sequence(case, x[places], tuple(state[b : b + 1] for state in states), resets)
        finals.append(final)
        if places:
            made = [full.index_copy(0, torch.tensor(places), e) for full, e in zip(made, each, strict=False)]
    output, *cells = (rows.view(*case.x.shape[:-1], rows.shape[-1]) for rows in made)
    return [output, *(torch.cat(final) for final in zip(*finals, strict=True)), *cells]


def _torch_sequence(
    case: Recurrent, x: Tensor, states: tuple[Tensor, ...], resets: list[int]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Every state of one sequence x (T, I), and the last ones."""
    cuts = range(len(x) + 1) if case.all_states else sorted({0, *resets, len(x)})
    pieces = list(pairwise(cuts))
    made = []
    for begin, end in reversed(pieces) if case.reverse else pieces:
        if begin in resets and not case.reverse:
            states = tuple(torch.zeros_like(state) for state in states)
        output, *states = _torch_whole(case, x[begin:end, None], states)
        made.append((output[:, 0], *(states[1:] if case.all_states else ())))
        if begin in resets and case.reverse:
            states = tuple(torch.zeros_like(state) for state in states)
    made = made[::-1] if case.reverse else made
    return [torch.cat(each) for each in zip(*made, strict=True)], tuple(states)


def incoming(outputs: Outputs, names: Iterable[str] | None = None) -> Outputs:
    """Gradients that arrive at the named outputs (default: all), the same for every dtype and runner."""
    generator = torch.Generator().manual_seed(1)
    made = {
        name: torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
        for name, out in outputs.items()
    }
    return made if names is None else {name: made[name] for name in names}


def forward_backward(
    run: Runner,
    case: Recurrent,
    *,
    wanted: Iterable[str] | None = None,
    arriving: Iterable[str] | Callable[[Outputs], Outputs] = incoming,
) -> Outputs:
    """Outputs, and as grad_<name> the gradients of the wanted inputs (default: all).

    arriving names the outputs that get a gradient, or makes these gradients from the outputs.
    """
    names = list(case.tensors() if wanted is None else wanted)
    leaves = case.map(lambda name, tensor: tensor.detach().requires_grad_(name in names))
    outputs = run(leaves)
    grad_outputs = arriving(outputs) if callable(arriving) else incoming(outputs, arriving)
    inputs = leaves.tensors()
    # With resets or zero lengths some input, in torch's loop some output, may play no part: its gradient is zero.
    used = [name for name in grad_outputs if outputs[name].requires_grad]
    grads = (
        torch.autograd.grad(
            [outputs[name] for name in used],
            [inputs[name] for name in names],
            [grad_outputs[name] for name in used],
            materialize_grads=True,
        )
        if used
        else [torch.zeros_like(inputs[name]) for name in names]
    )
    return {**outputs, **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}}


def check_all(got: Outputs, same_dtype: Outputs, reference64: Outputs, scale: float = 0.0) -> None:
    """`check` for everything `forward_backward` returns."""
    assert got.keys() == same_dtype.keys() == reference64.keys()
    for name, value in got.items():
        kind = "gradient" if name.startswith("grad_") else "forward"
        check(name, value, same_dtype[name], reference64[name], kind, scale)


def check_recurrent(
    case: Recurrent | list[Recurrent],
    *,
    wanted: Iterable[str] | None = None,
    arriving: Iterable[str] | Callable[[Outputs], Outputs] = incoming,
) -> None:
    """Checks the public op, forward and gradients, on every ISA, against torch in the same dtype and in float64."""
    check_case(case, run_fastlm, run_torch, wanted=wanted, arriving=arriving)


def check_case(
    case: Any,
    ours: Runner,
    theirs: Runner,
    *,
    wanted: Iterable[str] | None = None,
    arriving: Iterable[str] | Callable[[Outputs], Outputs] = incoming,
    scale: float = 0.0,
    split: bool = False,
) -> None:
    """Checks one runner on every ISA, forward and gradients, against another in the same dtype and in float64.

    A case has `tensors`, `map` and `to` as Recurrent has; a list of cases of one dtype is one sample, since torch's
    error on a few numbers is a matter of luck. split: it is large enough for float32 to be split.
    """
    cases = case if isinstance(case, list) else [case]

    def results(run: Runner, dtype: torch.dtype) -> list[Outputs]:
        return [forward_backward(run, case.to(dtype), wanted=wanted, arriving=arriving) for case in cases]

    dtype = next(iter(cases[0].tensors().values())).dtype
    truths = results(theirs, torch.float64)
    if dtype == torch.float64:
        same = list(map(scaled_to_float64, results(theirs, torch.float32), truths))
    else:
        same = results(theirs, dtype)
    baseline, truth = _in_a_row(same, truths), _in_a_row(truths, truths)
    for isa in each_isa(dtype, split):
        try:
            check_all(_in_a_row(results(ours, dtype), truths), baseline, truth, scale)
        except AssertionError as error:
            raise AssertionError(f"{isa}: {error}") from error


def _in_a_row(found: list[Outputs], truths: list[Outputs]) -> Outputs:
    if len(found) == 1:
        return found[0]
    for results, truth in zip(found, truths, strict=True):
        shapes, expected = ({name: value.shape for name, value in each.items()} for each in (results, truth))
        assert shapes == expected
    return {name: torch.cat([results[name].flatten() for results in found]) for name in truths[0]}


def differs(isa: str, dtype: torch.dtype, split: bool = False) -> bool:
    """Whether an instruction set has kernels of its own for a dtype: some have them for bfloat16 alone, or for large
    enough inputs of float32 too, which are split there."""
    if dtype == torch.bfloat16 or (split and dtype == torch.float32 and isa.endswith("_amx")):
        return True
    return not isa.endswith(("_bf16", "_amx"))


def each_isa(dtype: torch.dtype, split: bool = False) -> Iterator[str]:
    """The instruction sets usable here that differ, each in use while given out ("pure" without the extension)."""
    if _native.module is None:
        yield "pure"
        return
    previous = _native.module.cpu_isa()
    try:
        for isa in filter(lambda name: differs(name, dtype, split), _native.module.cpu_isas()):
            _native.module.set_cpu_isa(isa)
            yield isa
    finally:
        _native.module.set_cpu_isa(previous)


def scaled_to_float64(in_float32: Outputs, truth: Outputs) -> Outputs:
    """The baseline for float64: torch's float32 errors in proportion to the unit of rounding.

    torch in float64 cannot be its own baseline, and how far two float64 computations differ is a matter of luck.
    """
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = {name: (value.double() - truth[name]) * scale for name, value in in_float32.items()}
    return {
        name: truth[name] + error.where(error.isfinite(), torch.zeros_like(error)) for name, error in errors.items()
    }
