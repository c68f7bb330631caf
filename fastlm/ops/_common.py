"""What every public function does before its op: checks, autocast, choice of back end."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlm import _backend

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_R = TypeVar("_R")


def check_shape(name: str, tensor: Tensor, expected: tuple[object, ...], layout: str) -> None:
    """Raises ValueError unless tensor has the expected shape; an entry that is a str stands for any size."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        not isinstance(want, str) and got != want for got, want in zip(shape, expected, strict=True)
    ):
        want = "(" + ", ".join(str(size) for size in expected) + ")"
        raise ValueError(f"{name}: expected shape {layout} = {want}, got {tuple(shape)}")


def check_same(tensors: dict[str, Tensor | None]) -> None:
    """Raises unless all tensors given share one floating dtype and one device; the first names both."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        assert first is not None
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name}: expected dtype {first.dtype} (that of {first_name}), got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} (that of {first_name}), got {tensor.device}")
    assert first is not None
    if not first.is_floating_point():
        raise ValueError(f"{first_name}: expected a floating-point dtype, got {first.dtype}")


def check_recurrent(
    gates: int,
    x: Tensor,
    states: dict[str, Tensor | None],
    weights: dict[str, Tensor | None],
) -> None:
    """Checks one layer and direction of a recurrence; weights holds w_ih, w_hh, b_ih, b_hh in this order."""
    check_same({"x": x, **states, **weights})
    w_ih, w_hh = weights["w_ih"], weights["w_hh"]
    assert w_ih is not None
    assert w_hh is not None
    if x.dim() != 3:
        raise ValueError(f"x: expected 3 dimensions (T, B, I), got shape {tuple(x.shape)}")
    seq_len, batch, input_size = x.shape
    if seq_len == 0:
        raise ValueError("x: expected at least one time step (T >= 1), got T = 0")
    if w_hh.dim() != 2:
        raise ValueError(f"w_hh: expected 2 dimensions ({gates}H, H), got shape {tuple(w_hh.shape)}")
    rows = gates * w_hh.shape[1]
    check_shape("w_hh", w_hh, (rows, w_hh.shape[1]), f"({gates}H, H)")
    check_shape("w_ih", w_ih, (rows, input_size), f"({gates}H, I)")
    for name in ("b_ih", "b_hh"):
        bias = weights[name]
        if bias is not None:
            check_shape(name, bias, (rows,), f"({gates}H,)")
    for name, state in states.items():
        if state is not None:
            check_shape(name, state, (batch, w_hh.shape[1]), "(B, H)")


def composed_path(*tensors: Tensor | None) -> bool:
    """True where derivatives need the op written out: `torch.func` transforms and forward-mode AD.

    An op with a registered backward would return a silent zero tangent there. This is no fallback.
    """
    if torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
        return True
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


class Plan(NamedTuple):
    """How one call runs: its inputs after casting, whether a kernel takes them, and the dtype of the results."""

    tensors: tuple[Any, ...]
    kernel: bool
    result_dtype: torch.dtype


def plan(what: str, tensors: tuple[Tensor | None, ...]) -> Plan:
    """Chooses path and dtype of one call by transforms, autocast, what is forced, device and dtype.

    Under autocast to bfloat16, and for bfloat16 inputs, the kernels compute in float32 and round the results.
    """
    x = tensors[0]
    assert x is not None
    dtype = _autocast_dtype(x) or x.dtype
    if composed_path(*tensors):
        return Plan(_cast(dtype, tensors), False, dtype)
    if _uses_reference(what, x.device.type, dtype):
        return Plan(_cast(dtype, tensors), False, dtype)
    return Plan(_cast(torch.float32 if dtype == torch.bfloat16 else dtype, tensors), True, dtype)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an active autocast asks for them, by the first; differentiable."""
    x = tensors[0]
    assert x is not None
    return _cast(_autocast_dtype(x) or x.dtype, tensors)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device_type = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if all(tensor is None or tensor.dtype == dtype for tensor in tensors):
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _uses_reference(what: str, device_type: str, dtype: torch.dtype) -> bool:
    if _backend.forced() == "reference":
        return True
    if device_type not in ("cpu", "meta"):
        _backend.fall_back(f"{what} has no kernel for device type {device_type!r}")
        return True
    if dtype not in KERNEL_DTYPES:
        _backend.fall_back(f"{what} has no kernel for {dtype}")
        return True
    return False


def requires_grad(*tensors: Tensor | None) -> bool:
    """True where autograd would record a call with these inputs."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def call(op: Callable[..., _R], record: bool, *args: object) -> _R:
    """Calls an op, skipping the autograd layer (several us) where nothing is to be recorded."""
    if record or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def contiguous_or_none(grad: Tensor | None) -> Tensor | None:
    """An incoming gradient in dense form: autograd may hand over zero strides."""
    return None if grad is None else grad.contiguous()


def recompute(function: Callable[[], _R]) -> _R:
    """Runs the reference so that autograd records it, for a backward that is itself to be differentiated."""
    with torch.enable_grad():
        return function()


def composed_grads(
    outputs: tuple[Tensor, ...],
    grad_outputs: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the needed inputs through a recorded reference call, differentiable where grad mode is on."""
    used = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return tuple(
        next(grads) if need and tensor is not None else None for tensor, need in zip(inputs, needed, strict=True)
    )
