"""The decoder of GPT-2, lean: few calls and few copies in a training step."""

from fastlm.models.transformer.configuration import TransformerConfig
from fastlm.models.transformer.modeling import TransformerForCausalLM, TransformerModel

__all__ = ["TransformerConfig", "TransformerForCausalLM", "TransformerModel"]
