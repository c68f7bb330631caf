"""TransformerForCausalLM against transformers' GPT-2 with the same weights."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlm
from fastlm.models import TransformerConfig, TransformerForCausalLM, TransformerModel
from tests.cache import cache_of
from tests.models.small import PAD, VOCABULARY, random_ids
from tests.models.small_transformer import CONTEXT, check_against_gpt2, gpt2_of, make_transformer
from tests.numerics import check, kernels_only

LEFT = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])
MASKS = {"left": LEFT, "right": LEFT.flip(1), "inside": torch.tensor([[1, 0, 1, 1, 0, 0, 1]] * 3)}


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("bias", [False, True], ids=("no-bias", "bias"))
@pytest.mark.parametrize("tied", [False, True], ids=("untied", "tied"))
def test_matches_gpt2(bias: bool, tied: bool) -> None:
    check_against_gpt2(make_transformer(bias=bias, tie_word_embeddings=tied), random_ids(), random_ids())


@pytest.mark.parametrize("shape", [(1, 1), (1, CONTEXT), (4, 1)], ids=lambda shape: "B{}-T{}".format(*shape))
def test_matches_gpt2_at_sizes_of_one(shape: tuple[int, int]) -> None:
    check_against_gpt2(make_transformer(num_layers=1, num_heads=1), random_ids(*shape), random_ids(*shape))


@pytest.mark.parametrize("mask", MASKS)
def test_padding_matches_gpt2(mask: str) -> None:
    real = MASKS[mask]
    labels = random_ids().masked_fill(real == 0, -100)
    options = {"attention_mask": real, "position_ids": positions(real)}
    check_against_gpt2(make_transformer(bias=True), random_ids(), labels, **options)


def test_back_ends_agree() -> None:
    model, ids = make_transformer(), random_ids()
    with fastlm.backend("reference"):
        same, truth = (copy.deepcopy(model).to(dtype)(ids).logits for dtype in (torch.float32, torch.float64))
    check("logits", model(ids).logits, same, truth)


@pytest.mark.parametrize("mask", MASKS)
def test_positions_are_those_of_the_mask(mask: str) -> None:
    model, real = make_transformer(), MASKS[mask]
    expected = model(random_ids(), attention_mask=real, position_ids=positions(real)).logits
    assert torch.equal(model(random_ids(), attention_mask=real).logits, expected)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cached", [0, 4])
def test_padded_rows_are_as_alone(mask: str, cached: int) -> None:
    model, real = make_transformer(), MASKS[mask].bool()
    real[:, -1] = True
    ids = random_ids().masked_fill(~real, PAD)
    cache = DynamicCache()
    if cached:
        model(ids[:, :cached], attention_mask=real[:, :cached], cache=cache)
    output = model(ids[:, cached:], attention_mask=real, cache=cache)
    for row in range(3):
        got = output.logits[row, real[row, cached:]]
        alone = [twin(ids[row : row + 1, real[row]]).logits[0] for twin in (model, copy.deepcopy(model).double())]
        check(f"row {row}", got, *(logits[len(logits) - len(got) :] for logits in alone))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    model, ids = make_transformer(), random_ids()
    assert torch.equal(model(ids, attention_mask=LEFT.to(dtype)).logits, model(ids, attention_mask=LEFT).logits)
    assert torch.equal(model(ids, attention_mask=torch.ones(3, 7, dtype=dtype)).logits, model(ids).logits)


def test_masks_of_four_dimensions() -> None:
    model, ids = make_transformer(), random_ids()
    seen = torch.ones(7, 7, dtype=torch.bool).tril() & LEFT.bool()[:, None, None]
    options = {"position_ids": positions(LEFT)}
    expected = model(ids, attention_mask=LEFT).logits
    assert torch.equal(model(ids, attention_mask=seen, **options).logits[LEFT == 1], expected[LEFT == 1])
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    got = model(ids, attention_mask=added, **options).logits[LEFT == 1]
    check("logits", got, expected[LEFT == 1], copy.deepcopy(model).double()(ids, attention_mask=LEFT).logits[LEFT == 1])


@pytest.mark.parametrize("lengths", [[1] * 7, [3, 4], [6, 1]], ids=str)
def test_in_pieces_as_in_one(lengths: list[int]) -> None:
    model, ids, cache, pieces = make_transformer(), random_ids(), None, []
    for piece in ids.split(lengths, 1):
        output = model(piece, cache=cache)
        cache = cache_of(output)
        pieces.append(output.logits)
    assert cache.get_seq_length() == 7
    check("logits", torch.cat(pieces, 1), model(ids).logits, copy.deepcopy(model).double()(ids).logits)


@torch.no_grad()
def test_either_name_of_the_cache() -> None:
    """Under any version of transformers."""
    model, ids = make_transformer(), random_ids()
    start = cache_of(model(ids[:, :4]))
    for part in (model, model.model):
        got, expected = (part(ids[:, 4:], **{name: copy.deepcopy(start)})[0] for name in ("cache", "past_key_values"))
        assert torch.equal(got, expected)
        assert not torch.equal(got, part(ids[:, 4:])[0])


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(7)}], ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=("labels", "shift_labels"))
def test_loss_is_that_of_transformers(shifted: bool, options: dict) -> None:
    model, ids, labels = make_transformer(), random_ids(), random_ids()
    labels[0, :3] = labels[2, -1] = -100
    given = {"shift_labels" if shifted else "labels": labels}
    output = model(ids, **given, **options)
    same, truth = (
        ForCausalLMLoss(output.logits.to(dtype), labels, VOCABULARY, shift_labels=given.get("shift_labels"), **options)
        for dtype in (torch.float32, torch.float64)
    )
    check("loss", output.loss, same, truth)


def test_logits_are_left_out_in_training() -> None:
    model, ids = make_transformer(), random_ids()
    loss = model(ids, labels=ids).loss
    assert model(ids, labels=ids, skip_logits=True).logits is None
    model.train()
    output = model(ids, labels=ids)
    assert output.logits is None
    assert cache_of(output) is None
    assert torch.equal(output.loss, loss)
    assert cache_of(model(ids, labels=ids, skip_logits=False, use_cache=True)).get_seq_length() == 7
    assert model(ids).logits.shape == (3, 7, VOCABULARY)


def test_logits_to_keep() -> None:
    model, ids = make_transformer(), random_ids()
    logits = model(ids).logits
    for keep, expected in ((2, logits[:, -2:]), (torch.tensor([0, 3]), logits[:, [0, 3]])):
        kept = model(ids, labels=ids, logits_to_keep=keep)
        check("logits", kept.logits, expected, expected.double())
        assert torch.equal(kept.loss, model(ids, labels=ids).loss)


def test_dropout() -> None:
    model, ids = make_transformer(dropout=0.5), random_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(1)
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)
    torch.manual_seed(1)
    assert torch.equal(first, model(ids).logits)


@kernels_only
def test_a_training_step_copies_nothing_forward_and_once_a_layer_backward() -> None:
    model, ids = make_transformer(num_layers=3).train(), random_ids(3, CONTEXT)
    model(ids, shift_labels=ids).loss.backward()
    model.zero_grad()

    def calls(run: profile) -> dict[str, int]:
        return {event.key: event.count for event in run.key_averages() if event.key.startswith(("aten::", "fastlm::"))}

    with profile() as run:
        loss = model(ids, shift_labels=ids).loss
    forward = calls(run)
    assert not {"aten::copy_", "aten::clone", "aten::cat", "aten::dropout", "aten::zeros"} & forward.keys()
    assert forward["aten::mm"] == 4 * 3
    assert forward["fastlm::attention_forward"] == 3
    with profile() as run:
        loss.backward()
    backward = calls(run)
    assert backward["aten::cat"] == 3
    assert "aten::clone" not in backward
    assert backward.get("aten::copy_", 0) <= 2  # the loss's gradient, a scalar, is looked at


def test_inputs_embeds_and_tuples() -> None:
    model, ids = make_transformer(), random_ids()
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    found, cache = model(ids, return_dict=False)
    assert torch.equal(found, logits)
    assert model.model(ids, return_dict=False)[1].get_seq_length() == cache.get_seq_length() == 7
    assert cache_of(model(ids, use_cache=False)) is None


def test_bfloat16() -> None:
    model, ids = make_transformer().bfloat16(), random_ids()
    twin = gpt2_of(model).bfloat16()
    check("logits", model(ids).logits, twin(ids).logits, twin.double()(ids).logits)
    model.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert make_transformer()(ids).logits.dtype == torch.bfloat16


def test_compile() -> None:
    torch._dynamo.reset()
    model, ids = make_transformer(), random_ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for options in ({}, {"attention_mask": LEFT}):
        ours, eager = compiled(ids, labels=ids, **options), model(ids, labels=ids, **options)
        assert torch.equal(ours.logits, eager.logits)
        assert torch.equal(ours.loss, eager.loss)
        assert cache_of(ours).get_seq_length() == 7


def test_auto_classes() -> None:
    config = AutoConfig.for_model("fastlm_transformer", hidden_size=8, vocab_size=11)
    assert type(config) is TransformerConfig
    assert (config.num_hidden_layers, config.num_attention_heads) == (4, 4)
    assert type(AutoModel.from_config(config)) is TransformerModel
    assert type(AutoModelForCausalLM.from_config(config)) is TransformerForCausalLM


def test_initial_weights_are_distributed_as_in_gpt2() -> None:
    model = TransformerForCausalLM(TransformerConfig(vocab_size=500, num_layers=8, bias=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, "norm" in name and name.endswith("weight")))
        else:
            expected = 0.02 / math.sqrt(16) if "o_proj" in name or "down_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected a whole number of at least 1, got 0"),
        ({"num_heads": 3}, r"num_heads: expected a divisor of hidden_size \(128\), got 3"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: expected a whole number of at least 1, got 0"),
        ({"dropout": 1.5}, "dropout: expected a number from 0 to 1, got 1.5"),
        ({"vocab_size": 10, "eos_token_id": [1, -1]}, "eos_token_id: expected None or 0 to 9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configuration_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**options)


def test_errors() -> None:
    model, ids = make_transformer(), random_ids()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"^labels: expected shape \(3, 7\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="skip_logits: expected labels"):
        model(ids, skip_logits=True)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(3, 7\), got \(3, 6\)"):
        model(ids, attention_mask=LEFT[:, 1:])
    too_long = r"input_ids: expected at most 24 tokens \(max_position_embeddings\), got 25"
    for name in ("cache", "past_key_values"):
        with pytest.raises(TypeError, match=f"^{name}: expected a Cache of transformers, got tuple"):
            model(ids, **{name: ()})
    with pytest.raises(ValueError, match=r"^cache: expected at most one of cache and past_key_values, .*, got both"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=too_long):
        model(random_ids(2, CONTEXT + 1))
    full = cache_of(model(random_ids(1, CONTEXT)))
    with pytest.raises(ValueError, match=too_long):
        model(ids[:1, :1], cache=full)
    with pytest.raises(ValueError, match=r"position_ids: expected 0 to 23 .*, got 1 to 24"):
        model(ids[:1, :2], position_ids=torch.tensor([[24, 1]]))


def test_inputs_embeds_of_any_strides() -> None:
    model = make_transformer()
    embeds = torch.randn(7, 2, model.config.hidden_size).transpose(0, 1)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(inputs_embeds=embeds.contiguous()).logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """The same gradients, dropout replayed; a cache would be filled twice."""
    model, ids = make_transformer(dropout=0.3).train(), random_ids()

    def step() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = step()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[object] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(None))
    assert all(map(torch.equal, step(), expected))
    assert len(calls) == 2
    for options in ({"use_cache": True}, {"cache": DynamicCache()}):
        with pytest.raises(ValueError, match="cache: expected none in training with gradient checkpointing"):
            model(ids, **options)
    assert cache_of(model.eval()(ids)) is not None
