"""replace(), restore() and explain(): the kernels under an existing model, and what became of it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.utils.parametrize import is_parametrized

from fastlm import _native, _trace
from fastlm._report import Report
from fastlm.nn import GRU, LSTM, Dropout, GRUCell, Linear, LSTMCell, MultiheadAttention
from fastlm.nn._twin import TorchTwin, change_class, check_class

_Model = TypeVar("_Model", bound=torch.nn.Module)

_TWINS: dict[type[Any], type[Any]] = {
    twin.torch_class: twin for twin in (GRU, LSTM, GRUCell, LSTMCell, MultiheadAttention)
}
_NO_TWIN = {
    torch.nn.RNN: "no kernel for plain tanh or relu recurrence",
    torch.nn.RNNCell: "no kernel for plain tanh or relu recurrence",
}


def replace(model: _Model, linear: bool = False) -> _Model:
    """Puts the modules of a model onto the kernels of fastlm, in place, and returns the model.

    Every module that is exactly torch.nn.GRU, LSTM, GRUCell, LSTMCell or MultiheadAttention becomes its fastlm.nn twin:
    the same object with the same parameters, hooks and state_dict. Subclasses and parametrised modules are left alone;
    `explain(model)` lists them. torch's TransformerEncoderLayer and TransformerEncoder around a replaced attention are
    told to call it in evaluation too, which they would run past. Doing it twice changes nothing more; `restore` undoes
    it.

    Args:
        model (Module): to be changed.
        linear (bool): torch.nn.Linear too, which pays in float32 on some CPUs; see `fastlm.nn.Linear`.
            Default: False.

    Raises:
        TypeError: model is no Module, or linear neither True nor False.
    """
    if linear not in (True, False):
        raise TypeError(f"linear: expected True or False, got {linear!r}")
    _change_classes("replace", model, _TWINS | {torch.nn.Linear: Linear} if linear else _TWINS)
    for module in model.modules():
        fast_path = _fast_path(module)
        if fast_path is not None:
            _take(module, *fast_path)
    return model


def restore(model: _Model) -> _Model:
    """Undoes `replace`: every fastlm.nn module becomes its torch.nn twin again, in place. Returns the model.

    Raises:
        ValueError: a module has an option (weight_dropout, locked_dropout) that torch.nn lacks; no module is changed
            then.
    """
    twins: list[type[Any]] = [*_TWINS.values(), Dropout, Linear]
    _change_classes("restore", model, {twin: twin.torch_class for twin in twins})
    for module in model.modules():
        for attribute, value in module.__dict__.pop(_TAKEN, {}).items():
            setattr(module, attribute, value)
    return model


# What replace() took from a module of torch's, by attribute, so that restore() can put it back.
_TAKEN = "_fastlm_taken"


def _fast_path(module: torch.nn.Module) -> tuple[str, Any] | None:
    """What lets a layer or encoder run torch's attention instead of a replaced one: an attribute, its value without."""
    if isinstance(module, torch.nn.TransformerEncoderLayer) and isinstance(module.self_attn, MultiheadAttention):
        return "activation_relu_or_gelu", 0
    if isinstance(module, torch.nn.TransformerEncoder) and any(
        isinstance(inner, MultiheadAttention) for inner in module.modules()
    ):
        return "use_nested_tensor", False
    return None


def _take(module: torch.nn.Module, attribute: str, value: object) -> None:
    module.__dict__.setdefault(_TAKEN, {}).setdefault(attribute, getattr(module, attribute))
    setattr(module, attribute, value)


def _change_classes(function: str, model: _Model, new_classes: dict[type[Any], type[Any]]) -> _Model:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastlm.{function}: expected a torch.nn.Module, got {type(model).__name__}")
    changed = [module for module in model.modules() if type(module) in new_classes]
    for module in changed:  # all or none
        check_class(module)
    for module in changed:
        change_class(module, new_classes[type(module)])
    return model


def explain(x: torch.nn.Module | Callable[..., object], *inputs: object) -> Report:
    """Tells what runs on the kernels and why the rest does not; the result is a dict that prints well.

    Args:
        x (Module or function): a model alone: which modules were replaced, which were left and why. With inputs, or a
            function: called once, without gradients.
        *inputs: arguments of the call.

    Returns:
        For a model alone: "replaced" {name: class} and "left" {name: reason}. For a call: "backend" ("cpu",
        "reference", both where calls differ, None where no operation of fastlm was called), "kernel", "reasons".

    Raises:
        TypeError: x can be neither looked into nor called.
    """
    if not callable(x):
        raise TypeError(f"fastlm.explain: expected a torch.nn.Module or a function, got {type(x).__name__}")
    if inputs or not isinstance(x, torch.nn.Module):
        return _explain_call(x, inputs)
    replaced, left = {}, {}
    for name, module in x.named_modules():
        reason = _reason_left(module)
        if reason is not None:
            left[name or "(model)"] = reason
        elif isinstance(module, TorchTwin):
            replaced[name or "(model)"] = f"fastlm.nn.{module.torch_class.__name__}"
    return Report(replaced=replaced, left=left)


def _reason_left(module: torch.nn.Module) -> str | None:
    """Why a module that one could expect on the kernels is not there, or None."""
    for torch_class, reason in _NO_TWIN.items():
        if isinstance(module, torch_class):
            return reason
    for torch_class, twin in _TWINS.items():
        if isinstance(module, torch_class) and not isinstance(module, twin):
            if type(module) is torch_class:
                return "fastlm.replace(model) has not been called since it was added"
            if is_parametrized(module):
                return "parametrised: call fastlm.replace(model) before parametrising it"
            return f"a subclass of torch.nn.{torch_class.__name__}, which may differ from it"
        if isinstance(module, twin) and "forward" in module.__dict__:
            return "its forward was set on the instance, which may call torch's"
    fast_path = _fast_path(module)
    if fast_path is not None and getattr(module, fast_path[0]) != fast_path[1]:
        return "its fast path for evaluation runs torch's attention: call fastlm.replace(model)"
    return None


def _explain_call(function: Callable[..., object], inputs: tuple[object, ...]) -> Report:
    with torch.no_grad(), _trace.recording() as calls:
        function(*inputs)
    if not calls:
        return Report(backend=None, kernel=None, reasons=["no operation of fastlm was called"])
    backends, kernels, reasons = [], [], []
    for operation, reason in calls:
        if reason is None:
            reason = _native.reason  # without the extension the operation itself is the reference
        backends.append("cpu" if reason is None else "reference")
        if reason is None:
            kernels.append(f"{operation} ({_native.module.cpu_isa()})")  # type: ignore[union-attr]
        else:
            reasons.append(reason)
    return Report(backend=_distinct(backends), kernel=_distinct(kernels), reasons=list(dict.fromkeys(reasons)))


def _distinct(names: list[str]) -> str | None:
    return ", ".join(dict.fromkeys(names)) or None
