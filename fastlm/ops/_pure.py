"""The ops' CPU implementation where the extension is missing: the reference, with the derivatives written out.

They cannot come from autograd, for these functions run below it. No speed ambition.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlm.ops import _schema, reference
from fastlm.ops._attention_options import Options


class _Steps:
    """The steps of a call on padded tensors: which sequences each has, and where they start anew."""

    def __init__(
        self,
        x: Tensor,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        reset_mask: Tensor | None,
        reverse: bool,
    ) -> None:
        self.reverse = reverse
        self.packed = x.dim() == 2
        self.one_step = self.packed and batch_sizes is None
        if self.packed:  # one step is packed rows too
            sizes = [x.shape[0]] if batch_sizes is None else reference.packed_sizes(x.shape[0], batch_sizes)
            self.active: Tensor | None = torch.arange(sizes[0]) < torch.tensor(sizes)[:, None]
        else:
            self.active = None if lengths is None else reference.active_steps(x.shape[0], lengths)
        self.resets = reset_mask
        if self.active is not None and reset_mask is not None:
            self.resets = reset_mask & self.active

    def pad(self, rows: Tensor) -> Tensor:
        """Rows of a call's tensor as (T, B, *), zero where a sequence has no step."""
        if self.active is None:
            return rows
        if not self.packed:
            return rows.masked_fill(~self.active[..., None], 0)
        padded = rows.new_zeros(*self.active.shape, rows.shape[-1])
        padded[self.active] = rows
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """(T, B, *) as the rows of a call's tensor."""
        if self.packed:
            assert self.active is not None
            return padded[self.active]
        return self.pad(padded)

    def form(self, state: Tensor) -> Tensor:
        """A copy of a last state (B, H) in the form of the op's."""
        return state.clone() if self.one_step else state.clone().unsqueeze_(0)

    def order(self, seq_len: int, backward: bool = False) -> Iterator[int]:
        """Times in the order of forward or of backward."""
        return iter(range(seq_len - 1, -1, -1) if self.reverse != backward else range(seq_len))

    def keep(self, t: int, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
        """The new values of the sequences that have this step, the old ones of the rest."""
        if self.active is None:
            return list(new)
        goes_on = self.active[t][:, None]
        return [torch.where(goes_on, after, before) for after, before in zip(new, old, strict=True)]

    def reset(self, t: int, before_step: bool, tensors: Sequence[Tensor]) -> list[Tensor]:
        """States (forward) or their gradients (backward) cut where a segment starts at this side of the step."""
        if self.resets is None or before_step == self.reverse:
            return list(tensors)
        return [tensor.masked_fill(self.resets[t][:, None], 0) for tensor in tensors]


def _zeros_or(state: Tensor | None, x: Tensor, hidden: int) -> Tensor:
    return x.new_zeros(x.shape[1], hidden) if state is None else state.reshape(x.shape[1], hidden)


def _sum_of_products(grad_gates: Tensor, inputs: Tensor) -> Tensor:
    """Sum over steps of grad_gates[t]^T inputs[t]: each of its own (no addmm), since one long sum loses accuracy."""
    total = grad_gates.new_zeros(grad_gates.shape[2], inputs.shape[2])
    for gates, rows in zip(grad_gates, inputs, strict=True):
        total += gates.mT @ rows
    return total


def gru_forward(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reserve: (T, B, 5H) of r, z, n, U_n h + b_hn, h before the step."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x = steps.pad(x)
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    gates_x = linear(x, w_ih, b_ih)
    output = x.new_empty(seq_len, batch, hidden)
    reserve = x.new_empty(seq_len, batch, 5 * hidden)
    h = _zeros_or(h0, x, hidden)
    for t in steps.order(seq_len):
        (h,) = steps.reset(t, True, (h,))
        r_x, z_x, n_x = gates_x[t].chunk(3, -1)
        r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, -1)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + r * n_h)
        torch.cat((r, z, n, n_h, h), -1, out=reserve[t])
        output[t] = n + z * (h - n)
        (h,) = steps.reset(t, False, steps.keep(t, (output[t],), (h,)))
    return steps.unpad(output).contiguous(), steps.form(h), steps.unpad(reserve) if save else x.new_empty(0)


