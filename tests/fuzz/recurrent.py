"""Random calls of `gru` and `lstm`."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch

from tests.fuzz.layouts import lay_out
from tests.numerics import Recurrent, make_recurrent, run_fastlm, run_reference

__all__ = ["draw", "laid_out", "run_fastlm", "run_reference", "scale", "spoil"]

# Sizes at which something changes: nothing, one, around vectors and tiles, beyond what is read in place.
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 31, 33, 48, 65)
BATCHES = (0, *SIZES)
STEPS = (1, 1, 1, 2, 2, 3, 4, 5, 6, 9, 13, 20)


def draw(kind: str, number: int, dtype: torch.dtype, chance: random.Random) -> Recurrent:
    seq_len, batch = chance.choice(STEPS), chance.choice(BATCHES)
    case = make_recurrent(
        kind, seq_len, batch, chance.choice(SIZES), chance.choice(SIZES), dtype=dtype,
        bias=chance.choice(("both", "both", "ih", "hh", "none")), reverse=chance.random() < 0.5, seed=number,
        state=chance.choice(("both", "both", "none", "h0", "c0")),
    )  # fmt: skip
    return replace(_with_sequences(case, chance), all_states=kind == "lstm" and chance.random() < 0.3)


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


def scale(case: Recurrent) -> float:
    """The size of the largest of what is drawn, or of sums of it: gradients of weights add up all rows."""
    if case.x.dtype == torch.bfloat16:  # its sums are of float32
        return 4.0
    return max(4.0, 2 * math.sqrt(case.x.shape[:-1].numel()))


def laid_out(case: Recurrent, chance: random.Random) -> Recurrent:
    return case.map(lambda _, tensor: lay_out(tensor, chance))


def spoil(case: Recurrent, chance: random.Random) -> tuple[str, Recurrent]:
    """The case with one thing wrong, and what that is."""
    names = list(case.tensors())
    name = chance.choice(names)
    tensor = case.tensors()[name]
    ways: dict[str, Callable[[], Recurrent]] = {
        f"{name} of another dtype": lambda: replace(
            case, **{name: tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)}
        ),
        # Of states two, for one more is a module's form.
        f"{name} with dimensions more": lambda: replace(
            case, **{name: tensor[None, None] if name in ("h0", "c0") else tensor[None]}
        ),
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
