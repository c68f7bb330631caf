"""What every public function does before its op: checks, autocast, choice of back end."""

import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlm import _backend, _native, _trace
from fastlm.ops import reference

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_functorch_level = torch._C._functorch.maybe_current_level
_R = TypeVar("_R")


def check_shape(name: str, tensor: Tensor, expected: tuple[object, ...], layout: str) -> None:
    """Raises ValueError unless tensor has the expected shape; an entry that is a str stands for any size."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        not isinstance(want, str) and got != want for got, want in zip(shape, expected, strict=True)
    ):
        want = "(" + ", ".join(str(size) for size in expected) + ("," if len(expected) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {layout} = {want}, got {tuple(shape)}")


def check_same(tensors: Mapping[str, Tensor | None], optional: tuple[str, ...] = ()) -> None:
    """Raises unless all share the first's floating dtype and device; only those named optional may be None."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        assert first is not None
        if tensor.dtype != first.dtype and not _autocast_unites(tensor, first):
            raise ValueError(f"{name}: expected dtype {first.dtype} (that of {first_name}), got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} (that of {first_name}), got {tensor.device}")
        if tensor.is_nested or tensor.layout != torch.strided:
            kind = "a nested tensor" if tensor.is_nested else tensor.layout
            raise ValueError(f"{name}: expected a dense tensor (torch.strided), got {kind}")
    assert first is not None
    if not first.is_floating_point():
        raise ValueError(f"{first_name}: expected a floating-point dtype, got {first.dtype}")


def check_recurrent(gates: int, tensors: dict[str, Any], sequences: "Sequences") -> None:
    """Checks the tensors of one layer and direction: x, states (h0, c0) and weights by name, w_hr for a projection.

    Beside sequences as of `check_sequences`, x may be (B, I), one step's. States may have a module's form (1, B, H).
    """
    check_same(tensors, optional=("h0", "c0", "b_ih", "b_hh"))
    x, w_hh, w_hr = tensors["x"], tensors["w_hh"], tensors.get("w_hr")
    batch, input_size = x.shape[-2:]
    if x.dim() == 3 and x.shape[0] == 0:
        raise ValueError("x: expected at least one time step (T >= 1), got T = 0")
    if sequences.batch_sizes is not None:
        batch = "B" if torch.compiler.is_compiling() else int(sequences.batch_sizes[0])
    width_name = "H" if w_hr is None else "P"
    for name, tensor, layout in (("w_hh", w_hh, f"({gates}H, {width_name})"), ("w_hr", w_hr, "(P, H)")):
        if tensor is not None and tensor.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions {layout}, got shape {tuple(tensor.shape)}")
    width, hidden = (w_hh.shape[1], w_hh.shape[1]) if w_hr is None else w_hr.shape
    states = [tensors[name] for name in ("h0", "c0") if tensors.get(name) is not None]
    layered, one = ((1,), "1, ") if states and states[0].dim() == 3 else ((), "")
    expected = {
        "w_hh": ((gates * hidden, width), f"({gates}H, {width_name})"),
        "w_ih": ((gates * hidden, input_size), f"({gates}H, I)"),
        "b_ih": ((gates * hidden,), f"({gates}H,)"),
        "b_hh": ((gates * hidden,), f"({gates}H,)"),
        "h0": ((*layered, batch, width), f"({one}B, {width_name})"),
        "c0": ((*layered, batch, hidden), f"({one}B, H)"),
    }
    for name, (shape, layout) in expected.items():
        tensor = tensors.get(name)
        if tensor is not None:
            check_shape(name, tensor, shape, layout)


class Sequences(NamedTuple):
    """Which steps the sequences of a call have, as the ops take it."""

    lengths: Tensor | None
    batch_sizes: Tensor | None
    reset_mask: Tensor | None


ALL_STEPS = Sequences(None, None, None)


def unless_default(sequences: Sequences, reverse: bool) -> tuple[Any, ...]:
    """Arguments of a forward op; none where its defaults say the same, for each takes time."""
    return () if sequences is ALL_STEPS and not reverse else (*sequences, reverse)


