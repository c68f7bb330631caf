"""fastlm.nn.MultiheadAttention against torch.nn's."""

import copy
import pickle
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from tests.nn.twins import make
from tests.numerics import Outputs, check_all, incoming

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*mismatched.*mask.*:UserWarning",  # torch's, of bool and float masks together
    "ignore:.*nested.*:UserWarning",
)
NAME = "MultiheadAttention"
EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 4, 5, 7


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
    inputs = (torch.randn(20, BATCH, EMBED),) * 3  # so many queries that the weights do not change the order of sums
    results = []
    for weights in (True, False):
        torch.manual_seed(1)
        results.append(ours(*inputs, need_weights=weights)[0])
    assert torch.equal(*results)
    assert not torch.equal(ours(*inputs)[0], results[0])
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
