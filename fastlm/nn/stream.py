"""Step by step through a GRU or LSTM stack, for inference: state inside, weights packed once."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastlm import _backend, _native, _trace, ops
from fastlm.nn._twin import read_weights
from fastlm.ops import _common

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
State = Any  # h, or (h, c)
# Forward pre-hooks that set weights from others: torch.nn.utils' before there were parametrisations, and pruning.
_COMPUTING_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
# As they are: a step would feel torch's own ways to them.
_increment_version = torch._C._increment_version
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Stream:
    """A GRU or LSTM that is fed one step, or a few, at a time and keeps its state (inference only).

    The whole stack is one call into C++. Weights are packed at construction: call `refresh()` after changing them.
    Whole, chunked and stepped sequences agree within rounding. One thread at a time may use a stream.

    Args:
        module (torch.nn.GRU, LSTM or fastlm.nn.GRU, LSTM): any number of layers, one direction, no projection, on the
            CPU; float32, float64 or bfloat16. `dropout` plays no part.
        batch (int): B, rows of every step.
        weight_dtype (torch.dtype, optional): torch.bfloat16 keeps the weights of a float32 module in bfloat16, half the
            memory to read in each step; all else stays float32. Default: the module's.

    Raises:
        TypeError: module is none of these.
        ValueError: it is bidirectional, has a projection, is not on the CPU, its weights do not have its sizes, or a
            number or dtype is impossible.

    Numerics: as the module's; with bfloat16 the cell state stays in float32 from step to step.

    Example:
        >>> stream = fastlm.nn.Stream(torch.nn.GRU(80, 256, num_layers=2), batch=1)
        >>> for frame in audio:  # (1, 80)
        ...     hidden = stream.step(frame)  # (1, 256)
    """

    def __init__(self, module: torch.nn.Module, batch: int, *, weight_dtype: torch.dtype | None = None) -> None:
        self._lstm = _check_module(module)
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected a whole number of at least 1, got {batch!r}")
        assert isinstance(module, torch.nn.RNNBase)
        self._module, self._batch = module, batch
        _compute_weights(module)
        self._packed = _check_weights(module)
        self._dtype = self._packed[0]
        if weight_dtype not in (None, self._dtype) and (self._dtype, weight_dtype) != (torch.float32, torch.bfloat16):
            raise ValueError(
                f"weight_dtype: expected None, {self._dtype}"
                f"{' or torch.bfloat16' if self._dtype == torch.float32 else ''}, got {weight_dtype}"
            )
        self._bfloat16_weights = weight_dtype == torch.bfloat16 and self._dtype == torch.float32
        self._batch_first = module.batch_first
        self._step_shape = (batch, module.input_size)
        self._out_shape = (batch, module.hidden_size)
        self._states_shape = (module.num_layers, batch, module.hidden_size)
        self._engine = self._make_engine()

    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """One step: x (B, I) -> output of the last layer (B, H), a fresh tensor unless `out` is given.

        Args:
            x (Tensor): (B, I), dtype of the module, on the CPU.
            out (Tensor, optional): (B, H), dense, dtype of the module: filled and returned, nothing is allocated. It
                may be x.

        Raises:
            ValueError: wrong shape, dtype or device, or an `out` that is not dense (it names the argument).
            RuntimeError: x or `out` requires a gradient while gradients are recorded, x has a tangent, or the call is
                being traced.
        """
        if (
            type(x) is not Tensor
            or x.shape != self._step_shape
            or x.dtype is not self._dtype
            or x.requires_grad
            or not x.is_cpu
            or forward_ad._current_level >= 0
            or _tracing_state() is not None
            or _dispatch_modes() > 0
        ):
            self._check_input(x, self._step_shape, "(B, I)")
        if out is None:
            out = torch.empty(self._out_shape, dtype=self._dtype, device="cpu")
        else:
            if (
                not isinstance(out, Tensor)
                or out.shape != self._out_shape
                or out.dtype is not self._dtype
                or out.requires_grad
                or not (out.is_cpu and out.is_contiguous())
                or out.is_neg()
            ):
                self._check_out(out)
            if not out.is_inference():  # autograd learns of the writing
                _increment_version((out,))
        self._engine.run(x if x.is_contiguous() and not x.is_neg() else _dense(x), out, 1)
        return out

    def chunk(self, x: Tensor) -> Tensor:
        """Some steps: x (T, B, I) -> (T, B, H); (B, T, I) -> (B, T, H) where the module is batch_first. T may be 0.

        Raises:
            ValueError, RuntimeError: as `step`.
        """
        layout = "(B, T, I)" if self._batch_first else "(T, B, I)"
        batch, input_size = self._step_shape
        expected = (batch, "T", input_size) if self._batch_first else ("T", batch, input_size)
        self._check_input(x, expected, layout)
        steps = _dense(x.transpose(0, 1) if self._batch_first else x)
        out = steps.new_empty(steps.shape[0], *self._out_shape)
        if steps.shape[0]:
            self._engine.run(steps, out, steps.shape[0])
        return out.transpose(0, 1) if self._batch_first else out

    def reset(self, rows: int | Iterable[int] | Tensor | None = None) -> None:
        """Sets states to zero: all, or those of some rows of the batch (numbers, or a bool mask (B,)).

        Raises:
            TypeError: rows are no whole numbers.
            IndexError: a row is not 0 to B - 1.
        """
        if isinstance(rows, Tensor):
            if rows.dtype == torch.bool:
                _common.check_shape("rows", rows, (self._batch,), "(B,)")
                rows = rows.nonzero().flatten()
            rows = rows.tolist()
        if rows is None:
            rows = range(self._batch)
        numbers = list(rows) if isinstance(rows, Iterable) else [rows]
        for row in numbers:
            if isinstance(row, bool) or not isinstance(row, int):
                raise TypeError(f"rows: expected whole numbers or a bool mask (B,), got {row!r}")
            if not 0 <= row < self._batch:
                raise IndexError(f"rows: expected 0 to {self._batch - 1} (B - 1), got {row}")
        for row in numbers:
            self._engine.reset(row)

    @property
    def state(self) -> State:
        """A copy of the states in the form of the module's hx: h (L, B, H), for an LSTM (h, c).

        c is float32 where the module is bfloat16. May be set to such values (or to None: zeros).
        """
        h = torch.empty(self._states_shape, dtype=self._dtype, device="cpu")
        c = torch.empty(self._states_shape, dtype=self._cell_dtype, device="cpu") if self._lstm else None
        self._engine.read_state(h, c)
        return (h, c) if self._lstm else h

    @state.setter
    def state(self, value: State) -> None:
        if value is None:
            return self.reset()
        if self._lstm and not (isinstance(value, tuple | list) and len(value) == 2):
            raise TypeError(f"state: expected a pair (h, c), got {type(value).__name__}")
        given = value if self._lstm else (value,)
        for name, tensor in zip(("h", "c"), given, strict=False):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"state: expected {name} to be a Tensor, got {type(tensor).__name__}")
            _common.check_shape(f"state: {name}", tensor, self._states_shape, "(L, B, H)")
        dtypes = (self._dtype, self._cell_dtype)
        h, *c = (_dense(t.detach().to("cpu", dtype)) for t, dtype in zip(given, dtypes, strict=False))
        self._engine.write_state(h, c[0] if c else None)
        return None

    def clone(self) -> "Stream":
        """A stream that goes on from here on its own; the packed weights are shared."""
        clone = object.__new__(Stream)
        clone.__dict__.update(self.__dict__, _engine=self._engine.clone())
        return clone

    def __copy__(self) -> "Stream":
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stream":
        clone = self.clone()
        clone._module = copy.deepcopy(self._module, memo)
        return clone

    def refresh(self) -> None:
        """Packs the module's weights again, after they changed; states stay.

        Raises:
            ValueError: their dtype, device or sizes are not what they were.
        """
        _compute_weights(self._module)
        found = _check_weights(self._module)
        if found != self._packed:
            told, got = ("{}, sizes (I, H, L) = {}".format(*of) for of in (self._packed, found))
            raise ValueError(f"refresh: expected weights of {told}, got {got}")
        state = self.state
        self._engine = self._make_engine()
        self.state = state

    def __repr__(self) -> str:
        weights = ", weight_dtype=torch.bfloat16" if self._bfloat16_weights else ""
        return f"Stream({self._module!r}, batch={self._batch}{weights})"

    def __reduce__(self) -> Any:
        raise TypeError("a Stream holds packed weights and cannot be pickled: pickle its module and its state")

    @property
    def _cell_dtype(self) -> torch.dtype:
        return torch.float32 if self._dtype == torch.bfloat16 else self._dtype

    def _make_engine(self) -> "_Kernels | _Reference":
        layers = [_four(read_weights(self._module, names)) for names in self._module._all_weights]
        if not _backend.has_kernels():
            return _Reference(
                self._lstm, self._bfloat16_weights, layers, self._states_shape, self._dtype, self._cell_dtype
            )
        return _Kernels(self._lstm, self._bfloat16_weights, layers, self._states_shape, self._dtype)

    def _check_input(self, x: Any, expected: tuple[object, ...], layout: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
        _common.check_shape("x", x, expected, layout)
        if x.dtype != self._dtype:
            raise ValueError(f"x: expected dtype {self._dtype} (the module's), got {x.dtype}")
        if not x.is_cpu:
            raise ValueError(f"x: expected a CPU tensor, got device {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("x: a Stream gives no gradients; call it under torch.no_grad() or use the module itself")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError("x: a Stream gives no tangents; use the module itself")
        if _tracing_state() is not None or (_dispatch_modes() > 0 and get_proxy_mode() is not None):
            raise RuntimeError("x: a Stream cannot be traced; use the module itself")

    def _check_out(self, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise TypeError(f"out: expected a Tensor, got {type(out).__name__}")
        _common.check_shape("out", out, self._out_shape, "(B, H)")
        if out.dtype != self._dtype:
            raise ValueError(f"out: expected dtype {self._dtype} (the module's), got {out.dtype}")
        if not (out.is_cpu and out.is_contiguous()) or out.is_neg():
            raise ValueError("out: expected a dense CPU tensor")
        if torch.is_grad_enabled():
            raise RuntimeError(
                "out: expected a Tensor without requires_grad, or torch.no_grad() around, got one that requires grad"
            )


class _Kernels:
    """The compiled stack, on addresses of dense tensors."""

    def __init__(
        self,
        lstm: bool,
        bfloat16_weights: bool,
        layers: Sequence[Sequence[Tensor | None]],
        states_shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> None:
        dense = [[None if w is None else _dense(w.detach()) for w in layer] for layer in layers]
        input_size = dense[0][0].shape[1]  # type: ignore[union-attr]
        _, batch, hidden = states_shape
        self._stream = _native.module.make_stream(  # type: ignore[union-attr]
            _DTYPES[dtype], lstm, bfloat16_weights, batch, input_size, hidden,
            [[0 if w is None else _address("module", w) for w in layer] for layer in dense],
        )  # fmt: skip
        self._run = self._stream.run

    def run(self, x: Tensor, out: Tensor, steps: int) -> None:
        if _trace.calls is not None:
            _trace.record("stream", None)
        self._run(x.data_ptr() or _address("x", x), out.data_ptr() or _address("out", out), steps)

    def read_state(self, h: Tensor, c: Tensor | None) -> None:
        self._stream.read_state(_address("state", h), 0 if c is None else _address("state", c))

    def write_state(self, h: Tensor, c: Tensor | None) -> None:
        self._stream.write_state(_address("state", h), 0 if c is None else _address("state", c))

    def reset(self, row: int) -> None:
        self._stream.reset(row)

    def clone(self) -> "_Kernels":
        clone = copy.copy(self)
        clone._stream = self._stream.clone()
        clone._run = clone._stream.run
        return clone


class _Reference:
    """The same in plain operations."""

    def __init__(
        self,
        lstm: bool,
        bfloat16_weights: bool,
        layers: list[list[Tensor | None]],
        states_shape: tuple[int, int, int],
        dtype: torch.dtype,
        cell_dtype: torch.dtype,
    ) -> None:
        self._lstm, self._dtype, self._cell_dtype = lstm, dtype, cell_dtype
        # Arithmetic in the cell's type; only h is rounded to the module's between steps. Copies, as if packed.
        self._layers = [
            [None if w is None else w.detach().to(cell_dtype, copy=True) for w in layer] for layer in layers
        ]
        for layer in self._layers if bfloat16_weights else ():
            for weight in layer[:2]:
                assert weight is not None
                weight.copy_(weight.bfloat16())
        self._h = torch.zeros(states_shape, dtype=cell_dtype, device="cpu")
        self._c = torch.zeros(states_shape, dtype=cell_dtype, device="cpu")

    @torch.no_grad()
    def run(self, x: Tensor, out: Tensor, steps: int) -> None:
        for t in range(steps):
            rows = x.view(steps, *x.shape[-2:])[t].to(self._cell_dtype)
            for i, weights in enumerate(self._layers):
                if self._lstm:
                    rows, self._c[i] = ops.lstm_cell(rows, (self._h[i], self._c[i]), *weights)  # type: ignore[arg-type]
                else:
                    rows = ops.gru_cell(rows, self._h[i], *weights)  # type: ignore[arg-type]
                rows = rows.to(self._dtype).to(self._cell_dtype)
                self._h[i] = rows
            out.view(steps, *out.shape[-2:])[t] = rows

    def read_state(self, h: Tensor, c: Tensor | None) -> None:
        h.copy_(self._h)
        if c is not None:
            c.copy_(self._c)

    def write_state(self, h: Tensor, c: Tensor | None) -> None:
        self._h.copy_(h)
        if c is not None:
            self._c.copy_(c)

    def reset(self, row: int) -> None:
        self._h[:, row] = 0
        self._c[:, row] = 0

    def clone(self) -> "_Reference":
        clone = copy.copy(self)
        clone._h, clone._c = self._h.clone(), self._c.clone()
        return clone


def _dense(tensor: Tensor) -> Tensor:
    """The values as they lie in memory, row by row."""
    return tensor.resolve_neg().contiguous()


def _address(name: str, tensor: Tensor) -> int:
    """Where a dense tensor's values lie; raises for one that has none, as of a mode or subclass that keeps shapes."""
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:
        raise ValueError(f"{name}: expected a tensor with memory of its own, got {type(tensor).__name__}")
    return address


