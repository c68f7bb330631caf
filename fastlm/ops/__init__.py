"""Operations: one op name for all back ends, with schema, checks, shape function, autograd and plain reference."""

from fastlm import _native
from fastlm.ops import _schema as _schema  # the names must exist before anything attaches to them

if _native.module is None:
    from fastlm.ops import _pure

    _pure.register()

from fastlm.ops import _flops as _flops
from fastlm.ops import gemm as gemm
from fastlm.ops.attention import attention, attention_varlen, scaled_dot_product_attention
from fastlm.ops.cross_entropy import linear_cross_entropy
from fastlm.ops.dropout import dropout
from fastlm.ops.gelu import gelu
from fastlm.ops.gru import gru, gru_cell
from fastlm.ops.linear import linear
from fastlm.ops.lstm import lstm, lstm_cell

__all__ = [
    "attention",
    "attention_varlen",
    "dropout",
    "gelu",
    "gru",
    "gru_cell",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "scaled_dot_product_attention",
]
