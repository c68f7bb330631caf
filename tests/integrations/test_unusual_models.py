"""Models of transformers that "sdpa" does not run, or whose attention is of another kind, under "fastlm"."""

import sys
import types

import pytest
import torch

import fastlm
from fastlm.integrations import transformers as integration
from tests.integrations.test_transformers import (  # _registered is a fixture
    SMALL,
    VOCABULARY,
    Layer,
    _registered,  # noqa: F401
    eager_in_float64,
    make_inputs,
)
from tests.numerics import check

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def test_a_model_with_an_attention_of_its_own_beside_the_interface():
    """GIT's text layers add the mask by themselves, its images' go through the interface."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = transformers.GitForCausalLM(transformers.GitConfig(**sizes, num_attention_heads=4)).eval()
    tokens = torch.randint(3, 99, (2, 9))
    expected = model(tokens).logits
    model.set_attn_implementation("fastlm")
    with pytest.warns(fastlm.FastlmFallbackWarning, match="modeling_git computes attention by itself"):
        assert torch.equal(model(tokens).logits, expected)


MLA = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_topk": 3, "index_n_heads": 2, "index_head_dim": 16, "num_key_value_heads": 4, "n_group": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "topk_group": 1},
}
NLLB = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_experts": 2, "decoder_start_token_id": 2},
    **{"encoder_sparse_step": 0, "decoder_sparse_step": 0, "dropout": 0.0},
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Layers that transformers does not run under "sdpa": bidirectional without is_causal, a decoder with is_causal False.
# And sparse attention, which says what it leaves in an argument of its own.
UNUSUAL = {
    "SplinterModel": SIZES | {"question_token_id": 5},
    "NllbMoeModel": NLLB,
    "GlmMoeDsaModel": SIZES | MLA,
}


def make_unusual(name: str, implementation: str, **options: object) -> torch.nn.Module:
    config = getattr(transformers, name.removesuffix("Model") + "Config")
    torch.manual_seed(1)
    model = getattr(transformers, name)._from_config(
        config(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None, **options),
        attn_implementation=implementation,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.eval()


@pytest.mark.parametrize("name", UNUSUAL)
@torch.no_grad()
def test_masks_of_unusual_models(name):
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    tokens = make_inputs("llama", "none")["input_ids"]
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if name == "NllbMoeModel" else {})}
    fast, eager = (make_unusual(name, kind, **UNUSUAL[name]) for kind in ("fastlm", "eager"))
    exact = eager_in_float64(eager)
    check("hidden", *(model(**inputs)[0] for model in (fast, eager, exact)))


@torch.no_grad()
def test_queries_of_the_last_tokens_alone():
    """Gemma 4 cuts off queries that nobody asks for, in layers that share keys, unless told that there is no mask."""
    name = "Gemma4UnifiedForCausalLM"
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    options = {
        **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_key_value_heads": 2},
        **{"head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 2, "num_hidden_layers": 4},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 32},
    }
    config = transformers.Gemma4UnifiedTextConfig(**SMALL, **{**SIZES, **options}, max_position_embeddings=64)
    torch.manual_seed(1)
    model = getattr(transformers, name)._from_config(config, attn_implementation="fastlm").eval()
    tokens = make_inputs("llama", "none")["input_ids"]
    whole = model(input_ids=tokens, use_cache=False).logits
    last = model(input_ids=tokens, use_cache=False, logits_to_keep=3).logits
    torch.testing.assert_close(last, whole[:, -3:], rtol=1e-4, atol=1e-4)


def test_blocks_of_sparse_attention_are_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="block_indices: expected None, got those of Layer"):
        integration.attention_forward(Layer(True), q, q, q, None, block_indices=torch.zeros(1, 1, 3, 1))


def test_models_without_source_get_masks(monkeypatch):
    """As those that are typed into a session; transformers says nothing of sdpa for them."""
    typed = types.ModuleType("typed")
    typed.TypedModel = type("TypedModel", (transformers.PreTrainedModel,), {"__module__": "typed"})
    monkeypatch.setitem(sys.modules, "typed", typed)
    assert integration._needs_masks("typed")
    assert not integration._with_own_attention("typed")
