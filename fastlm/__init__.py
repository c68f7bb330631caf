"""Fused GRU and LSTM kernels for PyTorch on the CPU, as drop-in torch.nn modules."""

from fastlm import ops
from fastlm._backend import FastlmFallbackWarning, backend

__all__ = ["FastlmFallbackWarning", "backend", "ops"]
