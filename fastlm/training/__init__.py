"""Language models from a text file: data, training, evaluation, generation."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.training.checkpoint import Checkpoint, Evaluation, evaluate, generate
    from fastlm.training.options import TrainingOptions
    from fastlm.training.run import Result, train

# Loaded when asked for: transformers and datasets take seconds, and a command line's help needs the options alone.
_HOMES = {
    "Checkpoint": "checkpoint",
    "Evaluation": "checkpoint",
    "Result": "run",
    "TrainingOptions": "options",
    "evaluate": "checkpoint",
    "generate": "checkpoint",
    "train": "run",
}

__all__ = ["Checkpoint", "Evaluation", "Result", "TrainingOptions", "evaluate", "generate", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
