"""The state that is carried from call to call, and masks: the state passes padding by."""

import copy
import io

import pytest
import torch
from torch import Tensor

from fastlm.models import RNNCache
from tests.cache import cache_of
from tests.models.small import CELLS, PAD, check_against_twin, make_model, random_ids, run, twin_of
from tests.numerics import check, check_all

LEFT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
MASKS = {
    "left": LEFT,
    "right": LEFT.flip(1),
    "both": torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),
    "inside": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]),
}


def states(cache: RNNCache) -> list[Tensor]:
    return [cache.h] if cache.c is None else [cache.h, cache.c]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [[1] * 7, [3, 4], [6, 1]], ids=str)
def test_in_pieces_as_in_one(cell: str, lengths: list[int]) -> None:
    model, ids = make_model(cell), random_ids()
    truth = copy.deepcopy(model).double()(ids)
    whole, cache = model(ids), None
    pieces = []
    for piece in ids.split(lengths, 1):
        output = model(piece, cache=cache)
        cache = cache_of(output)
        pieces.append(output.logits)
    assert cache.get_seq_length() == 7
    check("logits", torch.cat(pieces, 1), whole.logits, truth.logits)
    for got, same, exact in zip(states(cache), states(cache_of(whole)), states(cache_of(truth)), strict=True):
        check("state", got, same, exact)


@pytest.mark.parametrize("cell", CELLS)
def test_the_cache_is_updated_in_place_and_its_tensors_are_not(cell: str) -> None:
    model, ids = make_model(cell), random_ids()
    cache = RNNCache()
    assert cache_of(model(ids, cache=cache)) is cache
    kept = copy.copy(cache)
    before = [state.clone() for state in states(cache)]
    model(ids, cache=cache, use_cache=False)
    assert cache.h is kept.h
    assert cache.seq_length == 7
    model(ids, cache=cache)
    assert (cache.seq_length, kept.seq_length) == (14, 7)
    assert all(map(torch.equal, states(kept), before))
    assert not torch.equal(cache.h, kept.h)
    cache.reset()
    assert torch.equal(model(ids, cache=cache).logits, model(ids).logits)