def _check_module(module: Any) -> bool:
    """Whether it is an LSTM; raises where a Stream cannot run it."""
    if not isinstance(module, torch.nn.RNNBase) or module.mode not in ("GRU", "LSTM"):
        raise TypeError(f"module: expected a GRU or LSTM of torch.nn or fastlm.nn, got {type(module).__name__}")
    if module.bidirectional:
        raise ValueError(
            "module: expected one direction, got a bidirectional module: its steps need the whole sequence"
        )
    if module.proj_size:
        raise ValueError(f"module: expected no projection, got proj_size={module.proj_size}")
    return module.mode == "LSTM"


def _compute_weights(module: torch.nn.RNNBase) -> None:
    """Runs the hooks that make weights of others, which may have changed since the module's last call."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _COMPUTING_HOOKS):
            hook(module, ())


def _check_weights(module: torch.nn.RNNBase) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype of all weights and the sizes (I, H, L); raises where they differ or a Stream has no kernel for them."""
    layers = [read_weights(module, names) for names in module._all_weights]
    tensors = [weight for layer in layers for weight in layer]
    dtypes = {w.dtype for w in tensors}
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
        raise ValueError(f"module: expected weights of one of {', '.join(map(str, _DTYPES))}, got {dtypes}")
    if any(not w.is_cpu for w in tensors):
        raise ValueError(f"module: expected its weights on the CPU, got device {tensors[0].device}")
    sizes = (module.input_size, module.hidden_size, module.num_layers)
    _check_shapes(layers, sizes, 4 if module.mode == "LSTM" else 3)
    return dtypes.pop(), sizes


def _check_shapes(layers: list[list[Any]], sizes: tuple[int, ...], gates: int) -> None:
    """Raises unless weights have the shapes that the kernels, given addresses alone, will read."""
    width, hidden, count = sizes
    if len(layers) != count:
        raise ValueError(f"module: expected weights of {count} layers (num_layers), got {len(layers)}")
    for index, layer in enumerate(layers):
        w_ih, w_hh, *biases = layer
        _common.check_shape(f"module: weight_ih_l{index}", w_ih, (gates * hidden, width), f"({gates}H, *)")
        _common.check_shape(f"module: weight_hh_l{index}", w_hh, (gates * hidden, hidden), f"({gates}H, H)")
        for name, bias in zip(("ih", "hh"), biases, strict=False):
            _common.check_shape(f"module: bias_{name}_l{index}", bias, (gates * hidden,), f"({gates}H,)")
        width = hidden


def _four(weights: list[Any]) -> list[Any]:
    """w_ih, w_hh and both biases, None for one that is missing."""
    return [*weights, None, None][:4]
