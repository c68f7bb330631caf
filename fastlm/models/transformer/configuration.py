"""What a transformer language model is made of."""

from typing import Any

from transformers import PreTrainedConfig

from fastlm.models._cache import CACHE_NAMES
from fastlm.models._configuration import check_dropout, check_sizes, check_tokens


class TransformerConfig(PreTrainedConfig):
    """Sizes of a `TransformerModel` or `TransformerForCausalLM`.

    Args:
        vocab_size (int): Default: 50257.
        hidden_size (int): E; the layers between two attentions are 4 E wide. Default: 128.
        num_layers (int): transformers' num_hidden_layers is another name of it. Default: 4.
        num_heads (int): divides E. transformers' num_attention_heads is another name of it. Default: 4.
        max_position_embeddings (int): the context, in tokens. Default: 64.
        dropout (float): probability in [0, 1] on embeddings, attention weights and what layers add. Default: 0.
        bias (bool): of linear layers and norms; the output layer has none. Default: False.
        tie_word_embeddings (bool): the output layer takes the embeddings for its weights. Default: True.
        layer_norm_eps (float): Default: 1e-5.
        initializer_range (float): standard deviation of new weights. Default: 0.02.
        bos_token_id, eos_token_id, pad_token_id (int, optional): eos_token_id may be a list. Default: None.
        use_cache (bool): forward outside of training returns keys and values. Default: True.
        **kwargs: as of PreTrainedConfig.

    Raises:
        ValueError: a value is impossible (it names the argument).
    """

    model_type = "fastlm_transformer"
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}  # noqa: RUF012
    keys_to_ignore_at_inference = CACHE_NAMES

    vocab_size: int = 50257
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    max_position_embeddings: int = 64
    dropout: float = 0.0
    bias: bool = False
    tie_word_embeddings: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "max_position_embeddings")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size ({self.hidden_size}), got {self.num_heads}")
        check_dropout(self)
        check_tokens(self)
        super().__post_init__(**kwargs)