def test_either_name_of_the_cache() -> None:
    """Under any version of transformers."""
    model, ids = make_model(), random_ids()
    start = cache_of(model(ids))
    for part in (model, model.model):
        got, expected = (part(ids, **{name: copy.copy(start)})[0] for name in ("cache", "past_key_values"))
        assert torch.equal(got, expected)
        assert not torch.equal(got, part(ids)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_truncated_back_propagation(cell: str) -> None:
    model, (first, second) = make_model(cell).train(), random_ids(3, 14).split(7, 1)
    carried = cache_of(model(first, labels=first))
    assert all(state.requires_grad for state in states(carried))
    constant = RNNCache(*(state.detach().clone() for state in states(carried)))

    def grads(cache: RNNCache) -> tuple[Tensor, ...]:
        loss = model(second, labels=second, cache=cache).loss
        return torch.autograd.grad(loss, list(model.model.rnn.parameters()), retain_graph=True)

    cut, through = grads(carried.detach()), grads(carried)
    assert all(map(torch.equal, cut, grads(constant)))
    assert not any(map(torch.equal, cut, through))


@pytest.mark.parametrize("cell", CELLS)
def test_cache_can_be_saved(cell: str) -> None:
    model, ids, file = make_model(cell), random_ids(), io.BytesIO()
    cache = cache_of(model(ids))
    torch.save(cache.detach().state_dict(), file)
    file.seek(0)
    loaded = RNNCache(**torch.load(file, weights_only=True))
    assert loaded.seq_length == 7
    assert torch.equal(model(ids, cache=loaded).logits, model(ids, cache=cache).logits)


def test_cache_moves_and_reorders() -> None:
    cache = cache_of(make_model("lstm")(random_ids())).detach()
    h, c = cache.h, cache.c
    assert cache.to(torch.float64).c.dtype == torch.float64
    assert cache.to("meta").h.device.type == "meta"
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(cache.h, h[:, [2, 2, 0]])
    assert torch.equal(cache.c, c[:, [2, 2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.c, c[:, [2, 2, 2, 2, 0, 0]])
    assert repr(cache) == "RNNCache(h=(2, 6, 12), c=(2, 6, 12), seq_length=7)"
    assert repr(RNNCache()) == "RNNCache(h=None, c=None, seq_length=0)"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mask", MASKS)
def test_padding_matches_torch(cell: str, mask: str) -> None:
    check_against_twin(make_model(cell), random_ids(), attention_mask=MASKS[mask], labels=random_ids())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cached", [False, True], ids=("zeros", "cached"))
def test_padded_rows_are_as_alone(cell: str, mask: str, cached: bool) -> None:
    model, real = make_model(cell), MASKS[mask].bool()
    ids = random_ids().masked_fill(~real, PAD)
    start = cache_of(model(random_ids(3, 4))) if cached else RNNCache()
    truth = copy.deepcopy(model).double()

    def alone(model: torch.nn.Module, row: int) -> tuple[Tensor, ...]:
        rows = (None if state is None else state[:, row : row + 1].to(model.dtype) for state in (start.h, start.c))
        output = model(ids[row : row + 1, real[row]], cache=RNNCache(*rows))
        return output.logits[0], *(state[:, 0] for state in states(cache_of(output)))

    output = model(ids, attention_mask=MASKS[mask], cache=copy.copy(start))
    for row in range(3):
        got = output.logits[row, real[row]], *(state[:, row] for state in states(cache_of(output)))
        for values in zip(got, alone(twin_of(model), row), alone(truth, row), strict=True):
            check(f"row {row}", *values)


def test_mask_of_the_whole_text_after_cached_steps() -> None:
    model, ids = make_model(), random_ids()
    past = cache_of(model(ids[:, :4], attention_mask=LEFT[:, :4]))
    short = model(ids[:, 4:], attention_mask=LEFT[:, 4:], cache=copy.copy(past))
    long = model(ids[:, 4:], attention_mask=LEFT, cache=past)
    assert torch.equal(short.logits, long.logits)
    assert torch.equal(long.logits[1], model(ids, attention_mask=LEFT).logits[1, 4:])


def test_padding_takes_no_part_in_gradients() -> None:
    model, other = make_model(), random_ids().where(LEFT.bool(), torch.tensor(5))
    labels = random_ids().where(LEFT.bool(), torch.tensor(-100))
    results = [
        run(model, torch.float32, ids, attention_mask=LEFT, shift_labels=labels) for ids in (random_ids(), other)
    ]
    check_all(results[0], results[1], {name: value.double() for name, value in results[1].items()})


def test_a_row_of_padding_keeps_its_state() -> None:
    model, ids, mask = make_model("lstm"), random_ids(), LEFT.clone()
    mask[1] = 0
    start = cache_of(model(ids))
    end = cache_of(model(ids, attention_mask=mask, cache=copy.copy(start)))
    assert all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(states(start), states(end), strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    model, ids = make_model(), random_ids()
    assert torch.equal(model(ids, attention_mask=LEFT.to(dtype)).logits, model(ids, attention_mask=LEFT).logits)
    assert torch.equal(model(ids, attention_mask=torch.ones(3, 7, dtype=dtype)).logits, model(ids).logits)


def test_errors() -> None:
    model, ids = make_model(), random_ids()
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(3, 7\), got \(3, 6\)"):
        model(ids, attention_mask=LEFT[:, 1:])
    past = cache_of(model(ids))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(3, 7 or 14\), got \(3, 1, 7, 7\)"):
        model(ids, attention_mask=torch.ones(3, 1, 7, 7), cache=past)
    for name in ("cache", "past_key_values"):
        with pytest.raises(TypeError, match=f"^{name}: expected an RNNCache, got tuple"):
            model(ids, **{name: (past.h,)})
    with pytest.raises(ValueError, match=r"^cache: expected at most one of cache and past_key_values, .*, got both"):
        model(ids, cache=past, past_key_values=past)
    with pytest.raises(ValueError, match=r"^cache: expected GRU states, got h and c"):
        model(ids, cache=cache_of(make_model("lstm")(ids)))
    with pytest.raises(ValueError, match=r"^cache: expected LSTM states, got h alone"):
        make_model("lstm")(ids, cache=past)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        model(ids[:2], cache=past)
    with pytest.raises(ValueError, match="h: expected a Tensor where c is given"):
        RNNCache(c=past.h)
