"""Language models in the form of Hugging Face transformers; importing this registers them with its Auto classes."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'fastlm.models: expected transformers, which pip install "fastlm[lm]" installs: {error}'
    ) from error

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fastlm.models.rnn import RNNCache, RNNConfig, RNNForCausalLM, RNNModel

__all__ = ["RNNCache", "RNNConfig", "RNNForCausalLM", "RNNModel"]

AutoConfig.register(RNNConfig.model_type, RNNConfig, exist_ok=True)
AutoModel.register(RNNConfig, RNNModel, exist_ok=True)
AutoModelForCausalLM.register(RNNConfig, RNNForCausalLM, exist_ok=True)
