"""What every module here that stands in for a torch.nn one has in common."""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

import torch
from torch.nn.utils.parametrize import is_parametrized


def change_class(module: torch.nn.Module, new_class: type[torch.nn.Module]) -> None:
    """Makes module an instance of its twin class, in place: identity, parameters and hooks stay."""
    check_class(module)
    module.__class__ = new_class
    if isinstance(module, torch.nn.RNNBase):
        module._init_flat_weights()  # a list kept by torch.nn, computed on reading by fastlm.nn


def check_class(module: torch.nn.Module) -> None:
    """Raises what `change_class` would."""
    if isinstance(module, TorchTwin):
        module._check_torch_form()


def read_weights(module: torch.nn.Module, names: Iterable[str]) -> list[Any]:
    """The weights of these names as they are now, for they may have been replaced since the last call."""
    # getattr, for weights that hooks or parametrisations set, is slow enough to show in a one-step call.
    parameters = module._parameters
    return [getattr(module, name) if (weight := parameters.get(name)) is None else weight for name in names]


class TorchTwin:
    """Mixin of a module with the parameters and attributes of `torch_class`."""

    torch_class: ClassVar[type[torch.nn.Module]]

    def _check_torch_form(self) -> None:
        """Raises ValueError where the module has an option that its torch.nn twin lacks."""

    def to_torch(self) -> Any:
        """The torch.nn module for this one, e.g. for ONNX, quantisation or TorchScript.

        It shares the Parameters, and has the same training flag and hooks.

        Raises:
            ValueError: the module is parametrised; its weights would lose their parametrisation. Or it has an option
                (weight_dropout, locked_dropout) that torch.nn lacks.
        """
        assert isinstance(self, torch.nn.Module)
        if is_parametrized(self):
            raise ValueError("to_torch: call torch.nn.utils.parametrize.remove_parametrizations first")
        twin = self.__new__(type(self))
        for name, value in self.__dict__.items():
            # Containers (of parameters, buffers, hooks) are copied, so that each module can change its own.
            twin.__dict__[name] = copy.copy(value) if isinstance(value, dict | list | set) else value
        change_class(twin, self.torch_class)
        return twin

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script, which cannot see into the kernels."""
        name = type(self).__name__
        raise NotImplementedError(
            f"torch.jit.script: fastlm.nn.{name} has no TorchScript form; script the module given by "
            f"{name}.to_torch(), or the model after fastlm.restore(model)"
        )
