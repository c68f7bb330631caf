"""The fixtures of training."""

from tests.training.conftest import _own_cache, cache, text_file

__all__ = ["_own_cache", "cache", "text_file"]