def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset_mask: Tensor | None,
    reserve: Tensor,
    reverse: bool,
    need_x: bool,
    need_weights: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gru_forward`; one that is not needed is empty."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x, reserve = steps.pad(x), steps.pad(reserve)
    grad_output = None if grad_output is None else steps.pad(grad_output)
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    grad_gates_x = x.new_zeros(seq_len, batch, 3 * hidden)
    grad_gates_h = x.new_zeros(seq_len, batch, 3 * hidden)
    carry = _zeros_or(grad_h_n, x, hidden)
    for t in steps.order(seq_len, backward=True):
        (carry,) = steps.reset(t, False, (carry,))
        r, z, n, n_h, h = reserve[t].chunk(5, -1)
        grad = carry if grad_output is None else carry + grad_output[t]
        (grad,) = steps.keep(t, (grad,), (torch.zeros_like(grad),))
        grad_n = grad * (1 - z) * (1 - n * n)
        grad_z = grad * (h - n) * z * (1 - z)
        grad_r = grad_n * n_h * r * (1 - r)
        torch.cat((grad_r, grad_z, grad_n), -1, out=grad_gates_x[t])
        torch.cat((grad_r, grad_z, grad_n * r), -1, out=grad_gates_h[t])
        (carry,) = steps.reset(t, True, steps.keep(t, (grad * z + grad_gates_h[t] @ w_hh,), (carry,)))
    empty = x.new_empty(0)
    return (
        steps.unpad(grad_gates_x @ w_ih) if need_x else empty,
        empty.clone() if state is None else carry.clone().reshape(state.shape),
        _sum_of_products(grad_gates_x, x) if need_weights else empty.clone(),
        _sum_of_products(grad_gates_h, reserve[..., 4 * hidden :]) if need_weights else empty.clone(),
        grad_gates_x.sum(1).sum(0) if need_bias else empty.clone(),
        grad_gates_h.sum(1).sum(0) if need_bias else empty.clone(),
    )


def lstm_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
    all_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reserve: (T, B, 6H) of i, f, g, o, c before the step, h before the step."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x = steps.pad(x)
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    gates_x = linear(x, w_ih, b_ih)
    output, cells = x.new_empty(seq_len, batch, hidden), x.new_empty(seq_len, batch, hidden)
    reserve = x.new_empty(seq_len, batch, 6 * hidden)
    h, c = _zeros_or(h0, x, hidden), _zeros_or(c0, x, hidden)
    for t in steps.order(seq_len):
        h, c = steps.reset(t, True, (h, c))
        i, f, g, o = (gates_x[t] + linear(h, w_hh, b_hh)).chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        torch.cat((i, f, g, o, c, h), -1, out=reserve[t])
        cells[t] = f * c + i * g
        output[t] = o * torch.tanh(cells[t])
        h, c = steps.reset(t, False, steps.keep(t, (output[t], cells[t]), (h, c)))
    return (
        steps.unpad(output).contiguous(),
        steps.form(h),
        steps.form(c),
        steps.unpad(cells) if all_cells else x.new_empty(0),
        steps.unpad(reserve) if save else x.new_empty(0),
    )


def lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset_mask: Tensor | None,
    reserve: Tensor,
    reverse: bool,
    need_x: bool,
    need_weights: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lstm_forward`; one that is not needed is empty."""
    steps = _Steps(x, lengths, batch_sizes, reset_mask, reverse)
    x, reserve = steps.pad(x), steps.pad(reserve)
    arriving = [None if grad is None else steps.pad(grad) for grad in (grad_output, grad_cells)]
    seq_len, batch, _ = x.shape
    hidden = w_hh.shape[1]
    grad_gates = x.new_zeros(seq_len, batch, 4 * hidden)
    grad_h, grad_c = _zeros_or(grad_h_n, x, hidden), _zeros_or(grad_c_n, x, hidden)
    for t in steps.order(seq_len, backward=True):
        grad_h, grad_c = steps.reset(t, False, (grad_h, grad_c))
        i, f, g, o, c, _ = reserve[t].chunk(6, -1)
        tanh_c = torch.tanh(f * c + i * g)
        sums = [grad if add is None else grad + add[t] for grad, add in zip((grad_h, grad_c), arriving, strict=True)]
        grad, d_c = steps.keep(t, sums, [torch.zeros_like(each) for each in sums])
        d_c = d_c + grad * o * (1 - tanh_c * tanh_c)
        grad_i, grad_f = d_c * g * i * (1 - i), d_c * c * f * (1 - f)
        grad_g, grad_o = d_c * i * (1 - g * g), grad * tanh_c * o * (1 - o)
        torch.cat((grad_i, grad_f, grad_g, grad_o), -1, out=grad_gates[t])
        carried = steps.keep(t, (grad_gates[t] @ w_hh, d_c * f), (grad_h, grad_c))
        grad_h, grad_c = steps.reset(t, True, carried)
    empty = x.new_empty(0)
    return (
        steps.unpad(grad_gates @ w_ih) if need_x else empty,
        empty.clone() if state is None else grad_h.clone().reshape(state.shape),
        empty.clone() if state is None else grad_c.clone().reshape(state.shape),
        _sum_of_products(grad_gates, x) if need_weights else empty.clone(),
        _sum_of_products(grad_gates, reserve[..., 5 * hidden :]) if need_weights else empty.clone(),
        grad_gates.sum(1).sum(0) if need_bias else empty.clone(),
    )


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """As the kernel's, in its order of dimensions in memory."""
    output, lse = reference.attention(q, k, v, *options)
    return _in_order_of(q, output), lse


