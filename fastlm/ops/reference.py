"""Plain PyTorch truth of every operation: any dtype and device, differentiable any number of times, no speed ambition.

Used as the reference in tests and benchmarks, as the composed path under `torch.func` transforms, forward-mode AD and
double backward, and for what the kernels do not cover. bfloat16 is computed in float32 as in the kernels, h rounded
after every step.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastlm.ops._attention_options import Options

States = tuple[Tensor, ...]  # h, and c of an LSTM


def gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One GRU step: x (B, I), h (B, H) -> (B, H)."""
    return _gru_step(w_hh, b_hh, linear(x, w_ih, b_ih), (h,))[0]


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: x (B, I), h (B, H or P), c (B, H) -> new (h, c)."""
    h, c = _lstm_step(w_hh, b_hh, w_hr, linear(x, w_ih, b_ih), state)
    return h, c


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer and direction; see `fastlm.ops.gru`."""
    dtype = x.dtype
    x, h0, w_ih, w_hh, b_ih, b_hh = map(_widened, (x, h0, w_ih, w_hh, b_ih, b_hh))
    widths = (w_hh.shape[1],)
    step = _rounding(dtype, partial(_gru_step, w_hh, b_hh))
    (output,), (h_n,) = _unroll(
        x, (h0,), widths, partial(linear, weight=w_ih, bias=b_ih), step, lengths, batch_sizes, reset_mask, reverse
    )
    return output.to(dtype), h_n.to(dtype)


def lstm(
    x: Tensor,
    state: tuple[Tensor | None, Tensor | None],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """One LSTM layer and direction: output, (h_n, c_n), every c; see `fastlm.ops.lstm`."""
    dtype = x.dtype
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = map(_widened, (x, *state, w_ih, w_hh, b_ih, b_hh, w_hr))
    widths = (w_hh.shape[1], w_hh.shape[0] // 4)
    step = _rounding(dtype, partial(_lstm_step, w_hh, b_hh, w_hr))
    (output, cells), (h_n, c_n) = _unroll(
        x, (h0, c0), widths, partial(linear, weight=w_ih, bias=b_ih), step, lengths, batch_sizes, reset_mask, reverse
    )
    return output.to(dtype), (h_n.to(dtype), c_n.to(dtype)), cells.to(dtype)


def gemm(
    a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False, bias: Tensor | None = None
) -> Tensor:
    """op(a) @ op(b) of two matrices, plus bias (N,)."""
    product = torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)
    return product if bias is None else product + bias


def active_steps(seq_len: int, lengths: Tensor) -> Tensor:
    """(T, B) bool: which steps lie within a sequence.

    Raises:
        ValueError: a length is negative or above seq_len (not seen while compiling).
    """
    if not torch.compiler.is_compiling() and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > seq_len:
            raise ValueError(f"lengths: expected 0 to {seq_len} (T), got {low if low < 0 else high}")
    return torch.arange(seq_len, device=lengths.device)[:, None] < lengths


def packed_sizes(rows: int, batch_sizes: Tensor) -> list[int]:
    """Batch sizes as numbers.

    Raises:
        ValueError: they are not positive, grow, or do not sum up to rows.
    """
    sizes = [int(size) for size in batch_sizes.tolist()]
    if any(size < 1 for size in sizes):
        raise ValueError(f"batch_sizes: expected positive numbers, got {min(sizes)}")
    if sizes != sorted(sizes, reverse=True):
        raise ValueError(f"batch_sizes: expected numbers that never grow, got {sizes}")
    if sum(sizes) != rows:
        raise ValueError(f"batch_sizes: expected a sum of {rows} (the rows of x), got {sum(sizes)}")
    return sizes


def _gru_step(w_hh: Tensor, b_hh: Tensor | None, gates_x: Tensor, states: States) -> States:
    (h,) = states
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, -1)
    r = torch.sigmoid(r_x + r_h)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (n + z * (h - n),)


def _lstm_step(w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None, gates_x: Tensor, states: States) -> States:
    h, c = states
    i, f, g, o = (gates_x + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else linear(h, w_hr)), c


