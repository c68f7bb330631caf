import copy

import pytest
import torch
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import fastlm
from fastlm import _native, _trace
from tests.nn.twins import CELLS, LAYERS, check_twins
from tests.numerics import kernels_only

KINDS = LAYERS + CELLS


class MyGRU(torch.nn.GRU):
    pass


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(5, 7, 2, bidirectional=True)
        self.again = self.gru
        self.inner = torch.nn.Sequential(torch.nn.LSTM(14, 7), torch.nn.GRUCell(5, 7), torch.nn.LSTMCell(5, 7))
        self.mine = MyGRU(5, 7)
        self.normed = parametrizations.weight_norm(torch.nn.GRU(5, 7), "weight_hh_l0")
        self.rnn = torch.nn.RNN(5, 7)
        self.attention = torch.nn.MultiheadAttention(4, 2)
        self.linear = torch.nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[0](self.gru(x)[0])[0]


REPLACED = ["gru", "inner.0", "inner.1", "inner.2", "attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_root_module(kind: str) -> None:
    model = getattr(torch.nn, kind)(5, 7)
    theirs = copy.deepcopy(model)
    before = repr(model)
    assert fastlm.replace(model) is model
    assert type(model) is getattr(fastlm.nn, kind)
    assert repr(model) == before
    check_twins(model, theirs, torch.randn(4, 5) if kind in CELLS else torch.randn(6, 4, 5))


def test_everything_of_a_model_stays() -> None:
    model = Model().eval()
    theirs, seen = copy.deepcopy(model), []
    model.gru.register_forward_hook(lambda *_: seen.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    fastlm.replace(model)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: type(modules[name]).__module__.split(".")[0] for name in REPLACED} == dict.fromkeys(
        REPLACED, "fastlm"
    )
    assert model.again is model.gru
    assert not model.gru.training
    x = torch.randn(6, 4, 5)
    model.gru(x)
    assert seen == ["hook"]
    for net in (model, theirs):
        net.zero_grad()
        net(x).sum().backward()
    optimizer.step()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    model.gru._forward_hooks.clear()
    check_twins(model.inner[0], theirs.inner[0], torch.randn(6, 4, 14))


def test_left_alone() -> None:
    model = Model()
    before = {name: type(module) for name, module in model.named_modules() if name not in REPLACED}
    fastlm.replace(model)
    assert before == {name: type(module) for name, module in model.named_modules() if name not in REPLACED}


def test_twice_and_back() -> None:
    model = Model()
    classes = {name: type(module) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    fastlm.replace(fastlm.replace(model))
    assert list(model.state_dict()) == list(state)
    assert fastlm.restore(fastlm.restore(model)) is model
    assert classes == {name: type(module) for name, module in model.named_modules()}
    model.load_state_dict(state)
    # torch.nn reads the weights from a list of its own, which must hold the present ones.
    model.double()
    assert all(held is weight for held, weight in zip(model.gru._flat_weights, model.gru.parameters(), strict=True))
    model(torch.randn(6, 4, 5).double())


def test_no_old_weight_is_kept_alive() -> None:
    model = fastlm.replace(torch.nn.GRU(5, 7))
    assert not any(isinstance(value, list) and any(map(torch.is_tensor, value)) for value in vars(model).values())


def test_dropout_goes_back_but_is_not_replaced() -> None:
    model = torch.nn.Sequential(fastlm.nn.Dropout(0.3), torch.nn.Dropout(0.4))
    fastlm.replace(model)
    assert [type(module) for module in model] == [fastlm.nn.Dropout, torch.nn.Dropout]
    assert fastlm.explain(model)["replaced"] == {"0": "fastlm.nn.Dropout"}
    assert type(model[0].to_torch()) is torch.nn.Dropout
    fastlm.restore(model)
    assert [type(module) for module in model] == [torch.nn.Dropout, torch.nn.Dropout]
    assert torch.jit.script(model.eval())(torch.ones(3)).tolist() == [1, 1, 1]


def test_restore_changes_all_or_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.GRU(3, 4), fastlm.nn.LSTM(4, 5, weight_dropout=0.5), torch.nn.GRUCell(5, 6))
    kinds = [type(module) for module in fastlm.replace(model)]
    with pytest.raises(ValueError, match=r"weight_dropout: torch\.nn\.LSTM has no such option; unset it first"):
        fastlm.restore(model)
    assert [type(module) for module in model] == kinds
    model[1].weight_dropout = 0.0
    assert [type(module) for module in fastlm.restore(model)] == [torch.nn.GRU, torch.nn.LSTM, torch.nn.GRUCell]


QUANTISED = (torch.nn.GRU, torch.nn.LSTM, torch.nn.GRUCell, torch.nn.LSTMCell)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.__name__)
def test_what_knows_torchs_modules_takes_restored_ones(kind: type) -> None:
    """Dynamic quantisation, and a trace by torch.fx."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(kind(8, 16)), torch.randn(3, 2, 8)
    x = x[0] if "Cell" in kind.__name__ else x
    quantise = torch.ao.quantization.quantize_dynamic
    expected = quantise(model, {kind}, dtype=torch.qint8)(x)
    restored = fastlm.restore(fastlm.replace(model))
    got = quantise(restored, {kind}, dtype=torch.qint8)(x)
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert torch.equal(one, other)
    traced = torch.fx.symbolic_trace(restored)
    assert torch.equal(tree_leaves(traced(x))[0], tree_leaves(restored(x))[0])


@pytest.mark.parametrize("function", [fastlm.replace, fastlm.restore])
def test_not_a_module(function) -> None:
    with pytest.raises(TypeError, match=rf"fastlm.{function.__name__}: expected a torch.nn.Module, got dict"):
        function({})


def test_replace_refuses_what_is_no_answer() -> None:
    layer = torch.nn.Linear(3, 3)
    with pytest.raises(TypeError, match="linear: expected True or False, got 'yes'"):
        fastlm.replace(layer, linear="yes")  # type: ignore[arg-type]
    assert type(layer) is torch.nn.Linear


def test_explain_a_model() -> None:
    model = Model()
    told = fastlm.explain(model)
    assert told["replaced"] == {}
    assert "replace(model) has not been called" in told["left"]["gru"]
    told = fastlm.explain(fastlm.replace(model))
    kinds = ("GRU", "LSTM", "GRUCell", "LSTMCell", "MultiheadAttention")
    assert told["replaced"] == {name: f"fastlm.nn.{kind}" for name, kind in zip(REPLACED, kinds, strict=True)}
    assert list(told["left"]) == ["mine", "normed", "rnn"]
    for name, word in {
        "mine": "subclass",
        "normed": "parametrised",
        "rnn": "no kernel",
    }.items():
        assert word in told["left"][name]
    assert "  gru: fastlm.nn.GRU\n" in str(told)
    model.gru.forward = model.gru.forward
    assert "forward was set on the instance" in fastlm.explain(model)["left"]["gru"]


def test_explain_the_root_and_what_was_parametrised_later() -> None:
    module = parametrizations.weight_norm(fastlm.replace(torch.nn.LSTM(5, 7)), "weight_hh_l0")
    assert fastlm.explain(module) == {"replaced": {"(model)": "fastlm.nn.LSTM"}, "left": {}}


@kernels_only
def test_explain_a_call_on_the_kernel() -> None:
    isa = _native.module.cpu_isa()
    told = fastlm.explain(fastlm.nn.GRU(5, 7, 2), torch.randn(6, 4, 5))
    assert told == {"backend": "cpu", "kernel": f"gru ({isa})", "reasons": []}
    told = fastlm.explain(fastlm.replace(Model()), torch.randn(6, 4, 5))
    assert told["kernel"] == f"gru ({isa}), lstm ({isa})"


@pytest.mark.skipif(_native.module is not None, reason="needs a build without the extension")
def test_explain_a_call_without_the_extension() -> None:
    told = fastlm.explain(fastlm.nn.GRU(5, 7, 2), torch.randn(6, 4, 5))
    assert told == {"backend": "reference", "kernel": None, "reasons": [_native.reason]}


@pytest.mark.filterwarnings("ignore::fastlm.FastlmFallbackWarning")
def test_explain_a_call_on_the_reference() -> None:
    x = torch.randn(6, 4, 5)
    module = fastlm.nn.GRU(5, 7)

    def forced(x: torch.Tensor) -> None:
        with fastlm.backend("reference"):
            module(x)

    reasons = {
        "forced": fastlm.explain(forced, x),
        "projection": fastlm.explain(fastlm.nn.LSTM(5, 7, proj_size=3), x),
        "float16": fastlm.explain(fastlm.nn.GRU(5, 7).half(), x.half()),
        "torch.func": fastlm.explain(torch.func.vmap(module), x.unsqueeze(0)),
    }
    for word, told in reasons.items():
        assert told["backend"] == "reference"
        assert told["kernel"] is None
        assert len(told["reasons"]) == 1
        assert word in told["reasons"][0]


def test_explain_a_call_without_fastlm() -> None:
    told = fastlm.explain(torch.nn.Linear(5, 7), torch.randn(4, 5))
    assert told["backend"] is None
    assert told["reasons"] == ["no operation of fastlm was called"]


def test_nothing_is_recorded_otherwise() -> None:
    with pytest.raises(ZeroDivisionError):
        fastlm.explain(lambda: 1 / 0)
    fastlm.nn.GRU(5, 7)(torch.randn(6, 4, 5))
    assert _trace.calls is None


def test_explain_refuses_what_it_cannot_call() -> None:
    with pytest.raises(TypeError, match=r"fastlm.explain: expected a torch.nn.Module or a function, got int"):
        fastlm.explain(3)
