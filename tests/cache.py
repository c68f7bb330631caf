"""The name that transformers has for a model's cache: past_key_values before 5.24, cache from then on."""

from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in what a model returned; None without one."""
    return getattr(output, CACHE)
