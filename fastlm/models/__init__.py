"""Language models in the form of Hugging Face transformers; importing this registers them with its Auto classes."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'fastlm.models: expected transformers, which pip install "fastlm[lm]" installs: {error}'
    ) from error

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastlm.models.rnn import RNNCache, RNNConfig, RNNForCausalLM, RNNModel
from fastlm.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel

__all__ = [
    "RNNCache",
    "RNNConfig",
    "RNNForCausalLM",
    "RNNModel",
    "TransformerConfig",
    "TransformerForCausalLM",
    "TransformerModel",
]

for _config, _model, _causal_lm in (
    (RNNConfig, RNNModel, RNNForCausalLM),
    (TransformerConfig, TransformerModel, TransformerForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    # By this transformers' Trainer knows that it is to shift labels before it smooths them.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _causal_lm.__name__
