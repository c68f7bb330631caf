"""The product under the kernels as an operator of its own; no derivatives."""

import torch
from torch import Tensor

from fastlm.ops import _common

_gemm = torch.ops.fastlm.gemm.default


@torch.library.register_fake("fastlm::gemm")
def _fake(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


def gemm(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, bias: Tensor | None = None) -> Tensor:
    """A (M, K) B (K, N) + bias (N), either of them transposed in memory where its flag says so."""
    return _common.call(_gemm, False, a, b, transpose_a, transpose_b, bias)
