"""fastlm's attention under Hugging Face transformers: `register()`, then `attn_implementation="fastlm"`."""

import sys
from typing import Any

import torch
from torch import Tensor

from fastlm import _backend
from fastlm.ops import attention, scaled_dot_product_attention

NAME = "fastlm"


def register() -> None:
    """Makes "fastlm" an attention implementation of Hugging Face transformers; doing it twice changes nothing more.

    After it every model whose attention goes through transformers' interface takes
    `from_pretrained(..., attn_implementation="fastlm")`, `from_config(..., attn_implementation="fastlm")` and
    `model.set_attn_implementation("fastlm")`. Beyond "sdpa" it has softcap (Gemma 2) and sinks (gpt-oss), and copies
    neither keys of fewer heads nor position biases (T5). Masks are those of "sdpa".

    Models that compute attention in their own way (BLOOM, XGLM) take the name too; transformers does not refuse it.
    They go on as under "eager", with one FastlmFallbackWarning, or an error where FASTLM_STRICT=1.

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

    own = _with_own_attention(type(config).__module__)
    return (eager_mask if own else sdpa_mask)(*args, config=config, **kwargs)


@torch.compiler.assume_constant_result
def _with_own_attention(configuration: str) -> bool:
    """True, and told as a fallback, for the models of a configuration's module that never call the interface.

    They would add a mask of "sdpa" to their scores, and take its None for no mask. Their code tells, as it does to
    `set_attn_implementation`: an attention class, and no use of the interface.
    """
    module = sys.modules.get(configuration.replace("configuration_", "modeling_"))
    if module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return False
    classes = (value for name, value in vars(module).items() if "Attention" in name and isinstance(value, type))
    if not any(value.__module__ == module.__name__ for value in classes):
        return False
    _backend.fall_back(f"{module.__name__} computes attention by itself, not through transformers' interface")
    return True


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
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        module (Module): the layer. Its attribute is_causal (True where it has none) stands for is_causal=None.
        query (Tensor): (B, Hq, Tq, D); B may be 1 for a larger batch of keys.
        key (Tensor): (B, Hkv, Tk, D), not repeated: Hkv divides Hq.
        value (Tensor): (B, Hkv, Tk, Dv).
        attention_mask (Tensor, optional): broadcasts against (B, Hq, Tq, Tk). bool: True takes part; floating: added.
            It holds causality, window and padding. None: `is_causal` and `sliding_window` decide.
        dropout (float): probability of dropping a weight. Default: 0.
        scaling (float, optional): Default: 1 / sqrt(D).
        is_causal (bool, optional): without a mask and for Tq > 1, query i sees the keys j <= i. Default: None.
        softcap (float, optional): Default: None.
        sliding_window (int, optional): where is_causal counts, query i sees i - sliding_window < j. Default: None.
        position_bias (Tensor, optional): added to the scores besides the mask; broadcasts as it does. Default: None.
        s_aux (Tensor, optional): (Hq,), sinks. Default: None.
        **kwargs: what other implementations need.

    Returns:
        output (Tensor): (B, Tq, Hq, Dv), contiguous.
        weights: None. As under "sdpa", output_attentions=True is only warned of.
    """
    if kwargs.get("output_attentions"):
        _warn_of_missing_weights()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q_len, k_len = query.shape[2], key.shape[2]
    causal, window = None, (-1, -1)
    if attention_mask is None and q_len > 1 and is_causal:
        causal = "upper_left"
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        if k_len > q_len:  # the first tokens in a static cache: what lies behind them is not written yet
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            position_bias = None if position_bias is None else position_bias[..., :q_len]
    if query.shape[0] != key.shape[0]:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    special = (attention_mask, softcap, sliding_window, position_bias, s_aux)
    if not dropout and all(option is None for option in special):  # a token's step feels the checks of the rest
        plain = scaled_dot_product_attention(
            query, key, value, is_causal=causal is not None, scale=scaling, enable_gqa=True
        )
        return plain.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        attention_mask, position_bias = position_bias, None
    elif position_bias is not None and attention_mask.dtype != torch.bool:
        attention_mask, position_bias = attention_mask + position_bias, None
    output = attention(
        query,
        key,
        value,
        mask=attention_mask,
        causal=causal,
        window=window,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        _bias=position_bias,
    )
    return output.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


def _warn_of_missing_weights() -> None:
    from transformers.utils import logging

    logging.get_logger("transformers.integrations.fastlm").warning_once(
        '"fastlm" attention does not support `output_attentions=True`: it never has all weights of a layer at once. '
        'Set your attention to "eager" if you want them.'
    )