def _rounding(dtype: torch.dtype, step: Callable[[Tensor, States], States]) -> Callable[[Tensor, States], States]:
    """The step with h rounded to bfloat16 if that is the dtype; gradients pass as they are."""
    if dtype != torch.bfloat16:
        return step

    def rounded(gates_x: Tensor, states: States) -> States:
        h, *c = step(gates_x, states)
        return h + (h.to(dtype).to(h.dtype) - h).detach(), *c

    return rounded


def _widened(tensor: Any) -> Any:
    """bfloat16 as float32."""
    return tensor.float() if tensor is not None and tensor.dtype == torch.bfloat16 else tensor


def _unroll(
    x: Tensor,
    initial: Sequence[Tensor | None],
    widths: Sequence[int],
    project: Callable[[Tensor], Tensor],
    step: Callable[[Tensor, States], States],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset_mask: Tensor | None,
    reverse: bool,
) -> tuple[States, States]:
    """Every state after every step, and the last ones; step takes a step's projected input and the states."""
    sizes = None if batch_sizes is None else packed_sizes(x.shape[0], batch_sizes)
    batch = x.shape[1] if sizes is None else sizes[0]
    states = tuple(
        x.new_zeros(batch, width) if state is None else state for state, width in zip(initial, widths, strict=True)
    )
    if sizes is not None:
        run = _unroll_packed(project(x).split(sizes), states, step, reverse)
        return tuple(torch.cat(each) for each in run[0]), run[1]
    active = None if lengths is None else active_steps(x.shape[0], lengths.to(x.device))
    if active is not None:
        x = x.masked_fill(~active[..., None], 0)  # what stands there may be anything, NaN too
        reset_mask = None if reset_mask is None else reset_mask & active
    # unbind: the gradient of gates_x[t] would be of the size of gates_x, for every step.
    run = _unroll_padded(project(x).unbind(0), states, step, active, reset_mask, reverse)
    return tuple(torch.stack(each) for each in run[0]), run[1]


_Run = tuple[list[list[Tensor]], States]  # per kind of state, the one after every step in order of time; the last ones


def _unroll_padded(
    gates_x: Sequence[Tensor],
    states: States,
    step: Callable[[Tensor, States], States],
    active: Tensor | None,
    reset_mask: Tensor | None,
    reverse: bool,
) -> _Run:
    outputs: list[list[Tensor]] = [[] for _ in states]
    for t in _order(len(gates_x), reverse):
        starts = None if reset_mask is None else reset_mask[t][:, None]
        if starts is not None and not reverse:
            states = tuple(state.masked_fill(starts, 0) for state in states)
        new = step(gates_x[t], states)
        if active is not None:
            goes_on = active[t][:, None]
            kept = [torch.where(goes_on, after, before) for after, before in zip(new, states, strict=True)]
            new = tuple(state.masked_fill(~goes_on, 0) for state in new)
            states = tuple(kept)
        else:
            states = new
        for output, state in zip(outputs, new, strict=True):
            output.append(state)
        if starts is not None and reverse:
            states = tuple(state.masked_fill(starts, 0) for state in states)
    return [output[::-1] if reverse else output for output in outputs], tuple(state.clone() for state in states)


def _unroll_packed(
    gates_x: Sequence[Tensor], states: States, step: Callable[[Tensor, States], States], reverse: bool
) -> _Run:
    outputs: list[list[Tensor]] = [[] for _ in states]
    for t in _order(len(gates_x), reverse):
        size = gates_x[t].shape[0]
        new = step(gates_x[t], tuple(state[:size] for state in states))
        states = tuple(torch.cat((after, before[size:])) for after, before in zip(new, states, strict=True))
        for output, state in zip(outputs, new, strict=True):
            output.append(state)
    return [output[::-1] if reverse else output for output in outputs], tuple(state.clone() for state in states)


def _order(seq_len: int, reverse: bool) -> range:
    return range(seq_len - 1, -1, -1) if reverse else range(seq_len)


