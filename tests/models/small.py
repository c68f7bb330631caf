"""Small random models of every kind, and their torch.nn twins."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from tests.numerics import Outputs, check_all, each_isa, incoming

pytest.importorskip("transformers", reason="transformers is not installed")

from fastlm.models import RNNConfig, RNNForCausalLM
from tests.cache import cache_of

VOCABULARY, PAD, BOS = 37, 0, 1
CELLS = ("gru", "lstm")
# H is 12: a tied output of embeddings of another width has a projection.
OUTPUTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True, "embedding_size": 12},
    "projected": {"tie_word_embeddings": True, "embedding_size": 8},
}
KINDS = [pytest.param(cell, output, id=f"{cell}-{output}") for cell, output in product(CELLS, OUTPUTS)]


def make_model(cell: str = "gru", output: str = "untied", **options: Any) -> RNNForCausalLM:
    """In eval mode, with weights so large that its texts vary and depend on all that came before."""
    values = {"vocab_size": VOCABULARY, "embedding_size": 8, "hidden_size": 12, "num_layers": 2, "pad_token_id": PAD}
    model = RNNForCausalLM(RNNConfig(cell=cell, **values | {"bos_token_id": BOS} | OUTPUTS[output] | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def twin_of(model: RNNForCausalLM) -> RNNForCausalLM:
    """The same model on torch.nn.GRU or LSTM."""
    return fastlm.restore(copy.deepcopy(model))


def random_ids(batch: int = 3, steps: int = 7) -> Tensor:
    """Tokens that are not PAD."""
    return torch.randint(1, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(5))


def run(model: RNNForCausalLM, dtype: torch.dtype, *args: Any, **options: Any) -> Outputs:
    """loss, logits and state of a copy of the model in that dtype, and the gradient of every parameter."""
    model = copy.deepcopy(model).to(dtype)
    output = model(*args, **options)
    results = {"loss": output.loss, "logits": output.logits, "h": cache_of(output).h}
    results = {name: value for name, value in results.items() if value is not None}
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(
        list(results.values()), parameters, list(incoming(results).values()), materialize_grads=True
    )
    return results | {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}


def check_against_twin(model: RNNForCausalLM, *args: Any, **options: Any) -> None:
    """Outputs and every gradient agree with the torch.nn twin, on every ISA."""
    twin = twin_of(model)
    same, truth = (run(twin, dtype, *args, **options) for dtype in (torch.float32, torch.float64))
    for _ in each_isa(torch.float32):
        check_all(run(model, torch.float32, *args, **options), same, truth)
