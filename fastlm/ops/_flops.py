"""What torch.utils.flop_counter.FlopCounterMode counts for the operations: their products, as it does for torch's."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula


def _products(x: Tensor, *weights: Tensor) -> int:
    """Of x's rows with every one of the weights; the gradient of either costs as much."""
    rows = x.numel() // max(1, x.shape[-1])
    return 2 * rows * sum(weight.numel() for weight in weights)


def _recurrent(a: Any) -> int:
    return _products(a.x, a.w_ih, a.w_hh)


def _recurrent_backward(a: Any) -> int:
    return _products(a.x, a.w_hh, *[a.w_ih] * a.need_x, *[a.w_ih, a.w_hh] * a.need_weights)


def _cross_entropy(a: Any) -> int:
    return _products(a.hidden, a.weight, *[a.weight] * (a.need_hidden + a.need_weight))


def _pairs(a: Any) -> int:
    """Queries times keys over all heads; like torch's, those that a mask excludes too."""
    q, k = a.q, a.k
    if a.q_starts is None:
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if isinstance(a.q_starts, FakeTensor):  # has no values: as if sequences were equally long
        return q.shape[1] * q.shape[0] * k.shape[0] // max(1, a.q_starts.shape[0] - 1)
    return q.shape[1] * int((a.q_starts.diff() * a.k_starts.diff()).sum())


_FORMULAS: dict[str, Callable[[Any], int]] = {
    "gru_forward": _recurrent,
    "gru_backward": _recurrent_backward,
    "lstm_forward": _recurrent,
    "lstm_backward": _recurrent_backward,
    "attention_forward": lambda a: 2 * _pairs(a) * (a.q.shape[-1] + a.v.shape[-1]),
    "attention_weights_forward": lambda a: 2 * _pairs(a) * (a.q.shape[-1] + a.v.shape[-1]),
    "attention_backward": lambda a: 2 * _pairs(a) * (3 * a.q.shape[-1] + 2 * a.v.shape[-1]),
    "linear_cross_entropy_forward": _cross_entropy,
    "linear_cross_entropy_backward": _cross_entropy,
    "gemm": lambda a: 2 * a.a.numel() * a.b.shape[0 if a.transpose_b else 1],
}


def _count(formula: Callable[[Any], int], defaults: dict[str, Any], *args: Any, out_val: Any) -> int:
    return formula(SimpleNamespace(**(defaults | dict(zip(defaults, args, strict=False)))))


for _name, _formula in _FORMULAS.items():
    _op = getattr(torch.ops.fastlm, _name)
    _defaults = {argument.name: argument.default_value for argument in _op.default._schema.arguments}
    register_flop_formula(_op, get_raw=True)(partial(_count, _formula, _defaults))
