"""Small random transformers, and the same as transformers' GPT-2."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastlm.models import TransformerConfig, TransformerForCausalLM
from tests.models.small import BOS, PAD, VOCABULARY
from tests.numerics import Outputs, check_all, each_isa, incoming

CONTEXT = 24
_DTYPES = (torch.float32, torch.float64)


def make_transformer(**options: Any) -> TransformerForCausalLM:
    """In eval mode, with weights so large that attention is far from uniform."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": CONTEXT}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS}
    model = TransformerForCausalLM(TransformerConfig(**sizes | tokens | options))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model.eval()


def _names(layers: int, bias: bool) -> Iterator[tuple[str, str]]:
    """Of parameters, here and in GPT-2."""
    yield "model.embed_tokens.weight", "transformer.wte.weight"
    yield "model.embed_positions.weight", "transformer.wpe.weight"
    modules = [("model.norm", "transformer.ln_f")]
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"transformer.h.{layer}"
        modules += [
            (f"{ours}.input_layernorm", f"{theirs}.ln_1"),
            (f"{ours}.self_attn.qkv_proj", f"{theirs}.attn.c_attn"),
            (f"{ours}.self_attn.o_proj", f"{theirs}.attn.c_proj"),
            (f"{ours}.post_attention_layernorm", f"{theirs}.ln_2"),
            (f"{ours}.mlp.up_proj", f"{theirs}.mlp.c_fc"),
            (f"{ours}.mlp.down_proj", f"{theirs}.mlp.c_proj"),
        ]
    for ours, theirs in modules:
        for kind in ("weight", "bias") if bias else ("weight",):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def names_of(model: TransformerForCausalLM) -> dict[str, str]:
    """GPT-2's names of its parameters."""
    names = dict(_names(model.config.num_layers, model.config.bias))
    return names if model.config.tie_word_embeddings else names | {"lm_head.weight": "lm_head.weight"}


def gpt2_of(model: TransformerForCausalLM) -> GPT2LMHeadModel:
    """The same function in transformers; without a bias here, zeros there."""
    of = model.config
    sizes = {"n_embd": of.hidden_size, "n_layer": of.num_layers, "n_head": of.num_heads}
    config = GPT2Config(
        vocab_size=of.vocab_size,
        n_positions=of.max_position_embeddings,
        **sizes,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        activation_function="gelu_new",
        layer_norm_epsilon=of.layer_norm_eps,
        tie_word_embeddings=of.tie_word_embeddings,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=PAD,
        attn_implementation="eager",
    )
    twin = GPT2LMHeadModel(config).eval()
    source, target = model.state_dict(), dict(twin.named_parameters())
    with torch.no_grad():
        for ours, theirs in names_of(model).items():
            target[theirs].copy_(_turned(theirs, source[ours]))
    return twin


def _turned(name: str, value: Tensor) -> Tensor:
    """GPT-2's linear layers have their weights transposed."""
    return value.t() if name.endswith("weight") and ".c_" in name else value


def _results(
    model: torch.nn.Module, names: list[str], dtype: torch.dtype, ids: Tensor, labels: Tensor, **options: Any
) -> Outputs:
    model = copy.deepcopy(model).to(dtype)
    if isinstance(model, TransformerForCausalLM):
        output = model(ids, shift_labels=labels, **options)
        loss = output.loss
    else:  # whose own loss knows no float64
        output = model(ids, **options)
        loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    results = {"loss": loss, "logits": output.logits[labels != -100]}
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(
        list(results.values()), [parameters[name] for name in names], list(incoming(results).values())
    )
    turned = (
        grad if isinstance(model, TransformerForCausalLM) else _turned(name, grad)
        for name, grad in zip(names, grads, strict=True)
    )
    return results | dict(zip(names, turned, strict=True))


def check_against_gpt2(model: TransformerForCausalLM, ids: Tensor, labels: Tensor, **options: Any) -> None:
    """Loss, logits where there is a target, and every gradient agree with GPT-2's, on every ISA."""
    names, twin = names_of(model), gpt2_of(model)
    theirs = list(names.values())
    same, truth = (_renamed(_results(twin, theirs, dtype, ids, labels, **options), names) for dtype in _DTYPES)
    for _ in each_isa(torch.float32):
        got = _results(model, list(names), torch.float32, ids, labels, **options)
        check_all(_renamed(got, {name: name for name in names}), same, truth)


def _renamed(results: Outputs, names: dict[str, str]) -> Outputs:
    grads = {f"grad_{ours}": results[theirs] for ours, theirs in names.items()}
    return {"loss": results["loss"], "logits": results["logits"]} | grads
