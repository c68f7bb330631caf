"""The main job, end to end at a tiny size, and what it says about bad input."""

import math

import pytest
import torch

from fastlm import demo

TINY = ["--steps", "12", "--batch", "4", "--seq-len", "16", "--embedding", "8", "--hidden", "16", "--sample", "20"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("naïve ünïcode, wörds and möre 🙂. " * 20, encoding="utf-8")
    return str(path)


def test_runs_on_the_language_reference(capsys):
    assert demo.main(TINY) == 0
    shown = capsys.readouterr().out
    for expected in ("Held-out", "recurrent layer, backward", "tokens/s", "bits per character", "first 12 steps"):
        assert expected in shown


def test_runs_on_a_file_without_rich(text, capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert demo.main([*TINY, "--data", text, "--layers", "2"]) == 0
    shown = capsys.readouterr()
    assert text in shown.out
    assert "24/24 fastlm: loss" in shown.err


def test_same_seed_gives_the_same_sample(text, capsys):
    def sample(seed: str) -> str:
        demo.main([*TINY, "--data", text, "--seed", seed])
        return capsys.readouterr().out.split("goes on:")[1].split("median")[0]

    assert sample("1") == sample("1") != sample("2")


@pytest.mark.parametrize("spoilt", [1.02, math.nan])
def test_disagreeing_losses_are_an_error(spoilt, text, capsys, monkeypatch):
    def step(self, batch):
        train_step(self, batch)
        if self.name == "fastlm":
            self.losses[-1] *= spoilt

    train_step = demo.Trainee.step
    monkeypatch.setattr(demo.Trainee, "step", step)
    assert demo.main([*TINY, "--data", text]) == 1
    assert "losses disagree by more than 1%" in capsys.readouterr().err


def test_a_diverged_training_is_an_error(text, capsys):
    assert demo.main([*TINY, "--data", text, "--lr", "1e30"]) == 1
    assert "error: training diverged, to a loss of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * 500, "expected at least 2 different characters, got 1"),
        (None, "No such file"),
        (b"too short", "expected at least 180 characters for --seq-len 16, got 9"),
        (b"abc\xff" * 100, "expected UTF-8 text, got byte 0xff at 3"),
    ],
    ids=["one-letter", "missing", "short", "not-text"],
)
def test_bad_file(content, message, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        demo.main([*TINY, "--data", str(path)])
    assert exit_info.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert str(path) in shown


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "expected a number above 0, got 0"),
        ("--hidden", "many", "invalid int value: 'many'"),
        ("--lr", "nan", "expected a number above 0, got nan"),
        ("--temperature", "-1", "expected a number above 0, got -1"),
        ("--threads", "100000", "expected a number above 0 and below 1025, got 100000"),
        ("--seed", "99999999999999999999", "from 0 to 9223372036854775807, got 99999999999999999999"),
        ("--seed", "first", "invalid seed value: 'first'"),
    ],
)
def test_bad_option(option, value, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        demo.main([option, value])
    assert exit_info.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert option in shown


def test_held_out_text_is_not_in_the_training_text():
    corpus = demo.Corpus.of(demo.reference_text(), 128)
    train, valid = corpus.decode(corpus.train), corpus.decode(corpus.valid)
    starts = range(0, len(valid) - 200, 100)
    assert sum(valid[start : start + 200] in train for start in starts) <= 0.01 * len(starts)


def test_layer_timer_covers_the_whole_layer_and_nothing_else():
    """With a layer that dwarfs the rest, its times make up most of the step, and never more than all of it."""
    torch.manual_seed(0)
    trainee = demo.Trainee("torch", demo.CharModel(10, 8, 128, 1), 1e-3)
    for _ in range(5):
        trainee.step(torch.randint(10, (65, 8)))
    times = trainee.medians()
    assert 0.5 * times.step < times.forward + times.backward < times.step
    assert times.forward > 0
    assert times.backward > 0
