"""What fastlm.nn.GRU and LSTM take beyond torch.nn: lengths, resets, every state, research options."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastlm
from tests.nn.twins import make, outputs_of, states

KINDS = ("GRU", "LSTM")
kinds = pytest.mark.parametrize("name", KINDS)
STACKS = {"one": {}, "stack": {"num_layers": 2, "bidirectional": True}, "first": {"batch_first": True, "num_layers": 2}}
stacks = pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
LENGTHS = torch.tensor([4, 9, 1, 6])


def rows(options: dict) -> int:
    return options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)


def put(x: torch.Tensor, options: dict) -> torch.Tensor:
    return x.transpose(0, 1) if options.get("batch_first") else x


def close(got: dict, expected: dict) -> bool:
    return all(torch.allclose(got[key], value, atol=2e-6) for key, value in expected.items())


@kinds
@stacks
def test_lengths_are_what_packing_is(name: str, options: dict) -> None:
    ours, theirs = make(name, 5, 7, **options)
    x, hx = put(torch.randn(9, 4, 5), options), states(name, (rows(options), 4, 7))
    packed = pack_padded_sequence(x, LENGTHS, batch_first=ours.batch_first, enforce_sorted=False)
    output, final = theirs(packed, hx)
    output = pad_packed_sequence(output, batch_first=ours.batch_first)[0]
    for lengths in (LENGTHS, LENGTHS.tolist()):
        assert close(outputs_of(ours(x, hx, lengths=lengths)), outputs_of((output, final)))


@kinds
@stacks
def test_zero_length_gives_the_initial_state(name: str, options: dict) -> None:
    ours, _ = make(name, 5, 7, **options)
    hx = states(name, (rows(options), 3, 7))
    output, final = ours(put(torch.randn(6, 3, 5), options), hx, lengths=[2, 0, 6])
    assert not put(output, options)[:, 1].any()
    for given, got in zip((hx,) if name == "GRU" else hx, (final,) if name == "GRU" else final, strict=True):
        assert torch.equal(got[:, 1], given[:, 1])


@kinds
def test_resets_split_the_sequence(name: str) -> None:
    for options in ({}, {"batch_first": True}, {"num_layers": 2}):
        ours, _ = make(name, 5, 7, **options)
        x = torch.randn(9, 2, 5)
        mask = torch.zeros(9, 2, dtype=torch.bool)
        mask[4] = True
        output, final = ours(put(x, options), reset_mask=put(mask, options))
        second = ours(put(x[4:], options))
        expected = torch.cat((put(ours(put(x[:4], options))[0], options), put(second[0], options)))
        assert torch.allclose(put(output, options), expected, atol=1e-6)
        assert close(outputs_of((final,)), outputs_of((second[1],)))


@kinds
def test_unbatched(name: str) -> None:
    ours, _ = make(name, 5, 7)
    x, mask = torch.randn(9, 5), torch.arange(9) == 4
    batched = ours(x[:, None], reset_mask=mask[:, None], return_all_states=True)
    output, final, every = ours(x, reset_mask=mask, return_all_states=True)
    assert torch.equal(output, batched[0][:, 0])
    for got, expected in zip(outputs_of((final, every)).values(), outputs_of(batched[1:]).values(), strict=True):
        assert torch.equal(got, expected.squeeze(-2))
    with pytest.raises(ValueError, match="lengths: expected None with an unbatched input"):
        ours(x, lengths=[3])
    with pytest.raises(ValueError, match=r"reset_mask: expected shape \(T,\) = \(9,\)"):
        ours(x, reset_mask=mask[:3])


@kinds
def test_wrong_arguments(name: str) -> None:
    ours, _ = make(name, 5, 7, batch_first=True)
    x = torch.randn(4, 9, 5)
    mask = torch.zeros(9, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"reset_mask: expected shape \(B, T\) = \(4, 9\), got \(9, 4\)"):
        ours(x, reset_mask=mask)
    with pytest.raises(ValueError, match=r"lengths: expected 0 to 9 \(T\), got 10"):
        ours(x, lengths=[1, 2, 3, 10])
    packed = pack_sequence([torch.randn(3, 5)])
    for wrong in ({"lengths": [3]}, {"reset_mask": mask}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected None together with a PackedSequence"):
            ours(packed, **wrong)
    with pytest.raises(TypeError):
        ours(x, None, [1, 2, 3, 4])  # by keyword only


@kinds
@stacks
def test_all_states(name: str, options: dict) -> None:
    ours, _ = make(name, 5, 7, **options)
    x = put(torch.randn(9, 4, 5), options)
    expected = ours(x, lengths=LENGTHS)
    output, final, every = ours(x, lengths=LENGTHS, return_all_states=True)
    assert torch.equal(output, expected[0])
    finals, everies = (final, every) if name == "LSTM" else ((final,), (every,))
    for last, each in zip(finals, everies, strict=True):
        assert each.shape == (rows(options), *put(torch.empty(9, 4, 7), options).shape)
        time_major = each.transpose(1, 2) if ours.batch_first else each
        for index in range(rows(options)):
            reverse = ours.bidirectional and index % 2 == 1
            for b, length in enumerate(LENGTHS.tolist()):
                assert torch.equal(time_major[index, 0 if reverse else length - 1, b], last[index, b])
                assert not time_major[index, length:, b].any()
    assert torch.equal(everies[0][-1], output[..., -7:])
    packed = pack_padded_sequence(x, LENGTHS, batch_first=ours.batch_first, enforce_sorted=False)
    packed_every = ours(packed, return_all_states=True)[2]
    assert (packed_every if name == "GRU" else packed_every[1]).shape == (rows(options), int(LENGTHS.sum()), 7)


def test_gradient_through_cells() -> None:
    """d sum(c) / dx by the kernels is that of the reference."""
    ours = fastlm.nn.LSTM(3, 6, 2).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(ours(x, return_all_states=True)[2][1].square().sum(), x)[0]
    with fastlm.backend("reference"):
        expected = torch.autograd.grad(ours(x, return_all_states=True)[2][1].square().sum(), x)[0]
    assert torch.allclose(got, expected)


@kinds
def test_weight_dropout_drops_recurrent_weights_in_training(name: str) -> None:
    module = getattr(fastlm.nn, name)(5, 7, 2, weight_dropout=0.5)
    twin = getattr(fastlm.nn, name)(5, 7, 2)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(6, 3, 5)
    assert close(outputs_of(module.eval()(x)), outputs_of(twin(x)))
    torch.manual_seed(5)
    got = outputs_of(module.train()(x))
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in range(2):
            weight = getattr(twin, f"weight_hh_l{layer}")
            dropped = torch.nn.functional.dropout(weight, 0.5)
            assert 0.3 < (dropped == 0).float().mean() < 0.7
            weight.copy_(dropped)
    assert close(got, outputs_of(twin(x)))
    module(x)[0].sum().backward()
    grad = module.weight_hh_l0.grad
    assert 0.2 < (grad == 0).float().mean() < 0.8  # a dropped weight gets none
    assert "weight_dropout=0.5" in repr(module)


@kinds
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
def test_locked_dropout_drops_the_same_for_every_step(name: str, form: str) -> None:
    module = getattr(fastlm.nn, name)(5, 7, 2, dropout=0.5, locked_dropout=True)
    masks = []
    module._layer, layer = lambda x, *rest: (masks.append(x), layer(x, *rest))[1], module._layer
    x = torch.rand(6, 3, 5) + 1
    if form == "packed":
        module(pack_padded_sequence(x, [6, 4, 1]))
        second = torch.zeros(6, 3, 7)
        second[torch.arange(6)[:, None] < torch.tensor([6, 4, 1])] = masks[1]
        inside = torch.arange(6)[:, None] < torch.tensor([6, 4, 1])
    else:
        module(x, **({"lengths": [6, 4, 1]} if form == "lengths" else {}))
        second = masks[1]
        inside = torch.arange(6)[:, None] < torch.tensor([6, 4, 1] if form == "lengths" else [6, 6, 6])
    dropped = second == 0
    for b in range(3):
        steps = dropped[inside[:, b], b]
        assert torch.equal(steps, steps[:1].expand_as(steps))
    assert 0 < dropped[0].float().mean() < 1
    assert "locked_dropout=True" in repr(module)


def test_options_by_attribute_and_their_limits() -> None:
    model = fastlm.replace(torch.nn.Sequential(torch.nn.LSTM(3, 4, dropout=0.1, num_layers=2)))
    module = model[0]
    assert (module.weight_dropout, module.locked_dropout) == (0.0, False)
    module.weight_dropout = 0.5
    x = torch.randn(4, 2, 3)
    assert not torch.equal(module(x)[0], module(x)[0])
    assert copy.deepcopy(module).weight_dropout == 0.5
    for call in (module.to_torch, lambda: fastlm.restore(model)):
        with pytest.raises(ValueError, match=r"weight_dropout: torch\.nn\.LSTM has no such option; unset it first"):
            call()
    module.weight_dropout = 0.0
    assert type(fastlm.restore(model)[0]) is torch.nn.LSTM
    for wrong in (-0.1, 1.5, True, "0.5", None):
        with pytest.raises(ValueError, match="weight_dropout: expected a number from 0 to 1"):
            fastlm.nn.GRU(3, 4, weight_dropout=wrong)


@pytest.mark.parametrize("space", [torch.nn, fastlm.nn], ids=("torch", "fastlm"))
def test_init(space) -> None:
    for module in (space.LSTM(3, 4, 2, bidirectional=True), space.LSTMCell(3, 4)):
        before = {name: p.clone() for name, p in module.named_parameters()}
        assert fastlm.nn.init.forget_bias_(module, 2.0) is module
        sums: dict[str, torch.Tensor] = {}
        for name, p in module.named_parameters():
            if name.startswith("bias"):
                key = name.replace("bias_ih", "").replace("bias_hh", "")
                sums[key] = sums.get(key, 0) + p.detach().chunk(4)[1]
                assert all(torch.equal(p.chunk(4)[i], before[name].chunk(4)[i]) for i in (0, 2, 3))
            else:
                assert torch.equal(p, before[name])
        assert all(torch.equal(value, torch.full((4,), 2.0)) for value in sums.values())
    for module, gates in ((space.LSTM(3, 4), 4), (space.GRU(3, 4, 2), 3), (space.GRUCell(3, 4), 3)):
        assert fastlm.nn.init.orthogonal_(module, gain=3.0) is module
        for name, p in module.named_parameters():
            if name.startswith("weight_hh"):
                for part in p.detach().chunk(gates):
                    assert torch.allclose(part @ part.mT, 9 * torch.eye(4), atol=1e-5)
    with pytest.raises(TypeError, match=r"forget_bias_: expected LSTM or LSTMCell, got GRU"):
        fastlm.nn.init.forget_bias_(space.GRU(3, 4))
    with pytest.raises(ValueError, match="expected a module with biases"):
        fastlm.nn.init.forget_bias_(space.LSTM(3, 4, bias=False))
    with pytest.raises(TypeError, match="orthogonal_: expected LSTM or LSTMCell or GRU or GRUCell, got Linear"):
        fastlm.nn.init.orthogonal_(torch.nn.Linear(3, 4))


@kinds
def test_every_state_is_a_tensor_of_its_own(name: str) -> None:
    for options in ({}, {"num_layers": 2}, {"bidirectional": True}):
        ours, _ = make(name, 5, 7, **options)
        x = torch.randn(4, 2, 5)
        with torch.no_grad():
            output, _, histories = ours(x, return_all_states=True)
            expected = output.clone()
            for history in (histories,) if name == "GRU" else histories:
                history.zero_()
        assert torch.equal(output, expected)
