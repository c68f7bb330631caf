"""Random calls of the public operations: valid ones, whose results the reference judges, and invalid ones, which must
give a clear error. `run` makes some of them; tests/fuzz/test_fuzz.py and `python -m tests.fuzz` (make fuzz) call it.

A call is drawn from a generator seeded with its number: `python -m tests.fuzz --call 4711` makes that one again.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlm import _native
from tests.numerics import (
    Recurrent,
    check_all,
    forward_backward,
    make_recurrent,
    run_fastlm,
    run_reference,
    scaled_to_float64,
)

KINDS = ("gru", "lstm")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
# Sizes at which something changes: nothing, one, around vectors and tiles, beyond what is read in place.
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 31, 33, 48, 65)
BATCHES = (0, *SIZES)
STEPS = (1, 1, 1, 2, 2, 3, 4, 5, 6, 9, 13, 20)


@dataclass(frozen=True)
class Call:
    """One drawn call; `wrong` names what is wrong with it, None for a valid one."""

    number: int
    case: Recurrent
    threads: int
    isa: str | None
    wrong: str | None

    def __str__(self) -> str:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.case.tensors().items()}
        sequences = {name: value.tolist() for name, value in self.case.sequences().items() if isinstance(value, Tensor)}
        return (
            f"call {self.number}: {self.case.kind}, {self.case.x.dtype}, reverse={self.case.reverse}, "
            f"threads={self.threads}, isa={self.isa}, wrong={self.wrong}, {shapes}, {sequences}"
        )


def draw(number: int) -> Call:
    """The call of this number."""
    chance = random.Random(number)
    torch.manual_seed(number)
    kind = chance.choice(KINDS)
    seq_len, batch = chance.choice(STEPS), chance.choice(BATCHES)
    case = make_recurrent(
        kind, seq_len, batch, chance.choice(SIZES), chance.choice(SIZES), dtype=chance.choice(DTYPES),
        bias=chance.choice(("both", "both", "ih", "hh", "none")), reverse=chance.random() < 0.5, seed=number,
        state=chance.choice(("both", "both", "none", "h0", "c0")),
    )  # fmt: skip
    case = replace(_with_sequences(case, chance), all_states=kind == "lstm" and chance.random() < 0.3)
    wrong = None
    if chance.random() < 0.3:
        wrong, case = _spoil(case, chance)
    isas = [None] if _native.module is None else _native.module.cpu_isas()
    return Call(
        number, _laid_out(case, chance) if wrong is None else case, chance.choice((1, 1, 2)), chance.choice(isas), wrong
    )


def _with_sequences(case: Recurrent, chance: random.Random) -> Recurrent:
    seq_len, batch, _ = case.x.shape
    form = chance.choice(("whole", "whole", "lengths", "packed", "resets", "both"))
    lengths = torch.tensor([chance.randint(0, seq_len) for _ in range(batch)], dtype=torch.int64)
    if form == "packed" and batch:
        lengths = lengths.clamp(min=1).sort(descending=True).values
        inside = torch.arange(int(lengths[0]))[:, None] < lengths
        return replace(case, x=case.x[: len(inside)][inside], batch_sizes=inside.sum(1))
    if form in ("resets", "both"):
        case = replace(case, reset_mask=torch.rand(seq_len, batch) < chance.random())
    return replace(case, lengths=lengths) if form in ("lengths", "both") else case


def _laid_out(case: Recurrent, chance: random.Random) -> Recurrent:
    """The same values in another memory layout, now and then."""

    def lay_out(name: str, tensor: Tensor) -> Tensor:
        layout = chance.choice(("dense", "dense", "strided", "transposed", "offset"))
        if layout == "strided":
            return torch.stack((tensor, torch.full_like(tensor, float("nan"))), -1)[..., 0]
        if layout == "transposed" and tensor.dim() > 1:
            return tensor.mT.contiguous().mT
        if layout == "offset":
            return torch.cat((tensor.new_full((1,), float("nan")), tensor.flatten()))[1:].view(tensor.shape)
        return tensor

    return case.map(lay_out)


def _spoil(case: Recurrent, chance: random.Random) -> tuple[str, Recurrent]:
    """The case with one thing wrong, and what that is."""
    names = list(case.tensors())
    name = chance.choice(names)
    tensor = case.tensors()[name]
    ways: dict[str, Callable[[], Recurrent]] = {
        f"{name} of another dtype": lambda: replace(
            case, **{name: tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)}
        ),
        f"{name} with one dimension more": lambda: replace(case, **{name: tensor.unsqueeze(0)}),
        f"{name} of no dimensions": lambda: replace(case, **{name: tensor.new_zeros(())}),
        f"{name} as a list": lambda: replace(case, **{name: tensor.tolist()}),
        f"{name} of whole numbers": lambda: replace(case, **{name: tensor.long()}),
    }
    if len(names) > 1 and tensor.shape[-1] > 0:
        ways[f"{name} one too wide"] = lambda: replace(case, **{name: torch.cat((tensor, tensor[..., :1]), -1)})
    if case.batch_sizes is None:
        seq_len, batch, _ = case.x.shape
        ones = torch.ones(batch, dtype=torch.int64)
        ways |= {
            "lengths of the wrong count": lambda: replace(case, lengths=torch.ones(batch + 1, dtype=torch.int64)),
            "lengths of float": lambda: replace(case, lengths=ones.float()),
            "reset_mask of int": lambda: replace(case, reset_mask=torch.ones(seq_len, batch, dtype=torch.int64)),
            "reset_mask one too long": lambda: replace(case, reset_mask=torch.ones(seq_len + 1, batch) > 0),
            "no steps": lambda: replace(case, x=case.x[:0], lengths=None, reset_mask=None),
        }
        if batch:
            bad = ones.clone()
            bad[chance.randrange(batch)] = chance.choice((-1, seq_len + 1, 2**62, -(2**62)))
            ways["a length out of range"] = lambda: replace(case, lengths=bad)
    else:
        sizes = case.batch_sizes
        bad_sizes = (sizes + 1, sizes[:0], torch.cat((sizes, sizes[:1])), sizes.float(), -sizes, sizes * 2**60)
        for index, bad_size in enumerate(bad_sizes):
            ways[f"batch_sizes {index}"] = lambda bad_size=bad_size: replace(case, batch_sizes=bad_size)
    what = chance.choice(list(ways))
    return what, ways[what]()


def check(call: Call) -> str:
    """Makes the call and says what it was, "valid" or "invalid"; AssertionError, naming the call, if it misbehaves."""
    if _native.module is not None and call.isa is not None:
        _native.module.set_cpu_isa(call.isa)
    if call.wrong is not None:
        return _check_error(call)
    try:
        _check_results(call)
    except Exception as error:
        raise AssertionError(f"{call}\n{type(error).__name__}: {error}") from error
    return "valid"


def _check_results(call: Call) -> None:
    case = call.case
    torch.set_num_threads(1)
    truth = forward_backward(run_reference, case.to(torch.float64))
    if case.x.dtype == torch.float64:
        same = scaled_to_float64(forward_backward(run_reference, case.to(torch.float32)), truth)
    else:
        same = forward_backward(run_reference, case)
    torch.set_num_threads(call.threads)
    check_all(forward_backward(run_fastlm, case), same, truth, scale=4.0)  # of the largest of what is drawn


def _check_error(call: Call) -> str:
    try:
        run_fastlm(call.case)
    except (TypeError, ValueError) as error:
        text = str(error)
        assert re.search(": expected .*got", text), f"{call}\nno clear error: {text!r}"
        return "invalid"
    except Exception as error:
        raise AssertionError(f"{call}\n{type(error).__name__} is no clear error: {error}") from error
    raise AssertionError(f"{call}\nno error at all")


def run(first: int, count: int) -> Iterator[Counter[str]]:
    """Checks the calls from number `first` on; yields after each how many of what kind there were."""
    threads, isa = torch.get_num_threads(), None if _native.module is None else _native.module.cpu_isa()
    seen: Counter[str] = Counter()
    try:
        for number in range(first, first + count):
            seen[check(draw(number))] += 1
            yield seen
    finally:
        torch.set_num_threads(threads)
        if isa is not None:
            _native.module.set_cpu_isa(isa)
