"""Random calls of the public operations: valid ones, whose results the reference judges, and invalid ones, which must
give a clear error. `run` makes some of them; tests/fuzz/test_fuzz.py and `python -m tests.fuzz` (make fuzz) call it.

A call is drawn from a generator seeded with its number: `python -m tests.fuzz --call 4711` makes that one again.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from tests.fuzz import attention, recurrent
from tests.numerics import check_all, forward_backward, scaled_to_float64

# How to draw, spoil and run each.
FAMILIES: dict[str, Any] = {
    "gru": recurrent,
    "lstm": recurrent,
    "attention": attention,
    "attention_varlen": attention,
    "scaled_dot_product_attention": attention,
}
KINDS = ("gru", "lstm", *FAMILIES)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """One drawn call; `wrong` names what is wrong with it, None for a valid one."""

    number: int
    kind: str
    case: Any  # of the family's own type
    threads: int
    isa: str | None
    wrong: str | None

    def __str__(self) -> str:
        given = {field.name: getattr(self.case, field.name) for field in fields(self.case)}
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in given.items() if value is not None)
        return f"call {self.number}: {self.kind}, threads={self.threads}, isa={self.isa}, wrong={self.wrong}, {shown}"


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.dim() == 1 and not value.is_floating_point():
        return repr(value.tolist())
    return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"


def draw(number: int) -> Call:
    """The call of this number."""
    chance = random.Random(number)
    torch.manual_seed(number)
    kind = KINDS[number % len(KINDS)]
    family = FAMILIES[kind]
    case, wrong = family.draw(kind, number, chance.choice(DTYPES), chance), None
    if chance.random() < 0.3:
        wrong, case = family.spoil(case, chance)
    else:
        case = family.laid_out(case, chance)
    isas = [None] if _native.module is None else _native.module.cpu_isas()
    return Call(number, kind, case, chance.choice((1, 1, 2)), chance.choice(isas), wrong)


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
    case, family = call.case, FAMILIES[call.kind]
    torch.set_num_threads(1)
    truth = forward_backward(family.run_reference, case.to(torch.float64))
    if next(iter(case.tensors().values())).dtype == torch.float64:
        same = scaled_to_float64(forward_backward(family.run_reference, case.to(torch.float32)), truth)
    else:
        same = forward_backward(family.run_reference, case)
    torch.set_num_threads(call.threads)
    check_all(forward_backward(family.run_fastlm, case), same, truth, family.scale(case))


def _check_error(call: Call) -> str:
    try:
        FAMILIES[call.kind].run_fastlm(call.case)
    except (TypeError, ValueError) as error:
        if _names_an_argument(str(error), call.case):
            return "invalid"
        raise AssertionError(f"{call}\nno clear error: {error}") from error
    except Exception as error:
        raise AssertionError(f"{call}\n{type(error).__name__} is no clear error: {error}") from error
    raise AssertionError(f"{call}\nno error at all")


def _names_an_argument(text: str, case: Any) -> bool:
    said = re.match(r"([\w, ]+): expected .*got", text, re.DOTALL)
    return said is not None and {field.name for field in fields(case)}.issuperset(said[1].split(", "))


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
