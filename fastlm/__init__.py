"""Fused GRU, LSTM and attention kernels for PyTorch on the CPU, as drop-in torch.nn modules."""

from fastlm import nn, ops
from fastlm._backend import FastlmFallbackWarning, backend
from fastlm._info import info
from fastlm._info import version as __version__
from fastlm._replace import explain, replace, restore

__all__ = [
    "FastlmFallbackWarning",
    "__version__",
    "backend",
    "explain",
    "info",
    "nn",
    "ops",
    "replace",
    "restore",
]