def check_sequences(x: Any, lengths: Any, batch_sizes: Any, reset_mask: Any) -> Sequences:
    """Checks what a caller says about sequences; the values of lengths and batch_sizes are the kernel's to check.

    Raises:
        TypeError: not a Tensor (or, for lengths and batch_sizes, a list of int).
        ValueError: wrong shape or dtype, or two that exclude each other.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if batch_sizes is None and x.dim() != 3:
        raise ValueError(f"x: expected 3 dimensions (T, B, I), got shape {tuple(x.shape)}")
    if lengths is None and batch_sizes is None and reset_mask is None:
        return ALL_STEPS
    if batch_sizes is not None:
        for name, other in (("lengths", lengths), ("reset_mask", reset_mask)):
            if other is not None:
                raise ValueError(f"{name}: expected None together with batch_sizes")
        if x.dim() != 2:
            raise ValueError(f"x: expected 2 dimensions (rows, I) with batch_sizes, got shape {tuple(x.shape)}")
        sizes = integers("batch_sizes", batch_sizes)
        check_shape("batch_sizes", sizes, ("T",), "(T,)")
        if sizes.shape[0] == 0:
            raise ValueError("batch_sizes: expected at least one time step, got none")
        return Sequences(None, sizes, None)
    if lengths is not None:
        lengths = integers("lengths", lengths)
        check_shape("lengths", lengths, (x.shape[1],), "(B,)")
    if reset_mask is not None:
        if not isinstance(reset_mask, Tensor):
            raise TypeError(f"reset_mask: expected a Tensor, got {type(reset_mask).__name__}")
        if reset_mask.dtype != torch.bool:
            raise ValueError(f"reset_mask: expected dtype torch.bool, got {reset_mask.dtype}")
        check_shape("reset_mask", reset_mask, tuple(x.shape[:2]), "(T, B)")
        reset_mask = reset_mask.to(x.device)
    return Sequences(lengths, None, reset_mask)


def integers(name: str, values: Any) -> Tensor:
    """A tensor or list of whole numbers as int64 on the CPU."""
    if isinstance(values, list | tuple):
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise TypeError(f"{name}: expected whole numbers, got {values}")
        try:
            return torch.tensor(values, dtype=torch.int64, device="cpu")
        except (RuntimeError, ValueError):
            raise ValueError(f"{name}: expected integers that fit in int64, got {values}") from None
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a Tensor or a list of int, got {type(values).__name__}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, got {values.dtype}")
    return values.to("cpu", torch.int64)


def packed_state(x: Tensor, batch_sizes: Tensor, width: int) -> Tensor:
    """The zeros that stand for a missing first state of packed rows, whose batch only their sizes tell."""
    if not torch.compiler.is_compiling():
        reference.packed_sizes(x.shape[0], batch_sizes)  # a wrong one may be of any size
    return x.new_zeros(int(batch_sizes[0]), width)


def check_step_input(x: Any) -> None:
    """Raises unless x is a Tensor (B, I), the input of one step."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 dimensions (B, I), got shape {tuple(x.shape)}")


def is_plain(x: Any, *others: Any) -> bool:
    """True where nothing but the kernel can be meant: eager, CPU tensors of its dtypes, nothing forced.

    The op then checks its arguments itself, so that a call of one step does not spend its time on checks.
    """
    if _native.module is None:  # the pure implementation checks nothing
        return False
    for tensor in others:
        if tensor is not None and not (type(tensor) in PLAIN_TYPES and tensor.is_cpu):
            return False
    return (
        type(x) in PLAIN_TYPES
        and x.dtype in KERNEL_DTYPES
        and x.is_cpu
        and _backend._forced is None
        and _trace.calls is None
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _functorch_level() is None
        and forward_ad._current_level < 0
    )


@_backend.constant_while_compiling
def _transforms() -> bool:
    """True under a transform of `torch.func`; while compiling too, which traces what stands under one by itself."""
    return _functorch_level() is not None


def composed_path(*tensors: Tensor | None) -> bool:
    """True where derivatives need the op in plain PyTorch: `torch.func` transforms and forward-mode AD.

    An op with a registered backward would return a silent zero tangent there. This is no fallback.
    """
    if _transforms():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


class Plan(NamedTuple):
    """How one call runs: its inputs after casting, and whether a kernel takes them."""

    tensors: tuple[Any, ...]
    kernel: bool


def plan(what: str, tensors: tuple[Tensor | None, ...], uncovered: str | None = None) -> Plan:
    """Chooses path and dtype of one call by transforms, autocast, what is forced, device and dtype.

    uncovered: why no kernel takes the call, whatever its tensors are.
    """
    x = tensors[0]
    assert x is not None
    dtype = _autocast_dtype(x) or x.dtype
    reason = _reason_for_reference(what, tensors, dtype, uncovered)
    if _trace.calls is not None:
        _trace.record(what, reason)
    return Plan(_cast(dtype, tensors), reason is None)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device_type = x.device.type
    if x.dtype == torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _autocast_unites(*tensors: Tensor) -> bool:
    """True where an active autocast brings these tensors to one dtype; float64 is never cast."""
    return all(_autocast_dtype(tensor) is not None for tensor in tensors)


