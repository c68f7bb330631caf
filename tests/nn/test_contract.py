"""What torch.nn promises of its modules beyond the numbers."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_map

import fastlm
from tests.nn.twins import CELLS, LAYERS, check_twins, make, outputs_of, states
from tests.numerics import check, check_all

layer = pytest.mark.parametrize("name", LAYERS)
every = pytest.mark.parametrize("name", LAYERS + CELLS)


def example(name: str) -> Tensor:
    """An input for any module of input_size 5."""
    return torch.randn(4, 5) if name in CELLS else torch.randn(6, 4, 5)


def same_to_the_bit(got: object, expected: object) -> bool:
    got, expected = outputs_of(got), outputs_of(expected)
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


CONSTRUCTIONS = {
    "positional": ((5, 7, 2, False, True, 0.5, True), {}),
    "keywords": ((5, 7), {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}),
    "device": ((5, 7), {"device": "cpu"}),
    "dropout text": ((5, 7), {"dropout": "a"}),
    "dropout bool": ((5, 7, 2), {"dropout": True}),
    "dropout range": ((5, 7, 2), {"dropout": 1.5}),
    "dropout one layer": ((5, 7), {"dropout": 0.5}),
    "bias": ((5, 7), {"bias": 1}),
    "batch_first": ((5, 7), {"batch_first": 0}),
    "input_size type": ((5.0, 7), {}),
    "input_size": ((0, 7), {}),
    "hidden_size type": ((5, "7"), {}),
    "hidden_size": ((5, 0), {}),
    "num_layers": ((5, 7, 0), {}),
    "proj_size": ((5, 7), {"proj_size": 7}),
    "proj_size negative": ((5, 7), {"proj_size": -1}),
    "proj_size positional": ((5, 7, 1, True, False, 0.0, False, 0), {}),
}


@layer
@pytest.mark.parametrize(("args", "options"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_construction(name: str, args: tuple, options: dict) -> None:
    """The same parameters with the same values in the same order, the same repr, errors and warnings."""

    def build(namespace: object) -> tuple[object, list[str]]:
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                module = getattr(namespace, name)(*args, **options)
            except (TypeError, ValueError) as error:
                return (type(error), str(error)), []
        return module, [str(warning.message) for warning in caught]

    (ours, our_warnings), (theirs, their_warnings) = build(fastlm.nn), build(torch.nn)
    assert our_warnings == their_warnings
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert repr(ours) == repr(theirs)
    for (our_name, weight), (their_name, expected) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert our_name == their_name
        assert torch.equal(weight, expected)
        assert weight.dtype == expected.dtype
    for attribute in torch.nn.RNNBase.__constants__ + ["_flat_weights_names", "_all_weights"]:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert all(map(torch.equal, ours._flat_weights, theirs._flat_weights))


BAD_CALLS = {
    "4-D": lambda name: (torch.randn(1, 2, 3, 5), None),
    "1-D": lambda name: (torch.randn(5), None),
    "input size": lambda name: (torch.randn(6, 4, 3), None),
    "input size unbatched": lambda name: (torch.randn(6, 3), None),
    "dtype": lambda name: (torch.randn(6, 4, 5).double(), None),
    "no step": lambda name: (torch.randn(0, 4, 5), None),
    "hx rank": lambda name: (torch.randn(6, 4, 5), states(name, (4, 7))),
    "hx rank unbatched": lambda name: (torch.randn(6, 5), states(name, (2, 1, 7))),
    "hx batch": lambda name: (torch.randn(6, 4, 5), states(name, (2, 3, 7))),
    "hx layers": lambda name: (torch.randn(6, 4, 5), states(name, (1, 4, 7))),
    "hx size": lambda name: (torch.randn(6, 4, 5), states(name, (2, 4, 6))),
    "hx size unbatched": lambda name: (torch.randn(6, 5), states(name, (2, 6))),
}


@layer
@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_are_torchs(name: str, bad) -> None:
    ours, theirs = make(name, 5, 7, num_layers=2)
    input, hx = bad(name)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        theirs(input, hx)
    with pytest.raises(expected.type) as got:
        ours(input, hx)
    assert str(got.value) == str(expected.value)


@layer
def test_errors_of_packed_input(name: str) -> None:
    """As torch.nn.GRU; torch.nn.LSTM does not check here."""
    module, packed = make(name, 5, 7)[0], pack_sequence([torch.randn(2, 5)])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 3"):
        module(pack_sequence([torch.randn(2, 3)]))
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match weight dtype"):
        module(packed.double())
    with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 1, 7\), got \[1, 3, 7\]"):
        module(packed, states(name, (1, 3, 7)))


def test_cell_state_size_is_checked() -> None:
    module = fastlm.nn.LSTM(5, 7)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 4, 7\), got \[1, 4, 6\]"):
        module(torch.randn(6, 4, 5), (torch.randn(1, 4, 7), torch.randn(1, 4, 6)))


@layer
def test_state_of_wrong_dtype_is_named(name: str) -> None:
    h, c = torch.randn(1, 4, 7).double(), torch.randn(1, 4, 7)
    with pytest.raises(ValueError, match=r"h0: expected dtype torch.float32 .*got torch.float64"):
        make(name, 5, 7)[0](torch.randn(6, 4, 5), h if name == "GRU" else (h, c))


@every
def test_state_dict_both_ways(name: str) -> None:
    ours, theirs = make(name, 5, 7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1)
    ours.load_state_dict(theirs.state_dict())
    check_twins(ours, theirs, example(name))
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


@every
def test_copies(name: str) -> None:
    """deepcopy, pickle and torch.save of a whole module, the last read with weights_only=True."""
    module, input = make(name, 5, 7)[0].eval(), example(name)
    module.register_forward_hook(print_nothing)
    buffer = io.BytesIO()
    torch.save(make(name, 5, 7)[0], buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=True)]
    expected = module(input)
    with torch.no_grad():
        next(module.parameters()).zero_()
    for made in copies:
        assert type(made) is type(module)
        assert same_to_the_bit(made(input), expected)


def print_nothing(*_: object) -> None:
    """A hook that can be pickled."""


@every
def test_devices_and_memory(name: str) -> None:
    kind = getattr(fastlm.nn, name)
    module = make(name, 5, 7)[0]
    state = copy.deepcopy(module.state_dict())
    input, expected = (x := example(name)), module(x)
    module.to("meta")
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    module.to_empty(device="cpu").load_state_dict(state)
    assert same_to_the_bit(module(input), expected)
    assert all(parameter.is_shared() for parameter in module.share_memory().parameters())
    assert same_to_the_bit(module(input), expected)
    with torch.device("meta"):
        assert kind(5, 7).weight_hh.is_meta if name in CELLS else kind(5, 7).weight_hh_l0.is_meta
    skipped = torch.nn.utils.skip_init(kind, 5, 7)
    skipped.load_state_dict(state)
    assert same_to_the_bit(skipped(input), expected)


@every
def test_half_and_double(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        module = make(name, 5, 7)[0].to(dtype)
        assert {value.dtype for value in outputs_of(module(example(name).to(dtype))).values()} == {dtype}


@every
def test_hooks(name: str) -> None:
    module, seen = make(name, 5, 7)[0], []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    next(iter(outputs_of(module(example(name).requires_grad_())).values())).sum().backward()
    assert seen == ["before", "after", "backward"]


@every
def test_replaced_weights_count_at_once(name: str) -> None:
    module, other = make(name, 5, 7)[0], getattr(fastlm.nn, name)(5, 7)
    input = example(name)
    expected = other(input)
    assert same_to_the_bit(functional_call(module, dict(other.named_parameters()), (input,)), expected)
    assert not same_to_the_bit(module(input), expected)
    for key, weight in other.named_parameters():
        setattr(module, key, weight)
    assert same_to_the_bit(module(input), expected)


@layer
def test_ensemble_by_vmap(name: str) -> None:
    modules = [getattr(fastlm.nn, name)(5, 7, num_layers=2, bidirectional=True) for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    input = example(name)
    got = outputs_of(vmap(lambda p, b: functional_call(modules[0], (p, b), (input,)))(parameters, buffers))
    for i, module in enumerate(modules):
        truth = outputs_of(copy.deepcopy(module).double()(input.double()))
        for key, same in outputs_of(module.to_torch()(input)).items():
            check(key, got[key][i], same, truth[key])


WEIGHT_NORMS = {
    "hook": torch.nn.utils.weight_norm,
    "parametrisation": parametrizations.weight_norm,
    "spectral": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@every
@pytest.mark.parametrize("norm", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
def test_computed_weights(name: str, norm) -> None:
    ours, theirs = make(name, 5, 7)
    exact = copy.deepcopy(theirs)
    for module in (ours, theirs, exact):
        torch.manual_seed(0)
        # In training a spectral norm moves at each reading of the weight, and torch.nn.GRU reads it more than once.
        norm(module.eval(), "weight_hh" if name in CELLS else "weight_hh_l0")
    call = example(name), states(name, (4, 7) if name in CELLS else (1, 4, 7))
    got, same = (outputs_of(module(*call)) for module in (ours, theirs))
    check_all(got, same, outputs_of(exact.double()(*tree_map(torch.Tensor.double, call))))
    total = sum(value.sum() for value in got.values())
    for parameter, got in zip(ours.parameters(), torch.autograd.grad(total, list(ours.parameters())), strict=True):
        assert got.shape == parameter.shape
        assert got.abs().sum() > 0
    before = ours(*call)
    with torch.no_grad():
        last = list(ours.parameters())[-1]
        last.add_(torch.linspace(0, 1, last.numel()).view_as(last))  # a factor would be normalised away
    assert not same_to_the_bit(ours(*call), before)


@layer
def test_deepcopy_of_a_parametrised_module_that_ran(name: str) -> None:
    module = parametrizations.weight_norm(make(name, 5, 7)[0], "weight_hh_l0")
    expected = module(x := example(name))
    assert same_to_the_bit(copy.deepcopy(module)(x), expected)


@every
def test_data_parallel_replica(name: str) -> None:
    """torch.nn.DataParallel gives a replica its weights as plain tensors."""
    module, input = make(name, 5, 7)[0], example(name)
    expected = module(input)
    replica = module._replicate_for_data_parallel()
    for key, weight in module.named_parameters():
        setattr(replica, key, 2 * weight.detach())
    assert not same_to_the_bit(replica(input), expected)
    assert same_to_the_bit(module(input), expected)


@layer
def test_helpers_are_torchs(name: str) -> None:
    """Methods that callers of torch.nn.RNNBase know."""
    ours, theirs = make(name, 5, 7, num_layers=2, bidirectional=True)
    input, sizes, hx = torch.randn(6, 3, 5), None, states(name, (4, 3, 7))
    order = torch.tensor([2, 0, 1])
    for module in (ours, theirs):
        assert module.flatten_parameters() is None
        module.check_input(input, sizes)
        module.check_forward_args(input, hx, sizes)
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 4"):
            module.check_input(input[..., :4], sizes)
        with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size \(4, 3, 7\), got \[4, 3, 6\]"):
            module.check_forward_args(input, tree_map(lambda state: state[..., :6], hx), sizes)
    assert ours.get_expected_hidden_size(input, sizes) == theirs.get_expected_hidden_size(input, sizes) == (4, 3, 7)
    assert same_to_the_bit(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    if name == "LSTM":
        assert ours.get_expected_cell_size(input, sizes) == theirs.get_expected_cell_size(input, sizes)


@layer
@pytest.mark.parametrize("requires_grad", [True, False])
def test_inputs_with_the_batch_first_may_change_before_backward(name: str, requires_grad: bool) -> None:
    """As torch, which keeps a copy of what it transposes: `x += layer(x)[0]`, or a buffer that is filled anew."""
    results = []
    for module in make(name, 5, 5, batch_first=True):
        module, leaf = module.double(), torch.linspace(-1, 1, 60, dtype=torch.float64).view(3, 4, 5)
        leaf.requires_grad_(requires_grad)
        x = leaf * 1
        x += module(x)[0]
        buffer = leaf.detach().clone()
        output = module(buffer)[0]
        buffer.zero_()
        wanted = [*module.parameters(), *([leaf] if requires_grad else [])]
        results.append(torch.autograd.grad((x.sin() + output).sum(), wanted))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@every
def test_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = make(name, 5, 7)
        assert all(parameter.dtype == torch.float64 for parameter in ours.parameters())
        check_twins(ours, theirs, example(name))
    finally:
        torch.set_default_dtype(torch.float32)


@every
@pytest.mark.parametrize("training", [True, False])
def test_to_torch(name: str, training: bool) -> None:
    ours = make(name, 5, 7, bias=False)[0].train(training)
    theirs = ours.to_torch()
    assert type(theirs) is getattr(torch.nn, name)
    assert theirs.training is training
    assert repr(theirs) == repr(ours)
    for (key, weight), (expected_key, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert key == expected_key
        assert weight is expected
    check_twins(ours, theirs, example(name))
    theirs.double()
    theirs.register_forward_hook(lambda *_: pytest.fail("a hook of the torch module ran on the other"))
    theirs.register_parameter("extra", None)
    ours.float()(example(name))
    assert "extra" not in ours._parameters


def test_to_torch_refuses_parametrised() -> None:
    module = parametrizations.weight_norm(fastlm.nn.GRU(5, 7), "weight_hh_l0")
    with pytest.raises(ValueError, match="remove_parametrizations"):
        module.to_torch()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every
def test_torchscript_is_refused_and_to_torch_goes(name: str) -> None:
    module = make(name, 5, 7)[0]
    with pytest.raises(NotImplementedError, match=rf"{name}\.to_torch\(\)"):
        torch.jit.script(torch.nn.Sequential(module))
    torch.jit.script(torch.nn.Sequential(module.to_torch()))(example(name))


class Net(torch.nn.Module):
    """Every module, layers and directions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = fastlm.nn.GRU(5, 7, num_layers=2, batch_first=True)
        self.lstm = fastlm.nn.LSTM(7, 9, bidirectional=True)
        self.gru_cell = fastlm.nn.GRUCell(18, 3)
        self.lstm_cell = fastlm.nn.LSTMCell(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, h_n = self.gru(x)
        output, (_, c_n) = self.lstm(output.transpose(0, 1))
        h = self.gru_cell(output[-1])
        return self.lstm_cell(h, (h, h))[1], h_n, c_n


SHAPES = ((11, 6, 5), (13, 8, 5), (4, 19, 5))


def test_compile_once_for_all_sizes() -> None:
    net = Net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    compilations = 0
    for shape in SHAPES:
        x = torch.randn(shape)
        got, expected = compiled(x), net(x)
        assert same_to_the_bit(got, expected)
        weights = list(net.parameters())
        got, expected = (torch.autograd.grad(sum(map(torch.sum, result)), weights) for result in (got, expected))
        assert same_to_the_bit(got, expected)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations
    with torch.no_grad():
        assert same_to_the_bit(compiled(x), net(x))


@layer
def test_compile_with_states_and_autocast(name: str) -> None:
    module = make(name, 5, 7, num_layers=2)[0]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x, hx = example(name), states(name, (2, 4, 7))
    assert same_to_the_bit(compiled(x, hx), module(x, hx))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_to_the_bit(compiled(x, hx), module(x, hx))


def test_compile_by_inductor() -> None:
    module = fastlm.nn.GRU(5, 7)
    x, expected = (given := torch.randn(6, 4, 5)), module(given)
    with torch.no_grad():
        assert same_to_the_bit(torch.compile(module, fullgraph=True)(x), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    net = Net()
    sizes = {0: Dim("batch", min=2), 1: Dim("time", min=2)}
    exported = torch.export.export(net, (torch.randn(SHAPES[0]),), dynamic_shapes=(sizes,), strict=strict)
    for shape in SHAPES[1:]:
        x = torch.randn(shape)
        assert same_to_the_bit(exported.module()(x), net(x))


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        net = Net()
        result = net(torch.randn(11, 6, 5))
        sum(map(torch.sum, result)).backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in net.parameters())
    shapes = [value.shape for value in result]
    assert shapes == [value.shape for value in Net().to("meta")(torch.randn(11, 6, 5, device="meta"))]
