"""fastlm.nn.MultiheadAttention inside torch's Transformer layers after replace(): really called, right, put back."""

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import _native
from tests.numerics import Outputs, check_all, incoming

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*mismatched.*mask.*:UserWarning",  # torch's, of bool and float masks together
    "ignore:.*nested.*:UserWarning",
)
NAME = "MultiheadAttention"
EMBED, HEADS, BATCH = 12, 3, 4
MODULE = fastlm.nn.MultiheadAttention.forward.__globals__


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per call of fastlm's attention: whether weights were wanted."""
    seen = []
    call = MODULE["run_module"]

    def counted(route: object, *args: object, **options: object) -> object:
        seen.append(route is MODULE["ATTENTION_WITH_WEIGHTS"])
        return call(route, *args, **options)

    monkeypatch.setitem(MODULE, "run_module", counted)
    return seen


LAYER = {"d_model": EMBED, "nhead": HEADS, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}


def encoder_layer(**options: object) -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(**{**LAYER, **options})


def with_memory(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.flip(1)


# Model, its inputs made from x (B, T, E), the name of its padding argument, its calls of attention.
MODELS = {
    "encoder layer": (encoder_layer, lambda x: (x,), "src_key_padding_mask", 1),
    "encoder layer gelu": (lambda: encoder_layer(activation="gelu"), lambda x: (x,), "src_key_padding_mask", 1),
    "encoder layer norm_first": (lambda: encoder_layer(norm_first=True), lambda x: (x,), "src_key_padding_mask", 1),
    "encoder": (lambda: torch.nn.TransformerEncoder(encoder_layer(), 2), lambda x: (x,), "src_key_padding_mask", 2),
    "encoder, no nesting": (
        lambda: torch.nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False),
        lambda x: (x,),
        "src_key_padding_mask",
        2,
    ),
    "decoder layer": (lambda: torch.nn.TransformerDecoderLayer(**LAYER), with_memory, "tgt_key_padding_mask", 2),
    "decoder": (
        lambda: torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**LAYER), 2),
        with_memory,
        "tgt_key_padding_mask",
        4,
    ),
    "transformer": (
        lambda: torch.nn.Transformer(EMBED, HEADS, 2, 2, 16, 0.0, batch_first=True),
        with_memory,
        "src_key_padding_mask",
        6,
    ),
}
models = pytest.mark.parametrize(("build", "inputs", "padding", "count"), MODELS.values(), ids=MODELS)


