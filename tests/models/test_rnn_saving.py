"""Checkpoints, pipelines and transformers' Trainer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from fastlm.models import RNNForCausalLM, RNNModel
from tests.models.small import KINDS, VOCABULARY, make_model, random_ids


@pytest.mark.parametrize(("cell", "output"), KINDS)
def test_round_trip(cell: str, output: str, tmp_path: Path) -> None:
    model, ids = make_model(cell, output, dropout=0.25, eos_token_id=[2, 3]), random_ids()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors") or output == "untied"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is RNNForCausalLM
    assert not loaded.training
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (output != "untied")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_dtypes(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert RNNForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    wide = RNNForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(map(torch.equal, wide.state_dict().values(), model.float().state_dict().values()))


def test_base_model_of_a_checkpoint_and_back(tmp_path: Path) -> None:
    model, ids = make_model(), random_ids()
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(base) is RNNModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    loaded = RNNForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_missing_weights_are_drawn_and_the_others_stay(tmp_path: Path) -> None:
    model = make_model(hidden_size=16)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = ["model.rnn.weight_hh_l0", "lm_head.bias"]
    save_file({name: value for name, value in weights.items() if name not in missing}, tmp_path / "model.safetensors")
    loaded, info = RNNForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["missing_keys"]) == sorted(missing)
    for name, value in loaded.state_dict().items():
        if name in missing:
            assert 0.15 < value.abs().max() <= 0.25  # U(-1, 1) / sqrt(H)
        else:
            assert torch.equal(value, weights[name])


@pytest.mark.parametrize(("cell", "output"), KINDS)
@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 5])
def test_resize_token_embeddings(cell: str, output: str, size: int, tmp_path: Path) -> None:
    model, ids = make_model(cell, output), random_ids().clamp(max=VOCABULARY - 6)
    both, logits = min(size, VOCABULARY), model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    assert model(ids).logits.shape == (3, 7, size)
    assert torch.equal(model(ids).logits[..., :both], logits[..., :both])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (output != "untied")
    model.save_pretrained(tmp_path)
    assert torch.equal(RNNForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<bos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def test_text_generation_pipeline(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
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
    model = make_model(output="projected", hidden_size=32)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(16, 6) % VOCABULARY]
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 40}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 80}
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.02, **options, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 4
    model.config.use_cache = True  # which the Trainer turned off
    assert trainer.predict(rows).predictions.shape == (16, 6, VOCABULARY)
    trainer.save_model(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["RNNForCausalLM"]
