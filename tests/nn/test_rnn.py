import itertools

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastlm
from tests.nn.twins import LAYERS, check_twins, make, outputs_of, states

OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "two-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
layer = pytest.mark.parametrize("name", LAYERS)
hx = pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])


def rows(options: dict) -> int:
    return options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)


@layer
@options
@hx
@pytest.mark.parametrize("batch", [1, 4])
def test_padded(name: str, options: dict, with_hx: bool, batch: int) -> None:
    ours, theirs = make(name, 5, 7, **options)
    shape = (batch, 6, 5) if ours.batch_first else (6, batch, 5)
    check_twins(ours, theirs, torch.randn(shape), states(name, (rows(options), batch, 7)) if with_hx else None)


@layer
@options
@hx
def test_unbatched(name: str, options: dict, with_hx: bool) -> None:
    ours, theirs = make(name, 5, 7, **options)
    check_twins(ours, theirs, torch.randn(6, 5), states(name, (rows(options), 7)) if with_hx else None)


@layer
@options
@hx
@pytest.mark.parametrize(
    "lengths", [(5,), (4, 4, 4), (6, 5, 5, 1), (2, 7, 1, 7, 3)], ids=["one", "equal", "sorted", "unsorted"]
)
def test_packed(name: str, options: dict, with_hx: bool, lengths: tuple[int, ...]) -> None:
    ours, theirs = make(name, 5, 7, **options)
    packed = pack_sequence([torch.randn(length, 5) for length in lengths], enforce_sorted=False)
    check_twins(ours, theirs, packed, states(name, (rows(options), len(lengths), 7)) if with_hx else None)


def test_packed_sorted_without_indices() -> None:
    ours, theirs = make("LSTM", 5, 7, bidirectional=True)
    check_twins(ours, theirs, pack_sequence([torch.randn(length, 5) for length in (4, 2, 2)]))


@layer
def test_packed_result_unpacks(name: str) -> None:
    ours, theirs = make(name, 5, 7)
    packed = pack_padded_sequence(torch.randn(6, 3, 5), torch.tensor([2, 6, 3]), enforce_sorted=False)
    got, expected = ours(packed)[0], theirs(packed)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(got, field), getattr(expected, field))
    assert torch.equal(pad_packed_sequence(got)[1], torch.tensor([2, 6, 3]))


@layer
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_dropout_drops_what_torch_drops(name: str, form: str) -> None:
    ours, theirs = make(name, 5, 7, num_layers=3, dropout=0.4, bidirectional=True)
    input = torch.randn(6, 4, 5) if form == "padded" else pack_sequence([torch.randn(n, 5) for n in (3, 2)])
    check_twins(ours, theirs, input)
    trained = outputs_of(ours(input))
    check_twins(ours.eval(), theirs.eval(), input)
    assert all(not torch.equal(trained[key], value) for key, value in outputs_of(ours(input)).items())


@pytest.mark.filterwarnings("ignore::fastlm.FastlmFallbackWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_projection(bias: bool, form: str) -> None:
    ours, theirs = make("LSTM", 5, 7, num_layers=2, bidirectional=True, proj_size=3, bias=bias)
    input = torch.randn(6, 4, 5) if form == "padded" else pack_sequence([torch.randn(n, 5) for n in (6, 3, 3, 1)])
    check_twins(ours, theirs, input, states("LSTM", (4, 4, 3), (4, 4, 7)))


@pytest.mark.filterwarnings("ignore::fastlm.FastlmFallbackWarning")
def test_projection_by_torch_and_by_the_reference() -> None:
    """Alone it takes torch's own loop, bit for bit; with what torch lacks, the reference, to the same results."""
    ours, theirs = make("LSTM", 5, 7, num_layers=2, proj_size=3)
    x = torch.randn(6, 4, 5)
    for module in (ours, theirs):
        module.train()
    got, wanted = outputs_of(ours(x)), outputs_of(theirs(x))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    expected = theirs(x)[0]
    torch.testing.assert_close(ours(x, lengths=[6] * 4)[0], expected)
    with fastlm.backend("reference"):
        torch.testing.assert_close(ours(x)[0], expected)
    ours.weight_dropout = 0.5
    assert not torch.allclose(ours(x)[0], expected)
    ours.weight_dropout = 0.0
    rounded = ours.bfloat16()(x.bfloat16())[0]
    with fastlm.backend("reference"):
        assert torch.equal(rounded, ours(x.bfloat16())[0])  # torch rounds sums to bfloat16 at every step


@layer
def test_empty_batch(name: str) -> None:
    ours, theirs = make(name, 5, 7, num_layers=2, bidirectional=True)
    input = torch.randn(6, 0, 5)
    got, expected = outputs_of(ours(input)), outputs_of(theirs(input))
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in expected.items()}


@layer
def test_states_may_be_detached_in_place(name: str) -> None:
    """h_n is no view, so the usual `h.detach_()` between chunks works; output may be changed in place too."""
    module = make(name, 5, 7)[0]
    result = outputs_of(module(torch.randn(6, 4, 5)))
    for value in result.values():
        value.detach_()
    storages = {value.untyped_storage().data_ptr() for value in result.values()}
    assert len(storages) == len(result)


@layer
def test_no_mode_changes_the_result(name: str) -> None:
    module, input = make(name, 5, 7, bidirectional=True)[0], torch.randn(6, 4, 5)
    expected = outputs_of(module(input))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = outputs_of(module(input))
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@layer
def test_gradient_in_eval_mode_and_twice(name: str) -> None:
    module = make(name, 2, 3, bidirectional=True)[0].double().eval()
    input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: tuple(outputs_of(module(x)).values()), input)


@layer
@pytest.mark.parametrize("num_layers", [1, 2])
def test_autocast(name: str, num_layers: int) -> None:
    """Results are bfloat16 and as good as those of the module run on bfloat16 inputs and weights."""
    ours, theirs = make(name, 5, 7, num_layers=num_layers)
    input = torch.randn(6, 4, 5)
    hx = states(name, (num_layers, 4, 7))
    for given in (input, input.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = outputs_of(ours(given, hx))
        assert {value.dtype for value in got.values()} == {torch.bfloat16}
    rounded = theirs.bfloat16().double()
    hx64 = hx.bfloat16().double() if name == "GRU" else tuple(state.bfloat16().double() for state in hx)
    truth = outputs_of(rounded(input.bfloat16().double(), hx64))
    for key, value in got.items():
        assert (value.double() - truth[key]).abs().max() <= 2 * num_layers * torch.finfo(torch.bfloat16).eps


@layer
def test_packed_autocast(name: str) -> None:
    module = make(name, 5, 7)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_of(module(pack_sequence([torch.randn(n, 5) for n in (4, 2, 1)])))
    assert {value.dtype for value in got.values()} == {torch.bfloat16}


def test_is_rnn() -> None:
    made = [getattr(space, name)(2, 3) for space, name in itertools.product((torch.nn, fastlm.nn), LAYERS)]
    assert all(map(fastlm.nn.is_rnn, [*made, torch.nn.RNN(2, 3)]))
    assert not any(map(fastlm.nn.is_rnn, [fastlm.nn.GRUCell(2, 3), torch.nn.Linear(2, 3), "GRU"]))
