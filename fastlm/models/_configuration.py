"""Checks of what configurations have in common; each raises a ValueError that names the argument."""

from typing import Any


def check_sizes(config: Any, *names: str) -> None:
    """Whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not _is_int(value) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def check_dropout(config: Any) -> None:
    """A probability."""
    value = config.dropout
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"dropout: expected a number from 0 to 1, got {value!r}")


def check_tokens(config: Any) -> None:
    """Special tokens are in the vocabulary."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, list) and name == "eos_token_id" else [value]:
            if token is not None and not (_is_int(token) and 0 <= token < config.vocab_size):
                last = config.vocab_size - 1
                raise ValueError(f"{name}: expected None or 0 to {last} (vocab_size - 1), got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
