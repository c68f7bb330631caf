"""RNNForCausalLM against the same model with torch.nn inside, and its loss against transformers'."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlm
from fastlm.models import RNNConfig, RNNForCausalLM, RNNModel
from tests.cache import cache_of
from tests.child import check_python, run_python
from tests.models.small import CELLS, KINDS, VOCABULARY, check_against_twin, make_model, random_ids, twin_of
from tests.models.small_transformer import make_transformer
from tests.numerics import check


@pytest.mark.parametrize(("cell", "output"), KINDS)
def test_matches_torch(cell: str, output: str) -> None:
    ids = random_ids()
    check_against_twin(make_model(cell, output), ids, labels=ids)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 1)], ids=lambda shape: "B{}-T{}".format(*shape))
def test_matches_torch_at_sizes_of_one(cell: str, shape: tuple[int, int]) -> None:
    check_against_twin(make_model(cell, num_layers=1), random_ids(*shape), shift_labels=random_ids(*shape))


def test_restore_and_replace_change_the_layers_only() -> None:
    model = make_model()
    names = list(model.state_dict())
    assert type(fastlm.restore(model).model.rnn) is torch.nn.GRU
    assert type(fastlm.replace(model).model.rnn) is fastlm.nn.GRU
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(7)}], ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=("labels", "shift_labels"))
def test_loss_is_that_of_transformers(shifted: bool, options: dict) -> None:
    model, ids, labels = make_model(), random_ids(), random_ids()
    labels[0, :3] = labels[2, -1] = -100
    given = {"shift_labels" if shifted else "labels": labels}
    output = model(ids, **given, **options)
    same, truth = (
        ForCausalLMLoss(output.logits.to(dtype), labels, VOCABULARY, shift_labels=given.get("shift_labels"), **options)
        for dtype in (torch.float32, torch.float64)
    )
    check("loss", output.loss, same, truth)


def test_label_smoothing() -> None:
    model, ids, labels = make_model(), random_ids(), random_ids()
    output = model(ids, shift_labels=labels, label_smoothing=0.2)
    same, truth = (
        torch.nn.functional.cross_entropy(output.logits.to(dtype).flatten(0, 1), labels.flatten(), label_smoothing=0.2)
        for dtype in (torch.float32, torch.float64)
    )
    check("loss", output.loss, same, truth)


def test_logits_are_left_out_in_training() -> None:
    model, ids = make_model(), random_ids()
    loss = model(ids, labels=ids).loss
    assert model(ids, labels=ids, skip_logits=True).logits is None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert torch.equal(model(ids, labels=ids).loss, loss)
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (3, 7, VOCABULARY)
    assert model(ids).logits.shape == (3, 7, VOCABULARY)


def test_logits_to_keep() -> None:
    model, ids = make_model(), random_ids()
    logits = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])
    kept = model(ids, labels=ids, logits_to_keep=1)
    assert kept.logits.shape[1] == 1
    assert torch.equal(kept.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("output", ["untied", "projected"])
def test_dropout(output: str) -> None:
    model, ids = make_model(output=output, dropout=0.5), random_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(1)
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)
    torch.manual_seed(1)
    assert torch.equal(first, model(ids).logits)
    model.model.rnn.dropout = 0.0  # torch draws that mask elsewhere
    twin = twin_of(model)
    for module in twin.modules():  # torch's drops other values
        if type(module) is torch.nn.Dropout:
            module.__class__ = fastlm.nn.Dropout
    torch.manual_seed(1)
    first = model(ids).logits
    torch.manual_seed(1)
    expected = twin(ids).logits
    check("logits", first, expected, expected.double(), "gradient")


def test_inputs_embeds_and_tuples() -> None:
    model, ids = make_model(), random_ids()
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    found, cache = model(ids, return_dict=False)
    assert torch.equal(found, logits)
    assert torch.equal(model.model(ids, return_dict=False)[1].h, cache.h)
    assert cache_of(model(ids, use_cache=False)) is None
    assert torch.equal(model.model(ids).last_hidden_state[:, -1], cache.h[-1])


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16(cell: str) -> None:
    model, ids = make_model(cell).bfloat16(), random_ids()
    twin = twin_of(model)
    check("logits", model(ids).logits, twin(ids).logits, twin.double()(ids).logits)
    output = model.train()(ids, labels=ids)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert make_model(cell)(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("cell", CELLS)
def test_compile(cell: str) -> None:
    torch._dynamo.reset()
    model, ids = make_model(cell), random_ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [1] * 3 + [0] * 4])
    for options in ({}, {"attention_mask": mask}):
        ours, eager = compiled(ids, labels=ids, **options), model(ids, labels=ids, **options)
        assert torch.equal(ours.logits, eager.logits)
        assert torch.equal(ours.loss, eager.loss)
        assert torch.equal(cache_of(ours).h, cache_of(eager).h)


def test_auto_classes() -> None:
    config = AutoConfig.for_model("fastlm_rnn", hidden_size=6, vocab_size=11)
    assert type(config) is RNNConfig
    assert type(AutoModel.from_config(config)) is RNNModel
    assert type(AutoModelForCausalLM.from_config(config)) is RNNForCausalLM


def test_initial_weights_are_distributed_as_in_torch() -> None:
    model = RNNForCausalLM(RNNConfig(vocab_size=500, embedding_size=64, hidden_size=49))
    assert 0.98 < model.model.embed_tokens.weight.std() < 1.02
    for tensor in (*model.model.rnn.parameters(), *model.lm_head.parameters()):
        assert 0.95 / 7 < tensor.abs().max() <= 1 / 7  # U(-1, 1) / sqrt(H)
    tied = RNNForCausalLM(RNNConfig(vocab_size=500, embedding_size=64, hidden_size=49, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert 0.99 / 8 < tied.lm_head.weight.abs().max() <= 1 / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected a whole number of at least 1, got 0"),
        ({"hidden_size": "8"}, "hidden_size: expected a whole number of at least 1, got '8'"),
        ({"num_layers": True}, "num_layers: expected a whole number of at least 1, got True"),
        ({"embedding_size": 2.0}, "embedding_size: expected a whole number"),
        ({"cell": "rnn"}, "cell: expected one of 'gru', 'lstm', got 'rnn'"),
        ({"dropout": 1.5}, "dropout: expected a number from 0 to 1, got 1.5"),
        ({"vocab_size": 10, "eos_token_id": 10}, "eos_token_id: expected None or 0 to 9"),
        ({"vocab_size": 10, "eos_token_id": [1, -1]}, "eos_token_id: expected None or 0 to 9"),
        ({"pad_token_id": "<pad>"}, "pad_token_id: expected None or 0 to 9999"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configuration_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RNNConfig(**options)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_errors() -> None:
    model, ids = make_model(), random_ids()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"^labels: expected shape \(3, 7\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"^shift_labels: expected shape \(3, 7\)"):
        model(ids, shift_labels=ids[:2])
    with pytest.raises(ValueError, match="skip_logits: expected labels"):
        model(ids, skip_logits=True)
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        model.gradient_checkpointing_enable()


def test_import_needs_transformers() -> None:
    check_python("import sys; assert 'transformers' not in sys.modules")
    done = run_python("import sys; sys.modules['transformers'] = None; import fastlm.models")
    assert done.returncode != 0
    assert 'ImportError: fastlm.models: expected transformers, which pip install "fastlm[lm]" installs' in done.stderr


def test_trainer_shifts_labels_that_it_smooths(tmp_path) -> None:
    """transformers' Trainer does so for models that it knows as causal."""
    model, ids = make_model(), random_ids(8)
    arguments = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    losses = []
    for smoothing in (0.0, 1e-6):
        options = TrainingArguments(str(tmp_path), **arguments, label_smoothing_factor=smoothing, report_to="none")
        losses.append(Trainer(model, options, train_dataset=rows).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


class Adapted(torch.nn.Module):
    """An output layer with an adapter, as PEFT wraps it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.adapter = layer, torch.nn.Linear(layer.in_features, layer.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 9 * self.adapter(x)


@pytest.mark.parametrize("form", ["adapter", "hook"])
def test_an_output_layer_that_does_more(form: str) -> None:
    model, ids = make_model(), random_ids()
    if form == "adapter":
        model.lm_head = Adapted(model.lm_head)
    else:
        model.lm_head.register_forward_hook(lambda module, args, output: output.flip(-1))
    output = model(ids, labels=ids)
    expected = ForCausalLMLoss(output.logits, ids, VOCABULARY)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    if form == "adapter":
        assert model.lm_head.adapter.weight.grad.abs().sum() > 0
    new = model.generate(ids[:1], max_new_tokens=20, eos_token_id=None)[0, 7:].tolist()
    assert list(model.stream_tokens(ids[0], 20, eos_token_id=())) == new


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("make", [make_model, make_transformer], ids=["rnn", "transformer"])
def test_outputs_that_are_not_kept_are_told(make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = type(transformers.utils.logging.get_logger())
    monkeypatch.setattr(logger, "warning_once", lambda self, text, *_: said.append(text), raising=False)
    model, tokens = make(), torch.ones(1, 3, dtype=torch.long)
    model(tokens)
    assert not said
    model(tokens, **{name: True})
    assert [text.partition(":")[0] for text in said] == [name]