def _cast(dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if all(tensor is None or tensor.dtype == dtype for tensor in tensors):
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _reason_for_reference(
    what: str, tensors: tuple[Tensor | None, ...], dtype: torch.dtype, uncovered: str | None
) -> str | None:
    """Why the reference runs, or None where a kernel does; what is not the caller's wish is told as a fallback."""
    if composed_path(*tensors):
        return "derivatives by torch.func or forward-mode AD need the operation in plain PyTorch"
    if _backend.forced() == "reference":
        return 'the back end "reference" is forced'
    device_type = tensors[0].device.type  # type: ignore[union-attr]
    if device_type not in ("cpu", "meta"):
        reason = f"{what} has no kernel for device type {device_type!r}"
    elif dtype not in KERNEL_DTYPES:
        reason = f"{what} has no kernel for {dtype}"
    elif uncovered is not None:
        reason = uncovered
    else:
        return None
    _backend.fall_back(reason)
    return reason


def requires_grad(*tensors: Tensor | None) -> bool:
    """True where autograd would record a call with these inputs."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator would cost a microsecond per call)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def call(op: Callable[..., _R], record: bool, *args: object) -> _R:
    """Calls an op, skipping the autograd layer (several us) where nothing is to be recorded."""
    if record or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def unrecorded(op: Callable[..., _R]) -> Callable[..., _R]:
    """`call` without a record, where nothing compiles: with less around it.

    Not `op.redispatch` to the CPU's kernel, two microseconds less: tensors with a negative bit, of zeros alone, batched
    or of another layout have keys of their own, and some profilers see the dispatcher alone.
    """

    def run(*args: Any) -> _R:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return run


def recorded(
    op: Callable[..., tuple[Tensor, ...]], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """An op with its registered derivative, for plain calls: torch.library's route costs more than a step itself."""

    # Not as `setup_context` of its own: torch would inspect the signature of `forward` at every call.
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = call(op, False, *inputs)
        setup_context(ctx, inputs, outputs)
        return outputs

    # Profiles and graphs show it by this name.
    name = "Fastlm" + op.__name__.removesuffix(".default").removesuffix("_forward").title().replace("_", "")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    made: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda body: body.update(methods))
    return made.apply


def states_shape(x: Tensor, given: Tensor | None, batch_sizes: Tensor | None, width: int) -> tuple[Any, ...]:
    """Of last states; B of packed rows by a state given with them. For fake functions."""
    if batch_sizes is None:
        return (1, x.shape[1], width) if x.dim() == 3 else (x.shape[0], width)
    return 1, torch.library.get_ctx().new_dynamic_size() if given is None else given.shape[-2], width


def by_reference(
    run: Callable[[Tensor, list[Tensor | None]], tuple[Sequence[Tensor], Sequence[Tensor]]],
    x: Tensor,
    states: Sequence[Tensor | None],
    sequences: Sequences,
) -> tuple[list[Tensor], list[Tensor]]:
    """What `run` gives of steps and states (B, H), tensors of all steps and last states, in the forms of the ops."""
    flat = [state if state is None or state.dim() == 2 else state.squeeze(0) for state in states]
    one_step = x.dim() == 2 and sequences.batch_sizes is None
    with without_autocast(x):
        every, last = run(x.unsqueeze(0) if one_step else x, flat)
    if one_step:
        return [tensor.squeeze(0) for tensor in every], list(last)
    # In place, for a view would refuse the usual `h_n.detach_()`.
    return list(every), [state.unsqueeze_(0) for state in last]


def draw_seed() -> Tensor:
    """A seed for dropout by torch's generator; outside of the op, which could not be replayed if it drew it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on tensors of this one."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def new_reserve(x: Tensor, width: int | None) -> Tensor:
    """What forward keeps for backward, in the type of its arithmetic; empty for None. For fake functions."""
    return x.new_empty((0,)) if width is None else x.new_empty((*x.shape[:-1], width), dtype=compute_dtype(x.dtype))


def contiguous_or_none(grad: Tensor | None) -> Tensor | None:
    """An incoming gradient in dense form: autograd may hand over zero strides."""
    return None if grad is None else grad.contiguous()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Where operations keep the dtypes that they are given: what an autocast asks for was done before."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def composed_grads(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the needed inputs of function(*inputs), differentiable where grad mode is on."""
    with torch.enable_grad():
        # Views: the inputs may be one tensor, be made of one another and have hooks, of which autograd takes care. A
        # gradient here is that of one argument.
        arguments = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        with without_autocast(next(tensor for tensor in inputs if tensor is not None)):
            outputs = function(*arguments)
    pairs = zip(outputs, grad_outputs, strict=True)
    used = [(out, grad) for out, grad in pairs if grad is not None and out.requires_grad]
    if not used:  # what arrives does not depend on what is needed
        return (None,) * len(inputs)
    wanted = [tensor for tensor, need in zip(arguments, needed, strict=True) if need and tensor is not None]
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
