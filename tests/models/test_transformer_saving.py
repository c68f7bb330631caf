"""Checkpoints, pipelines and transformers' Trainer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from fastlm.models import TransformerForCausalLM, TransformerModel
from tests.models.small import VOCABULARY, random_ids
from tests.models.small_transformer import make_transformer
from tests.models.test_rnn_saving import make_tokenizer


@pytest.mark.parametrize("tied", [False, True], ids=("untied", "tied"))
@pytest.mark.parametrize("bias", [False, True], ids=("no-bias", "bias"))
def test_round_trip(bias: bool, tied: bool, tmp_path: Path) -> None:
    model, ids = make_transformer(bias=bias, tie_word_embeddings=tied, eos_token_id=[2, 3]), random_ids()
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is TransformerForCausalLM
    assert not loaded.training
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_base_model_of_a_checkpoint_and_back(tmp_path: Path) -> None:
    model, ids = make_transformer(), random_ids()
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(base) is TransformerModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    loaded = TransformerForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 5])
def test_resize_token_embeddings(size: int) -> None:
    model, ids = make_transformer(), random_ids().clamp(max=VOCABULARY - 6)
    both, logits = min(size, VOCABULARY), model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    assert torch.equal(model(ids).logits[..., :both], logits[..., :both])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_text_generation_pipeline(tmp_path: Path) -> None:
    model, tokenizer = make_transformer(), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", str(tmp_path), device="cpu")
    texts = ["w5 w6 w7", "w9"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [pipe(text, **options)[0]["generated_text"] for text in texts]
    assert [found[0]["generated_text"] for found in pipe(texts, batch_size=2, **options)] == alone
    new = list(model.stream_tokens(tokenizer(texts[0])["input_ids"], 6))
    assert alone[0].split() == tokenizer.decode(new, skip_special_tokens=True).split()


def test_trainer(tmp_path: Path) -> None:
    model = TransformerForCausalLM(make_transformer(hidden_size=32).config)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(16, 6) % VOCABULARY]
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 30}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 80}
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.02, **options, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 4
    model.config.use_cache = True  # which the Trainer turned off
    assert trainer.predict(rows).predictions.shape == (16, 6, VOCABULARY)
