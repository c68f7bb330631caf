"""fastlm's attention under Hugging Face transformers: `register()`, then `attn_implementation="fastlm"`."""

import functools
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor

from fastlm import _backend
from fastlm.ops import scaled_dot_product_attention
from fastlm.ops.attention import checked_attention, share_beside_sink

NAME = "fastlm"


def register() -> None:
    """Makes "fastlm" an attention implementation of Hugging Face transformers; doing it twice changes nothing more.

    After it every model whose attention goes through transformers' interface takes
    `from_pretrained(..., attn_implementation="fastlm")`, `from_config(..., attn_implementation="fastlm")` and
    `model.set_attn_implementation("fastlm")`. Beyond "sdpa" it has softcap (Gemma 2) and sinks (gpt-oss), and copies
    neither keys of fewer heads nor position biases (T5). Masks are those of "sdpa".

    Models that compute attention in their own way (BLOOM, XGLM) take the name too; transformers does not refuse it.
    They go on as under "eager"; those that ask for a mask do so with one FastlmFallbackWarning, or an error where
    FASTLM_STRICT=1. Where a model has a table of classes by name (Falcon, GPT-J, SAM) transformers raises KeyError.

    Raises:
        ImportError: transformers is missing or too old.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask, sdpa_mask  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "fastlm.integrations.transformers: expected transformers 5.15 or later, which "
            f'pip install "fastlm[transformers]" installs: {error}'
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    # Without an entry of the same name transformers makes no mask at all, and padding would take part.
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """What transformers calls to make a mask: that of "sdpa", or of "eager" for models with attention of their own."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    configuration = type(config).__module__
    if _needs_masks(configuration):
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    own = _with_own_attention(configuration)
    return (eager_mask if own else sdpa_mask)(*args, config=config, **kwargs)


def _modeling(configuration: str) -> str:
    """The name of the module that has a configuration's models."""
    return configuration.replace("configuration_", "modeling_")


@_backend.constant_while_compiling
def _needs_masks(configuration: str) -> bool:
    """True where None for a mask, and is_causal instead, may not mean what it means under "sdpa"."""
    module = _modeling(configuration)
    return module in sys.modules and _is_unlike_sdpa(module)


@functools.cache
def _is_unlike_sdpa(name: str) -> bool:
    """True for models that do not run under "sdpa", so that their layers' is_causal may be wrong or missing, and for
    those that treat it as a case of its own.
    """
    module = sys.modules[name]
    models = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == name and hasattr(value, "_supports_sdpa")
    ]
    special = re.search(r"""_attn_implementation.*["']sdpa["']""", _source(module))
    return special is not None or any(not model._supports_sdpa for model in models)


def _source(code: Any) -> str:
    """Empty where there is none, as of a model that was typed in."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


@_backend.constant_while_compiling
def _with_own_attention(configuration: str) -> bool:
    """True, and told as a fallback, for the models of a configuration's module that do not all call the interface.

    They would add a mask of "sdpa" to their scores, and take its None for no mask. Their code tells: an attention class
    without use of the interface, or, where the file uses it elsewhere, with a softmax of its own.
    """
    module = _modeling(configuration)
    if module not in sys.modules or not _attends_by_itself(module):
        return False
    _backend.fall_back(f"{module} computes attention by itself, not through transformers' interface")
    return True


@functools.cache
def _attends_by_itself(name: str) -> bool:
    module = sys.modules[name]
    classes = [
        value
        for key, value in vars(module).items()
        if "Attention" in key and isinstance(value, type) and value.__module__ == name
    ]
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return bool(classes)
    sources = (_source(it) for it in classes)
    return any("softmax(" in source and "ALL_ATTENTION_FUNCTIONS" not in source for source in sources)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        module (Module): the layer. Its attribute is_causal (True where it has none) stands for is_causal=None.
        query (Tensor): (B, Hq, Tq, D); B may be 1 for a larger batch of keys.
        key (Tensor): (B, Hkv, Tk, D), not repeated: Hkv divides Hq.
        value (Tensor): (B, Hkv, Tk, Dv).
        attention_mask (Tensor, optional): broadcasts against (B, Hq, Tq, Tk). bool: True takes part; floating: added.
            It holds causality, window and padding, so that sliding_window plays no part here, as under "sdpa": where a
            window takes something away there is a mask. None: `is_causal` decides.
        dropout (float): probability of dropping a weight. Default: 0.
        scaling (float, optional): Default: 1 / sqrt(D).
        is_causal (bool, optional): without a mask and for Tq > 1, query i sees the keys j <= i. Default: None.
        softcap (float, optional): Default: None.
        position_bias (Tensor, optional): added to the scores besides the mask; broadcasts as it does. Default: None.
        s_aux (Tensor, optional): (Hq,), sinks. Default: None.
        sinks (Tensor, optional): (B, Hq, Tq, 1), sinks of every query. Default: None.
        indices (Tensor, optional): (B, Tq, K), the keys that sparse attention leaves to a query. Default: None.
        block_indices (Tensor, optional): blocks of such keys, whose form is the model's own. Must be None.
        **kwargs: what other implementations need.

    Returns:
        output (Tensor): (B, Tq, Hq, Dv), contiguous.
        weights: None. As under "sdpa", output_attentions=True is only warned of.

    Raises:
        ValueError: block_indices are given.
    """
    if block_indices is not None:
        raise ValueError(
            f"block_indices: expected None, got those of {type(module).__name__}; use another attn_implementation"
        )
    if kwargs.get("output_attentions"):
        _warn_of_missing_weights()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q_len, k_len = query.shape[2], key.shape[2]
    causal = None
    if attention_mask is None and q_len > 1 and is_causal:
        causal = "upper_left"
        if k_len > q_len:  # the first tokens in a static cache: what lies behind them is not written yet
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            position_bias = None if position_bias is None else position_bias[..., :q_len]
    if indices is not None:
        attention_mask = _with_indices(attention_mask, indices, key.shape[2])
    if query.shape[0] != key.shape[0]:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    special = (attention_mask, softcap, position_bias, s_aux, sinks)
    if not dropout and all(option is None for option in special):  # a token's step feels the checks of the rest
        plain = scaled_dot_product_attention(
            query, key, value, is_causal=causal is not None, scale=scaling, enable_gqa=True
        )
        return plain.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        attention_mask, position_bias = position_bias, None
    elif position_bias is not None and attention_mask.dtype != torch.bool:
        attention_mask, position_bias = attention_mask + position_bias, None
    output = checked_attention(
        query,
        key,
        value,
        mask=attention_mask,
        causal=causal,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        return_lse=sinks is not None,
        bias=position_bias,
    )
    if sinks is not None:
        output, lse = output
        output = output * share_beside_sink(lse.unsqueeze(-1), sinks).to(output.dtype)
    return output.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


def _with_indices(mask: Tensor | None, indices: Tensor, k_len: int) -> Tensor:
    kept = torch.zeros(*indices.shape[:2], k_len, dtype=torch.bool, device=indices.device)
    kept = kept.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None:
        return kept
    return mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, -torch.inf)


def _warn_of_missing_weights() -> None:
    from transformers.utils import logging

    logging.get_logger("transformers.integrations.fastlm").warning_once(
        '"fastlm" attention does not support `output_attentions=True`: it never has all weights of a layer at once. '
        'Set your attention to "eager" if you want them.'
    )
