"""fastlm.nn.MultiheadAttention against torch.nn's, alone and under torch's Transformer layers after replace()."""

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import _native
from tests.nn.twins import make
from tests.numerics import Outputs, check_all, incoming

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*mismatched.*mask.*:UserWarning",  # torch's, of bool and float masks together
    "ignore:.*nested.*:UserWarning",
)
NAME = "MultiheadAttention"
EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 4, 5, 7
MODULE = fastlm.nn.MultiheadAttention.forward.__globals__


def example(options: dict, form: str = "self", batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value; form: self (all one), kv (key is value), cross."""
    batch_first = options.get("batch_first", False)
    lead = (BATCH,) if batched else ()

    def draw(rows: int, width: int) -> Tensor:
        x = torch.randn(*lead, rows, width)
        return x if batch_first or not batched else x.transpose(0, 1).contiguous()

    query = draw(QUERIES, EMBED)
    if form == "self":
        return query, query, query
    key = draw(KEYS, options.get("kdim", EMBED))
    return query, key, key if form == "kv" else draw(KEYS, options.get("vdim", EMBED))


def masks(attn_mask: str | None, padding: str | None, keys: int, batched: bool = True) -> dict[str, Tensor]:
    """attn_mask: bool or float, 2 or 3 (dimensions), as in "bool 2"; padding: bool or float. Key 0 is seen by all."""
    made = {}
    if attn_mask:
        kind, rank = attn_mask.split()
        shape = (QUERIES, keys) if rank == "2" else ((BATCH if batched else 1) * HEADS, QUERIES, keys)
        made["attn_mask"] = torch.randn(shape) if kind == "float" else torch.rand(shape) < 0.4
    if padding:
        shape = (BATCH, keys) if batched else (keys,)
        made["key_padding_mask"] = torch.randn(shape) if padding == "float" else torch.rand(shape) < 0.4
    for mask in made.values():
        mask[..., 0] = 0
    return made


def run(module: torch.nn.Module, dtype: torch.dtype, inputs: tuple[Tensor, ...], options: dict, grad: bool) -> Outputs:
    """Output and weights of a copy of module in that dtype, and as grad_<name> the gradient of everything."""
    module = copy.deepcopy(module).to(dtype)
    made: dict[int, Tensor] = {}  # inputs that are one object stay one
    given = [made.setdefault(id(x), x.detach().to(dtype).requires_grad_(grad)) for x in inputs]
    options = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        results = module(*given, **options)
    outputs = {name: out for name, out in zip(("output", "weights"), results, strict=True) if out is not None}
    if not grad:
        return outputs
    leaves = dict(module.named_parameters()) | {f"input {i}": x for i, x in enumerate(made.values())}
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(incoming(outputs).values()), materialize_grads=True
    )
    return outputs | {f"grad_{name}": value for name, value in zip(leaves, grads, strict=True)}


def check_twins(
    ours: torch.nn.Module, theirs: torch.nn.Module, inputs: tuple[Tensor, ...], grad: bool = True, **options: object
) -> None:
    same, truth = (run(theirs, dtype, inputs, options, grad) for dtype in (torch.float32, torch.float64))
    check_all(run(ours, torch.float32, inputs, options, grad), same, truth, 1.0)


def twins(**options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """With biases that are not 0, as they are at first."""
    ours, theirs = make(NAME, EMBED, HEADS, **options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


CONSTRUCTIONS = {
    "default": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim": {"kdim": 5},
    "vdim": {"vdim": 6, "batch_first": True},
    "kdim and vdim": {"kdim": 5, "vdim": 6, "bias": False, "add_bias_kv": True},
}
constructions = pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
ATTN_MASKS = (None, "bool 2", "float 2", "bool 3", "float 3")
PADDINGS = (None, "bool", "float")


def forms(options: dict) -> list[str]:
    kdim, vdim = options.get("kdim", EMBED), options.get("vdim", EMBED)
    return ["cross", *(["kv"] if kdim == vdim else []), *(["self"] if kdim == vdim == EMBED else [])]


# Constructions and calls.


@constructions
def test_construction(options: dict) -> None:
    """The same parameters with the same values in the same order, the same repr."""
    ours, theirs = make(NAME, EMBED, HEADS, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, weight), (expected_name, expected) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(weight, expected)


def test_bad_constructions() -> None:
    for args in ((10, 3), (0, 1), (12, 0)):
        with pytest.raises((AssertionError, ValueError)) as expected:
            torch.nn.MultiheadAttention(*args)
        with pytest.raises(expected.type) as got:
            fastlm.nn.MultiheadAttention(*args)
        assert str(got.value) == str(expected.value)


@constructions
@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
def test_masks(options: dict, mode: str) -> None:
    ours, theirs = (module.train(mode == "train") for module in twins(**options))
    for attn_mask, padding in product(ATTN_MASKS, PADDINGS):
        form = forms(options)[len(f"{attn_mask}{padding}") % len(forms(options))]
        inputs = example(options, form)
        given = masks(attn_mask, padding, QUERIES if form == "self" else KEYS)
        check_twins(ours, theirs, inputs, mode != "eval without gradients", need_weights=False, **given)


@constructions
@pytest.mark.parametrize("average", [True, False], ids=("average", "every head"))
def test_weights(options: dict, average: bool) -> None:
    ours, theirs = twins(**options)
    for form, attn_mask, padding in product(forms(options), (None, "bool 2", "float 3"), (None, "bool")):
        given = masks(attn_mask, padding, QUERIES if form == "self" else KEYS)
        check_twins(ours, theirs, example(options, form), need_weights=True, average_attn_weights=average, **given)


@constructions
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
def test_unbatched(options: dict, training: bool) -> None:
    ours, theirs = (module.train(training) for module in twins(**options))
    for form, attn_mask, padding, weights in product(
        forms(options), (None, "float 2", "bool 3"), (None, "bool"), (True, False)
    ):
        given = masks(attn_mask, padding, QUERIES if form == "self" else KEYS, batched=False)
        check_twins(ours, theirs, example(options, form, batched=False), need_weights=weights, **given)


@pytest.mark.parametrize("kind", ["bool", "float"])
@constructions
def test_is_causal(options: dict, kind: str) -> None:
    ours, theirs = twins(**options)
    for form, weights, padding in product(forms(options), (True, False), (None, "bool")):
        keys = QUERIES if form == "self" else KEYS
        seen = torch.ones(QUERIES, keys, dtype=torch.bool).tril()
        mask = ~seen if kind == "bool" else torch.zeros(QUERIES, keys).masked_fill(~seen, -torch.inf)
        given = {"attn_mask": mask, "need_weights": weights} | masks(None, padding, keys)
        # With keys of its own torch drops the mask for the hint when no weights are wanted; here the mask counts.
        hint = {"is_causal": True}
        more_keys = "add_bias_kv" in options or "add_zero_attn" in options
        inputs = example(options, form)
        check_twins(ours, theirs, inputs, **given, **({} if more_keys else hint))
        expected, got = (run(ours, torch.float32, inputs, {**given, **more}, True) for more in ({}, hint))
        check_all(got, expected, run(theirs, torch.float64, inputs, given, True), 1.0)


def test_is_causal_without_mask() -> None:
    ours, theirs = twins()
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            module(*example({}), is_causal=True)


def test_keys_that_are_views_of_one_tensor() -> None:
    """Not the same object, so three products; the same numbers."""
    ours, theirs = twins(batch_first=True)
    x = torch.randn(BATCH, QUERIES, EMBED)
    check_twins(ours, theirs, (x, x.clone(), x.clone()))


def test_other_dtypes() -> None:
    ours, _ = twins(batch_first=True)
    x = torch.randn(BATCH, QUERIES, EMBED)
    for dtype in (torch.float64, torch.bfloat16):
        output, weights = copy.deepcopy(ours).to(dtype)(*[x.to(dtype)] * 3)
        assert output.dtype == weights.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x, x, x)[0].dtype == torch.bfloat16


def test_empty_batch() -> None:
    ours, theirs = twins(batch_first=True)
    x = torch.randn(0, QUERIES, EMBED)
    for module in (ours, theirs):
        output, weights = module(x, x, x)
        assert output.shape == (0, QUERIES, EMBED)
        assert weights.shape == (0, QUERIES, QUERIES)


def test_memory_order_of_the_result() -> None:
    for batch_first in (False, True):
        ours, theirs = twins(batch_first=batch_first)
        inputs = example({"batch_first": batch_first})
        assert ours(*inputs)[0].is_contiguous()
        assert ours(*inputs)[0].shape == theirs(*inputs)[0].shape


def test_fully_padded_rows_give_zero() -> None:
    """NaN with torch in training; here the projection of 0."""
    ours, _ = twins(batch_first=True)
    x = torch.randn(BATCH, QUERIES, EMBED, requires_grad=True)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1] = True
    output, weights = ours(x, x, x, key_padding_mask=padding)
    assert torch.equal(output[1], ours.out_proj.bias.expand(QUERIES, -1))
    assert not weights[1].any()
    for grad in torch.autograd.grad(output.sum() + weights.square().sum(), (x, *ours.parameters())):
        assert grad.isfinite().all()


# Dropout.


def test_dropout() -> None:
    ours = twins(dropout=0.5, batch_first=True)[0]
    x = torch.randn(64, 20, EMBED)
    output, weights = ours(x, x, x, average_attn_weights=False)
    kept = (weights != 0).double()
    assert abs(kept.mean() - 0.5) < 5 * (0.25 / kept.numel()) ** 0.5
    # What is returned is what met the values.
    values = torch.nn.functional.linear(x, ours.in_proj_weight[2 * EMBED :], ours.in_proj_bias[2 * EMBED :])
    values = values.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def by_hand(dtype: torch.dtype) -> Tensor:
        met = (weights.to(dtype) @ values.to(dtype)).transpose(1, 2).flatten(-2)
        return torch.nn.functional.linear(met, ours.out_proj.weight.to(dtype), ours.out_proj.bias.to(dtype))

    check_all({"output": output}, {"output": by_hand(torch.float32)}, {"output": by_hand(torch.float64)}, 1.0)
    whole = ours.eval()(x, x, x, average_attn_weights=False)[1]
    check_all({"kept": weights}, *({"kept": 2 * whole.to(d) * kept.to(d)} for d in (torch.float32, torch.float64)), 1.0)


def test_dropout_follows_the_seed_and_the_mode() -> None:
    ours = twins(dropout=0.5)[0]
    inputs = example({})
    results = []
    for weights in (True, False):
        torch.manual_seed(1)
        results.append(ours(*inputs, need_weights=weights)[0])
    torch.testing.assert_close(*results)  # the same weights dropped, summed in another order
    assert not torch.allclose(ours(*inputs)[0], results[0])
    ours.eval()
    assert torch.equal(ours(*inputs)[0], ours(*inputs)[0])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dropout", [1.5, -0.5, float("nan")])
def test_impossible_dropout_is_an_error(dropout: float, need_weights: bool) -> None:
    ours = fastlm.nn.MultiheadAttention(EMBED, HEADS, dropout=dropout)
    with pytest.raises(ValueError, match=r"^dropout: expected a number from 0 to 1, got"):
        ours(*example({}), need_weights=need_weights)


# What torch.nn promises of a module.


def bad_calls() -> dict[str, Callable[[], tuple[tuple[Tensor, ...], dict]]]:
    x, y = torch.randn(QUERIES, BATCH, EMBED), torch.randn(KEYS, BATCH, EMBED)
    mask, padding = torch.zeros(QUERIES, KEYS), torch.zeros(BATCH, KEYS, dtype=torch.bool)
    return {
        "4-D": lambda: ((x[None],) * 3, {}),
        "key rank": lambda: ((x, y[0], y), {}),
        "value rank": lambda: ((x, y, y[0]), {}),
        "width": lambda: ((x[..., 1:],) * 3, {}),
        "key and value lengths": lambda: ((x, y, y[1:]), {}),
        "attn_mask shape": lambda: ((x, y, y), {"attn_mask": mask[:, 1:]}),
        "attn_mask 3-D": lambda: ((x, y, y), {"attn_mask": mask[None]}),
        "attn_mask 1-D": lambda: ((x, y, y), {"attn_mask": mask[0]}),
        "attn_mask dtype": lambda: ((x, y, y), {"attn_mask": mask.long()}),
        "padding rank": lambda: ((x, y, y), {"key_padding_mask": padding[0]}),
        "padding dtype": lambda: ((x, y, y), {"key_padding_mask": padding.long()}),
        "unbatched padding": lambda: ((x[:, 0], y[:, 0], y[:, 0]), {"key_padding_mask": padding}),
        "unbatched mask": lambda: ((x[:, 0], y[:, 0], y[:, 0]), {"attn_mask": mask.expand(2, -1, -1)}),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_errors_are_torchs(name: str) -> None:
    ours, theirs = twins()
    inputs, options = bad_calls()[name]()
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        theirs(*inputs, **options)
    with pytest.raises(expected.type) as got:
        ours(*inputs, **options)
    assert str(got.value) == str(expected.value)


def test_padding_of_a_wrong_size_is_an_error() -> None:
    """torch says nothing of it where it can be broadcast."""
    ours = twins()[0]
    for shape in ((BATCH, QUERIES + 1), (BATCH + 1, QUERIES)):
        with pytest.raises((AssertionError, RuntimeError)):
            ours(*example({}), key_padding_mask=torch.zeros(shape, dtype=torch.bool))


@constructions
def test_state_dict_both_ways(options: dict) -> None:
    ours, theirs = twins(**options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1)
    theirs.load_state_dict(ours.state_dict())
    check_twins(ours, theirs, example(options, "cross"))


def test_copies_and_to_torch() -> None:
    ours = twins(add_bias_kv=True)[0].eval()
    inputs = example({}, "cross")
    expected = ours(*inputs)[0]
    theirs = ours.to_torch()
    assert type(theirs) is torch.nn.MultiheadAttention
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert next(theirs.parameters()) is next(ours.parameters())
    check_twins(ours, theirs, inputs)
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(made) is type(ours)
        assert torch.equal(made(*inputs)[0], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=rf"{NAME}\.to_torch\(\)"):
        torch.jit.script(torch.nn.Sequential(twins()[0]))


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile(need_weights: bool) -> None:
    torch._dynamo.reset()
    ours = twins(batch_first=True)[0]
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((3, 5), (4, 9)):
        x = torch.randn(batch, length, EMBED)
        padding = torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))
        results = []
        for module in (compiled, ours):
            output, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
            results.append(torch.cat((output, weights), -1) if need_weights else output)
        assert torch.equal(*results)
        grads = [torch.autograd.grad(out.square().sum(), list(ours.parameters())) for out in results]
        assert all(map(torch.equal, *grads))


# After replace().


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
    told = fastlm.explain(attention, *example({}))
    assert told["backend"] == ("cpu" if _native.module else "reference")
    with fastlm.backend("reference"):
        assert fastlm.explain(attention, *example({}))["backend"] == "reference"


def test_explain_tells_of_a_fast_path() -> None:
    layer = encoder_layer()
    layer.self_attn = fastlm.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 1)
    left = fastlm.explain(encoder)["left"]
    assert list(left) == ["layers.0"]
    assert "fast path for evaluation runs torch's attention" in left["layers.0"]
    assert fastlm.explain(fastlm.replace(encoder))["left"] == {}


def test_nested_tensors_are_torchs_and_told(monkeypatch) -> None:
    module = fastlm.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        with pytest.warns(fastlm.FastlmFallbackWarning, match="attention has no kernel for nested tensors"):
            got = module(x, x, x, need_weights=False)[0]
        expected = module.to_torch()(x, x, x, need_weights=False)[0]
        assert torch.equal(got.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
        told = fastlm.explain(lambda: module(x, x, x, need_weights=False))
        assert told["backend"] == "reference"
        monkeypatch.setenv("FASTLM_STRICT", "1")
        with pytest.raises(RuntimeError, match="nested tensors"):
            module(x, x, x, need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("others", [{}, {"kdim": 8, "vdim": 8}, {"bias": False}], ids=str)
def test_inputs_with_the_batch_first_may_change_before_backward(others: dict, need_weights: bool) -> None:
    """As torch, which keeps a copy of what it transposes: `x += attention(x, x, x)[0]`."""
    results = []
    ours = fastlm.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **others)
    for module in (ours, ours.to_torch()):
        leaf = torch.linspace(-1, 1, 80, dtype=torch.float64).view(2, 5, 8).requires_grad_()
        x = leaf * 1
        x += module(x, x, x, need_weights=need_weights)[0]
        keys = leaf.sin()
        x = x + module(x, keys, keys, need_weights=need_weights)[0]
        keys.zero_()
        results.append(torch.autograd.grad(x.cos().sum(), [leaf, *module.parameters()]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