def pair(build: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model replaced, and as it was."""
    torch.manual_seed(0)
    theirs = build()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return fastlm.replace(copy.deepcopy(theirs)), theirs


def modes() -> Iterator[tuple[bool, bool]]:
    """(training, gradients)."""
    yield from ((True, True), (False, True), (False, False))


@models
@pytest.mark.parametrize("padded", [False, True], ids=("whole", "padded"))
def test_replaced_is_called_and_right(
    calls: list[bool], build: Callable, inputs: Callable, padding: str, count: int, padded: bool
) -> None:
    ours, theirs = pair(build)
    x = torch.randn(BATCH, 6, EMBED)
    mask = torch.arange(6) >= torch.tensor([6, 3, 1, 4])[:, None]
    options = {padding: mask} if padded else {}
    for training, grad in modes():
        calls.clear()
        with torch.set_grad_enabled(grad):
            ours.train(training)(*inputs(x), **options)
        assert calls == [False] * count, (training, grad)
        results = [
            model_outputs(model.train(training), dtype, inputs(x), options, grad, mask if padded else None)
            for model, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
        ]
        check_all(*results, scale=1.0)


def model_outputs(
    model: torch.nn.Module,
    dtype: torch.dtype,
    inputs: tuple[Tensor, ...],
    options: dict,
    grad: bool,
    past: Tensor | None,
) -> Outputs:
    """The output, and gradients of all parameters. Not where `past`: torch's nested tensors give 0 there."""
    model = copy.deepcopy(model).to(dtype)
    with torch.set_grad_enabled(grad):
        output = model(*(x.to(dtype) for x in inputs), **options)
        output = output if past is None else output.masked_fill(past[..., None], 0)
    if not grad:
        return {"output": output}
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(output, list(parameters.values()), incoming({"output": output})["output"])
    return {"output": output} | {f"grad_{name}": value for name, value in zip(parameters, grads, strict=True)}


@models
def test_causal_models(calls: list[bool], build: Callable, inputs: Callable, padding: str, count: int) -> None:
    ours, theirs = pair(build)
    x = torch.randn(BATCH, 6, EMBED)
    name = "mask" if build().__class__ is torch.nn.TransformerEncoder else "tgt_mask" if count != 1 else "src_mask"
    hint = {"src_mask": "is_causal", "mask": "is_causal", "tgt_mask": "tgt_is_causal"}[name]
    options = {name: torch.nn.Transformer.generate_square_subsequent_mask(6)}
    for (training, grad), hinted in product(modes(), (False, True)):
        given = {**options, hint: True} if hinted else options
        if not hinted and isinstance(ours, torch.nn.TransformerEncoder):
            given = {**options, hint: False}
        results = [
            model_outputs(model.train(training), dtype, inputs(x), {
                key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in given.items()
            }, grad, None)
            for model, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
        ]  # fmt: skip
        check_all(*results, scale=1.0)
    assert calls


def settings(model: torch.nn.Module) -> dict[str, object]:
    """Everything of torch's that replace() may touch."""
    names = ("activation_relu_or_gelu", "use_nested_tensor", "enable_nested_tensor")
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        for name in names
        if hasattr(module, name)
    } | {f"{path}.class": type(module) for path, module in model.named_modules()}


@models
def test_restore(build: Callable, inputs: Callable, padding: str, count: int) -> None:
    model = build()
    attributes = [set(vars(module)) for module in model.modules()]
    before = settings(model)
    fastlm.replace(model)
    once = settings(model)
    assert once != before
    assert settings(fastlm.replace(model)) == once
    copied = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    for replaced in (model, copied, loaded):
        assert settings(fastlm.restore(replaced)) == before
        assert [set(vars(module)) for module in replaced.modules()] == attributes
    assert settings(fastlm.restore(model)) == before


def test_a_part_restored_or_added_later(calls: list[bool]) -> None:
    """replace() on a model whose layer was replaced before, and a new layer added to a replaced encoder."""
    encoder = torch.nn.TransformerEncoder(encoder_layer(), 2).eval()
    before = settings(encoder)
    fastlm.replace(encoder.layers[0])
    fastlm.replace(encoder)
    encoder.layers.append(encoder_layer().eval())
    x = torch.randn(BATCH, 6, EMBED)
    fastlm.replace(encoder)
    with torch.no_grad():
        encoder(x)
    assert len(calls) == 3
    del encoder.layers[2]
    assert settings(fastlm.restore(encoder)) == before


def test_explain_a_model() -> None:
    told = fastlm.explain(fastlm.replace(torch.nn.TransformerEncoder(encoder_layer(), 2)))
    assert told["replaced"] == {f"layers.{i}.self_attn": f"fastlm.nn.{NAME}" for i in range(2)}
    attention = fastlm.nn.MultiheadAttention(EMBED, HEADS)
    told = fastlm.explain(attention, *(torch.randn(5, BATCH, EMBED),) * 3)
    assert told["backend"] == ("cpu" if _native.module else "reference")
    with fastlm.backend("reference"):
        assert fastlm.explain(attention, *(torch.randn(5, BATCH, EMBED),) * 3)["backend"] == "reference"


def test_explain_tells_of_a_fast_path() -> None:
    layer = encoder_layer()
    layer.self_attn = fastlm.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 1)
    left = fastlm.explain(encoder)["left"]
    assert list(left) == ["layers.0"]
    assert "fast path for evaluation runs torch's attention" in left["layers.0"]
    assert fastlm.explain(fastlm.replace(encoder))["left"] == {}