def attention(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Attention with all scores written out; given: its Options (`fastlm.ops.attention` says more)."""
    options = Options(*given)
    if options.q_starts is not None and options.k_starts is not None:
        return _packed_attention(q, k, v, options)
    output, lse, _ = _padded_attention(q, k, v, options)
    return output, lse


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, average: bool, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention`, and its weights (B, Hq, Tq, Tk), dropped ones 0, or their average over heads (B, Tq, Tk)."""
    output, lse, weights = _padded_attention(q, k, v, Options(*given))
    weights = weights.sum(1) / max(1, q.shape[1]) if average else weights
    return output, lse, weights.to(q.dtype)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and weights, the latter in the type of the arithmetic."""
    dtype = q.dtype
    _check_key_lengths(k, options.kv_lengths)
    factors = None
    if options.seed is not None:
        factors = dropout_factors(options.seed, options.dropout, q.shape[:3], k.shape[2])
    q, k, v, bias = map(_widened, (q, k, v, options.bias))
    output, lse, weights = _attend(q, k, v, options._replace(bias=bias), factors)
    return output.to(dtype), lse, weights


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    assert options.q_starts is not None
    assert options.k_starts is not None
    dtype = q.dtype
    q, k, v = map(_widened, (q, k, v))
    outputs, lses = [], []
    starts = [_checked_starts("q", options.q_starts, q.shape[0]), _checked_starts("k", options.k_starts, k.shape[0])]
    parts = [_sequences(x, at) for x, at in zip((q, k, v), (starts[0], starts[1], starts[1]), strict=True)]
    for b, (one, keys_of_one, values) in enumerate(zip(*parts, strict=True)):
        factors = None
        if options.seed is not None:
            shape = (q.shape[1], q.shape[0])
            factors = dropout_factors(options.seed, options.dropout, shape, keys_of_one.shape[2])
            factors = factors[:, starts[0][b] : starts[0][b + 1]]
        output, lse, _ = _attend(one, keys_of_one, values, options.of_sequence(b), factors)
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    past = q.shape[0] - starts[0][-1]
    outputs.append(q.new_zeros(past, q.shape[1], v.shape[2]))
    lses.append(q.new_zeros(q.shape[1], past))
    return torch.cat(outputs).to(dtype), torch.cat(lses, 1)


def _sequences(x: Tensor, starts: list[int]) -> list[Tensor]:
    """Packed rows (rows, H, D) as one (1, H, T, D) per sequence; by one split, whose gradient is one tensor."""
    lengths = [last - first for first, last in pairwise(starts)]
    *parts, _ = x.split([*lengths, x.shape[0] - starts[-1]])
    return [part.transpose(0, 1)[None] for part in parts]


def _check_key_lengths(k: Tensor, kv_lengths: Tensor | None) -> None:
    """Raises ValueError where a length is impossible (not seen while compiling)."""
    if kv_lengths is None or torch.compiler.is_compiling() or not kv_lengths.numel():
        return
    low, high = int(kv_lengths.min()), int(kv_lengths.max())
    if low < 0 or high > k.shape[2]:
        raise ValueError(f"kv_lengths: expected numbers from 0 to {k.shape[2]}, got {low if low < 0 else high}")


def _checked_starts(name: str, starts: Tensor, rows: int) -> list[int]:
    """Where packed sequences start, as numbers; ValueError where they do not rise from 0 to at most rows."""
    numbers = [int(start) for start in starts.tolist()]
    if numbers[0] != 0 or numbers != sorted(numbers) or numbers[-1] > rows:
        raise ValueError(f"cu_seqlens_{name}: expected rising numbers from 0 to at most {rows}, got {numbers}")
    return numbers


def _attend(q: Tensor, k: Tensor, v: Tensor, options: Options, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of sequences (B, H, T, D): output, lse and weights; factors: of these, for dropout."""
    k, v = (keys_within(x, q.shape[1], options.kv_lengths) for x in (k, v))
    scores, _ = attention_scores(q, k, options)
    weights, lse = softmax(scores)
    if factors is not None:
        weights = weights * factors.to(weights.dtype)
    return weights @ v, lse, weights


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over the last dimension, and the log-sum-exp; a row of -inf alone gives 0, -inf and no gradient.

    Not exp(scores - lse): beside large scores, as of rows masked by numbers like -1e9, lse loses all digits that count.
    """
    hidden = scores == -torch.inf
    blind = hidden.all(-1, keepdim=True)
    if not scores.shape[-1]:
        return scores, scores.sum(-1).masked_fill(blind[..., 0], -torch.inf)
    scores = scores.masked_fill(blind, 0)
    greatest = scores.detach().amax(-1, keepdim=True)
    greatest = greatest.masked_fill(greatest == torch.inf, 0)
    parts = torch.exp(scores - greatest)
    sums = parts.sum(-1, keepdim=True)
    lse = (greatest + sums.log()).masked_fill(blind, -torch.inf)
    return (parts / sums).masked_fill(hidden, 0), lse[..., 0]  # hidden: of rows with NaN too


def keys_within(x: Tensor, q_heads: int, kv_lengths: Tensor | None) -> Tensor:
    """Keys or values for every query head, 0 past a length, where they may be NaN."""
    if kv_lengths is not None:
        past = torch.arange(x.shape[2], device=x.device) >= kv_lengths.to(x.device)[:, None]
        x = x.masked_fill(past[:, None, :, None], 0)
    return x if q_heads == x.shape[1] else x.repeat_interleave(q_heads // x.shape[1], 1)


def attention_scores(q: Tensor, k: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The scores (B, H, Tq, Tk), -inf where a key is not seen; and the same as softcap left them."""
    q_len, k_len = q.shape[2], k.shape[2]
    lengths = torch.full((q.shape[0],), k_len, device=q.device) if options.kv_lengths is None else options.kv_lengths
    lengths = lengths.to(q.device).view(-1, 1, 1, 1)
    keys = torch.arange(k_len, device=q.device)
    position = torch.arange(q_len, device=q.device)[:, None] + (lengths - q_len if options.lower_right else 0 * lengths)
    seen = keys < lengths
    if options.left >= 0:
        seen = seen & (keys >= position - options.left)
    if options.right >= 0:
        seen = seen & (keys <= position + options.right)
    if options.keep is not None:
        seen = seen & options.keep
    scores = q @ k.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    capped = scores
    if options.slopes is not None:
        scores = scores - options.slopes.to(scores.dtype) * (position - keys).abs().to(scores.dtype)
    if options.bias is not None:
        scores = scores + options.bias
    return scores.masked_fill(~seen, -torch.inf), capped


def dropout_factors(seed: Tensor, dropout: float, shape: Sequence[int], k_len: int) -> Tensor:
    """0 or 1 / (1 - dropout) for every query, of the shape of lse, and key: (*shape, k_len), float64.

    By the hash of the kernels (csrc/cpu/kernels/attention_scores.inl).
    """
    rows = torch.arange(math.prod(shape), device="cpu").view(tuple(shape))

    def shifted(z: Tensor, bits: int) -> Tensor:  # of 64 bits, without the sign's
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    def signed(constant: int) -> int:
        return constant - (1 << 64) if constant >= 1 << 63 else constant

    low_bits = 0xFFFFFFFF
    z = seed.cpu() + signed(0x9E3779B97F4A7C15) * (rows + 1)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    z = z ^ shifted(z, 31)
    low, high = (z & low_bits)[..., None], shifted(z, 32)[..., None]
    x = (torch.arange(k_len, device=rows.device) + low) * 0x85EBCA6B & low_bits
    x = ((x ^ x >> 15) + high) * 0xC2B2AE35 & low_bits
    x = (x ^ x >> 13) * 0x27D4EB2F & low_bits
    x = x ^ x >> 16
    threshold = min(int(dropout * 4294967296.0), low_bits)
    return (x >= threshold).double() * (1 / (1 - dropout) if dropout < 1 else 0.0)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Each value times 0 or 1 / (1 - p), by the kernel's generator (csrc/cpu/kernels/dropout.inl)."""
    row = 65536
    factors = dropout_factors(seed, p, (-(-x.numel() // row),), min(row, x.numel()))
    factors = factors.flatten()[: x.numel()].view(x.shape).to(x.device, torch.promote_types(x.dtype, torch.float32))
    return (x * factors).to(x.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Output layer and loss over rows (R, D); see `fastlm.ops.linear_cross_entropy`."""
    hidden, weight, bias = map(_widened, (hidden, weight, bias))
    # A row that does not count must not reach the gradients, by a NaN of its own for one.
    hidden = hidden.masked_fill((target == ignore_index)[:, None], 0)
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    return cross_entropy(linear(hidden, weight, bias), target, label_smoothing=label_smoothing, **options)


def gelu(x: Tensor) -> Tensor:
    """See `fastlm.ops.gelu`."""
    return torch.nn.functional.gelu(x, approximate="tanh")
