"""A model's cache under both of its names: transformers says past_key_values before 5.24, cache from then on.

What forward returns has one of them, so that outputs are made by position.
"""

from typing import Any

CACHE_NAMES = ["cache", "past_key_values"]


def given_cache(cache: Any, past_key_values: Any) -> tuple[str, Any]:
    """The name under which a cache was given, for errors, and the cache; None where there is none.

    Raises:
        ValueError: both are given.
    """
    if past_key_values is None:
        return "cache", cache
    if cache is not None:
        raise ValueError("cache: expected at most one of cache and past_key_values, its other name, got both")
    return "past_key_values", past_key_values
