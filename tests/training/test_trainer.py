"""The Trainer's loss and state, against the same computed plainly."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fastlm.models import RNNConfig, RNNForCausalLM, TransformerConfig, TransformerForCausalLM
from fastlm.training.data import BlockDataset, StreamDataset
from fastlm.training.trainer import STATE_FILE, load_state, mean_loss, next_token_loss
from tests.training.test_data import tokens_of

VOCABULARY = 11


def recurrent(cell="gru", dropout=0.0):
    sizes = {"vocab_size": VOCABULARY, "embedding_size": 6, "hidden_size": 9, "num_layers": 2}
    return RNNForCausalLM(RNNConfig(**sizes, cell=cell, dropout=dropout))


def transformer():
    sizes = {"max_position_embeddings": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    return TransformerForCausalLM(TransformerConfig(vocab_size=VOCABULARY, **sizes))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=None, eos_token_id=None))


def random_tokens(count):
    return tokens_of(torch.randint(VOCABULARY, (count,)).tolist())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_streams_carry_the_state(cell):
    """In pieces of 8, the last one shorter, the loss is that of the whole text at once."""
    model, tokens = recurrent(cell, dropout=0.5).eval(), random_tokens(100)
    loss, count = mean_loss(model, DataLoader(StreamDataset(tokens, 8, 1), 1, collate_fn=lambda batch: batch))
    whole = torch.tensor(tokens[:].tolist())
    expected = cross_entropy(model(whole[None, :-1]).logits[0], whole[1:])
    assert count == 99
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_stop_between_batches():
    model, stream = recurrent(), StreamDataset(random_tokens(33), 8, 2)
    _, state = next_token_loss(model, stream.__getitems__([0, 1]), None)
    assert not state.h.requires_grad
    loss, _ = next_token_loss(model, stream.__getitems__([2, 3]), state)
    loss.backward()
    fresh, _ = next_token_loss(model, {**stream.__getitems__([2, 3]), "first": True}, state)
    assert fresh.item() != loss.item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("make", [recurrent, transformer, gpt2])
def test_loss_is_the_cross_entropy(make, smoothing):
    model, batch = make().eval(), BlockDataset(random_tokens(50), 8).__getitems__([3, 20, 40])
    batch["shift_labels"][0, -3:] = -100
    loss, _ = next_token_loss(model, batch, None, smoothing)
    logits, target = model(batch["input_ids"]).logits.flatten(0, 1), batch["shift_labels"].flatten()
    assert loss.item() == pytest.approx(cross_entropy(logits, target, label_smoothing=smoothing).item(), rel=1e-5)


@pytest.mark.parametrize("damage", ["missing", "not-safetensors", "other-names", "not-finite"])
def test_damaged_state_is_refused(damage, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / STATE_FILE
    if damage == "not-safetensors":
        path.write_bytes(b"\x00" * 20)
    elif damage == "other-names":
        save_file({"x": torch.zeros(1)}, path)
    elif damage == "not-finite":
        save_file({"h": torch.tensor([torch.nan])}, path)
    with pytest.raises(ValueError, match=str(path)):
        load_state(path)
