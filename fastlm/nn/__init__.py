"""Drop-in torch.nn modules on the kernels of fastlm."""

import torch

from fastlm.nn import init
from fastlm.nn.attention import MultiheadAttention
from fastlm.nn.dropout import Dropout
from fastlm.nn.gru import GRU, GRUCell
from fastlm.nn.linear import Linear
from fastlm.nn.lstm import LSTM, LSTMCell
from fastlm.nn.stream import Stream

__all__ = ["GRU", "LSTM", "Dropout", "GRUCell", "LSTMCell", "Linear", "MultiheadAttention", "Stream", "init", "is_rnn"]

# Whole modules saved with torch.save then load with weights_only=True, as torch's own do.
torch.serialization.add_safe_globals([Dropout, GRU, LSTM, GRUCell, LSTMCell, Linear, MultiheadAttention])


def is_rnn(module: object) -> bool:
    """True for GRU and LSTM of torch.nn and of fastlm.nn and for torch.nn.RNN (not for cells).

    For loops over modules that would test `isinstance(module, torch.nn.LSTM)`, which a fastlm.nn.LSTM is not.
    """
    return isinstance(module, torch.nn.RNNBase)