def attention_weights_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel's, with the weights."""
    if any(given is not None for given in options[7:9]):
        raise ValueError("q_starts: expected none, for packed sequences give no weights")
    output, lse, weights = reference.attention_with_weights(q, k, v, *options)
    return _in_order_of(q, output), lse, weights


def _in_order_of(like: Tensor, made: Tensor) -> Tensor:
    inner_heads = like.dim() == 4 and like.stride(1) < like.stride(2)
    return made.transpose(1, 2).contiguous().transpose(1, 2) if inner_heads else made.contiguous()


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_forward`."""
    options, need_bias = Options.split_last(given)
    factors = None
    if options.q_starts is None or options.k_starts is None:
        if options.seed is not None:
            factors = reference.dropout_factors(options.seed, options.dropout, q.shape[:3], k.shape[2])
        *grads, grad_scores = _attention_grads(grad_output, grad_lse, q, k, v, output, options, factors)
        bias = options.bias if need_bias else None
        grad_bias = lse.new_empty(0) if bias is None else grad_scores.sum_to_size(bias.shape)
        return (*map(_in_order_of, (q, k, v), grads), grad_bias)  # type: ignore[return-value]
    whole = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    q_ranges, k_ranges = (pairwise(starts.tolist()) for starts in (options.q_starts, options.k_starts))
    for b, ((first, last), (key, end)) in enumerate(zip(q_ranges, k_ranges, strict=True)):
        rows = (slice(first, last), slice(key, end), slice(key, end))
        if options.seed is not None:
            factors = reference.dropout_factors(options.seed, options.dropout, lse.shape, end - key)[:, first:last]
        q_b, k_b, v_b, grad_b, output_b = (
            x[part].transpose(0, 1)[None]
            for x, part in ((q, rows[0]), (k, rows[1]), (v, rows[2]), (grad_output, rows[0]), (output, rows[0]))
        )
        grad_lse_b = None if grad_lse is None else grad_lse[None, :, first:last]
        one = options.of_sequence(b)
        *grads, _ = _attention_grads(grad_b, grad_lse_b, q_b, k_b, v_b, output_b, one, factors)
        for into, part, grad in zip(whole, rows, grads, strict=True):
            into[part] = grad[0].transpose(0, 1)
    return (*whole, lse.new_empty(0))  # type: ignore[return-value]


def _attention_grads(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    options: Options,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the scores of one batch (B, H, T, D)."""
    group = (k.shape[1], q.shape[1] // max(k.shape[1], 1))
    k, v = (reference.keys_within(x, q.shape[1], options.kv_lengths) for x in (k, v))
    scores, capped = reference.attention_scores(q, k, options)
    weights, _ = reference.softmax(scores)
    grad_weights = grad_output @ v.mT
    delta = (grad_output * output).sum(-1)
    kept = weights
    if factors is not None:
        grad_weights, kept = grad_weights * factors.to(q.dtype), weights * factors.to(q.dtype)
    grad_scores = weights * (grad_weights - (delta if grad_lse is None else delta - grad_lse)[..., None])
    grad_products = grad_scores * options.scale
    if options.softcap:
        grad_products = grad_products * (1 - (capped / options.softcap).square())
    grad_k, grad_v = (grad.unflatten(1, group).sum(2) for grad in (grad_products.mT @ q, kept.mT @ grad_output))
    return grad_products @ k, grad_k, grad_v, grad_scores


def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    *needed: bool,
) -> tuple[Tensor, ...]:
    """As the kernel's; `statistics` are those of rows that do not count as well."""
    live = target != ignore_index
    bad = live & ((target < 0) | (target >= weight.shape[0]))
    if bad.any():
        raise ValueError(
            f"target: expected class indices from 0 to {weight.shape[0] - 1}, or ignore_index = "
            f"{ignore_index}, got {int(target[bad][0])} at index {int(bad.nonzero()[0])}"
        )
    logits = linear(hidden, weight, bias)
    greatest = logits.amax(1)
    above = logits - greatest[:, None]
    sums = above.exp().sum(1)
    chosen = above.gather(1, target.where(live, 0)[:, None])[:, 0]
    losses = sums.log() - (1 - label_smoothing) * chosen
    if label_smoothing:
        losses = losses - label_smoothing * above.mean(1)
    losses = losses.masked_fill(~live, 0)
    loss = losses if reduction == 0 else losses.sum() / (live.sum() if reduction == 1 else 1)
    statistics = torch.stack([greatest, sums])
    if not any(needed):
        return loss, statistics, *(hidden.new_empty(0) for _ in needed)
    arriving = torch.ones_like(losses) / (live.sum() if reduction == 1 else 1)
    grads = linear_cross_entropy_backward(
        arriving, hidden, weight, bias, target, statistics, ignore_index, label_smoothing, *needed
    )
    return loss, statistics, *grads


def linear_cross_entropy_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    *needed: bool,
) -> tuple[Tensor, ...]:
    """As the kernel's."""
    live = target != ignore_index
    hidden, statistics = hidden[live], statistics[:, live]
    softmax = (linear(hidden, weight, bias) - statistics[0, :, None]).exp() / statistics[1, :, None]
    grads = softmax - label_smoothing / weight.shape[0]
    grads[torch.arange(len(grads)), target[live]] -= 1 - label_smoothing
    grads = grads * grad_losses[live][:, None]
    grad_hidden = torch.zeros(*target.shape, weight.shape[1], dtype=hidden.dtype)
    grad_hidden[live] = grads @ weight
    made = (grad_hidden, grads.mT @ hidden, grads.sum(0))
    return tuple(grad if need else hidden.new_empty(0) for grad, need in zip(made, needed, strict=True))


def gelu_backward(grad_output: Tensor, x: Tensor) -> Tensor:
    """As the kernel's."""
    return torch.ops.aten.gelu_backward(grad_output, x, approximate="tanh")


def _implementation(
    function: Callable[..., tuple[Tensor, ...]], keeps: Callable[[int, Tensor], bool]
) -> Callable[..., Any]:
    """bfloat16 is computed in float32, which result i stays in where keeps(i, result) says so: lse, a kept reserve.

    Without autocast: the casts are made before the op; one around the call would make more of them in here.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        narrow = any(isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 for arg in args)
        with torch.autocast("cpu", enabled=False):
            if not narrow:
                return function(*args)
            wide = (a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args)
            results = function(*wide)
        return tuple(result if keeps(i, result) else result.bfloat16() for i, result in enumerate(results))

    return run


def register() -> None:
    """Makes these functions the CPU implementation of the ops."""
    rules: dict[Callable[..., Any], Callable[[int, Tensor], bool]] = {
        gru_forward: lambda i, result: i == 2 and result.numel() > 0,
        lstm_forward: lambda i, result: i == 4 and result.numel() > 0,
        gru_backward: lambda i, result: False,
        lstm_backward: lambda i, result: False,
        attention_forward: lambda i, result: i == 1,
        attention_weights_forward: lambda i, result: i == 1,
        attention_backward: lambda i, result: i == 3,
        linear_cross_entropy_forward: lambda i, result: i < 2,
        linear_cross_entropy_backward: lambda i, result: False,
    }
    for function, keeps in rules.items():
        _schema.LIBRARY.impl(function.__name__, _implementation(function, keeps), "CPU")
    _schema.LIBRARY.impl("gelu_forward", reference.gelu, "CPU")
    _schema.LIBRARY.impl("gelu_backward", gelu_backward, "CPU")
    _schema.LIBRARY.impl("dropout", reference.dropout, "CPU")
    _schema.LIBRARY.impl("gemm", reference.gemm, "CPU")
