"""Recurrent language models: an embedding, a GRU or LSTM stack, an output layer."""

from fastlm.models.rnn.cache import RNNCache
from fastlm.models.rnn.configuration import RNNConfig
from fastlm.models.rnn.modeling import RNNForCausalLM, RNNModel

__all__ = ["RNNCache", "RNNConfig", "RNNForCausalLM", "RNNModel"]
