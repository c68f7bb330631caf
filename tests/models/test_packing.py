"""Several texts in one row: what position_ids tell apart is as if each were alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.small import make_model, random_ids, twin_of
from tests.models.small_transformer import make_transformer
from tests.numerics import check

MODELS = {
    "gru": lambda: make_model("gru"),
    "lstm": lambda: make_model("lstm"),
    "transformer": make_transformer,
}
LENGTHS = ((5, 1, 3), (9,), (2, 7))


def positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def logits_and_gradients(model: Any, rows: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Of all texts, joined; `rows` of one text each, or of several."""
    model.zero_grad()
    logits = torch.cat([model(row, **options).logits.flatten(0, 1) for row in rows])
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{name: it.grad.clone() for name, it in model.named_parameters()}}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_packed_texts_are_texts_alone(kind: str, lengths: tuple[int, ...]) -> None:
    ids, model = random_ids(1, 9), MODELS[kind]()
    texts = list(ids.split(lengths, 1))
    got = logits_and_gradients(model, [ids], position_ids=positions(lengths)[None])
    same = logits_and_gradients(model, texts)
    truth = logits_and_gradients(model.double(), texts)
    for name, value in got.items():
        check(name, value, same[name], truth[name])


@pytest.mark.parametrize("kind", MODELS)
def test_rows_differ_in_where_texts_begin(kind: str) -> None:
    ids, model = random_ids(3, 9), MODELS[kind]()
    rows = torch.stack([positions(lengths) for lengths in LENGTHS])
    got = model(ids, position_ids=rows).logits
    for row, lengths in enumerate(LENGTHS):
        alone = torch.cat([model(text).logits for text in ids[row : row + 1].split(lengths, 1)], 1)
        torch.testing.assert_close(got[row : row + 1], alone)
    same_for_all = model(ids, position_ids=rows[:1]).logits
    torch.testing.assert_close(same_for_all[0], got[0])


@pytest.mark.parametrize("kind", MODELS)
def test_compiled(kind: str) -> None:
    ids, model = random_ids(2, 9), MODELS[kind]()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for lengths in LENGTHS:
        options = {"position_ids": positions(lengths)[None], "use_cache": False}
        torch.testing.assert_close(compiled(ids, **options).logits, model(ids, **options).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_errors(kind: str) -> None:
    with pytest.raises(TypeError, match="position_ids: expected a Tensor, got list"):
        MODELS[kind]()(random_ids(1, 2), position_ids=[[0, 1]])
    with pytest.raises(ValueError, match=r"position_ids: expected shape \(3, 9\), got \(3, 8\)"):
        MODELS[kind]()(random_ids(3, 9), position_ids=torch.arange(8).expand(3, 8))
    if kind != "transformer":
        model = twin_of(MODELS[kind]())
        model(random_ids(1, 9), position_ids=torch.arange(9)[None])
        with pytest.raises(ValueError, match=r"position_ids: expected one text in a row after fastlm\.restore"):
            model(random_ids(1, 9), position_ids=positions((4, 5))[None])
