"""What a recurrent language model is made of."""

from typing import Any

from transformers import PreTrainedConfig

from fastlm.models._cache import CACHE_NAMES
from fastlm.models._configuration import check_dropout, check_sizes, check_tokens

CELLS = ("gru", "lstm")


class RNNConfig(PreTrainedConfig):
    """Sizes and kind of an `RNNModel` or `RNNForCausalLM`.

    Args:
        vocab_size (int): Default: 10000.
        embedding_size (int): E, width of a token's embedding. Default: 128.
        hidden_size (int): H, width of every recurrent layer. Default: 256.
        num_layers (int): L. transformers' num_hidden_layers is another name of it. Default: 1.
        cell (str): "gru" or "lstm". Default: "gru".
        dropout (float): probability in [0, 1] on the embeddings, between layers and before the output. Default: 0.
        tie_word_embeddings (bool): the output layer takes the embeddings for its weights; where H is not E, a linear
            map (no bias) from H to E comes before it. Default: False.
        bos_token_id, eos_token_id, pad_token_id (int, optional): eos_token_id may be a list. Default: None.
        use_cache (bool): forward returns the state it ends in. Default: True.
        **kwargs: as of PreTrainedConfig.

    Raises:
        ValueError: a value is impossible (it names the argument).
    """

    model_type = "fastlm_rnn"
    attribute_map = {"num_hidden_layers": "num_layers"}  # noqa: RUF012
    keys_to_ignore_at_inference = CACHE_NAMES

    vocab_size: int = 10000
    embedding_size: int = 128
    hidden_size: int = 256
    num_layers: int = 1
    cell: str = "gru"
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(self, "vocab_size", "embedding_size", "hidden_size", "num_layers")
        if self.cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(map(repr, CELLS))}, got {self.cell!r}")
        check_dropout(self)
        check_tokens(self)
        super().__post_init__(**kwargs)
