"""Whole runs on a small text: what they leave, and that a stopped one goes on as if it had not been."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import TrainerCallback

from fastlm.training import Checkpoint, TrainingOptions, evaluate, generate, train
from fastlm.training.data import StreamDataset
from fastlm.training.run import LOCK, load_corpus
from fastlm.training.trainer import mean_loss

ROOT = Path(__file__).resolve().parents[2]
TINY = {"embedding_size": 8, "hidden_size": 16, "heads": 2, "layers": 1, "seq_len": 16, "batch_size": 4}
SHORT = {"steps": 12, "eval_every": 4, "log_every": 1, "dropout": 0.0, "threads": 1}


def options_for(data: Path, output: Path, **changes) -> TrainingOptions:
    return TrainingOptions(**{**TINY, **SHORT, "data": data, "output": output, **changes})


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def losses(output: Path) -> dict[tuple[int, str], float]:
    """Training and validation losses by step."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {(entry["step"], key): entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry}


def resume(output: Path, **changes):
    return train(TrainingOptions.load(output).changed(**changes), resume=True)


MODELS = [
    {"model": "gru"},
    {"model": "lstm", "layers": 2, "accumulate": 2, "vocabulary": "word"},
    {"model": "transformer"},
    {"model": "gpt2", "optimizer": "adam", "vocabulary": "bpe", "vocab_size": 300},
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["model"])
def test_interrupted_run_goes_on_as_an_unbroken_one(model, text_file, tmp_path):
    whole = train(options_for(text_file, tmp_path / "whole", **model))
    assert not whole.interrupted
    broken = options_for(text_file, tmp_path / "broken", **model)
    stopped = train(broken, callbacks=[At(5, lambda: signal.raise_signal(signal.SIGINT))])
    assert (stopped.interrupted, stopped.step) == (True, 6)
    assert not (broken.output / "model.safetensors").exists()
    moved = broken.output.rename(tmp_path / "moved")
    result = resume(moved)
    assert (result.interrupted, result.step) == (False, 12)
    expected = losses(whole.output)
    assert losses(moved) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 12 + 3
    assert result.loss == pytest.approx(whole.loss, rel=1e-4)


KILLED = """
import os, signal, sys
from pathlib import Path
from fastlm.training import TrainingOptions, train
from tests.training.test_run import At, options_for
options = options_for(Path(sys.argv[1]), Path(sys.argv[2]), epochs=3.0, steps=None)
train(options, callbacks=[At(int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))])
"""


def test_killed_run_goes_on_as_an_unbroken_one(text_file, tmp_path):
    whole = train(options_for(text_file, tmp_path / "whole", epochs=3.0, steps=None))
    broken = tmp_path / "broken"
    command = [sys.executable, "-c", KILLED, str(text_file), str(broken), "99"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (broken / "checkpoint-100").mkdir()  # as a kill while saving leaves it
    (broken / "checkpoint-100" / "config.json").write_text("{")
    assert resume(broken).step == whole.step
    assert losses(broken) == pytest.approx(losses(whole.output), rel=1e-4)


def test_show_hears_of_every_stage(text_file, tmp_path):
    heard: dict[str, list[float]] = {}

    def show(stage, done):
        heard.setdefault(stage, []).append(done)

    options = options_for(text_file, tmp_path / "out")
    train(options, show=show)
    assert list(heard) == ["reading", "learning the vocabulary", "tokenizing"]
    evaluate(Checkpoint.load(options.output), text_file, show=show)
    assert list(heard)[3:] == ["evaluating"]
    for done in heard.values():
        assert done[0] == 0
        assert 0.9 < done[-1] <= 1  # "reading" counts characters as bytes


def test_best_weights_are_kept(text_file, tmp_path):
    """The learning rate makes the model worse in the end."""
    options = options_for(text_file, tmp_path / "out", lr=0.5, schedule="constant", optimizer="sgd", clip=0.0, steps=40)
    result = train(options)
    validation = {step: loss for (step, kind), loss in losses(result.output).items() if kind == "eval_loss"}
    assert result.loss == min(validation.values())
    found = evaluate(Checkpoint.load(result.output), text_file)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert (result.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((result.output / "tensorboard").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in result.output.iterdir()}


def test_validation_may_read_a_few_batches(text_file, tmp_path):
    """On the way; the run's own figure is of the whole text."""
    whole, part = (
        train(options_for(text_file, tmp_path / str(count), model="transformer", eval_batches=count))
        for count in (None, 2)
    )
    assert (whole.output / "model.safetensors").read_bytes() == (part.output / "model.safetensors").read_bytes()
    assert part.loss == pytest.approx(whole.loss, rel=1e-6)
    of_whole, of_part = (losses(result.output)[12, "eval_loss"] for result in (whole, part))
    assert of_whole == whole.loss
    assert of_part != pytest.approx(of_whole, rel=1e-4)
    log = json.loads((part.output / "trainer_state.json").read_text())["log_history"]
    assert log[-1] == {"final_loss": part.loss, "step": 12}
    options = TrainingOptions.load(part.output)
    corpus, model = load_corpus(options, part.output), Checkpoint.load(part.output).model
    stream = StreamDataset(corpus.valid, 16, 4)
    expected, targets = mean_loss(model, [stream.__getitems__([*range(i, i + 4)]) for i in (0, 4)])
    assert targets == 2 * 4 * 16
    assert of_part == pytest.approx(expected, rel=1e-6)


def test_divergence_is_an_error(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out", lr=1e38, optimizer="sgd", clip=0.0)
    with pytest.raises(ValueError, match="never a finite number; train with a lower lr"):
        train(options)


def test_run_that_is_done_can_go_on(text_file, tmp_path):
    first = train(options_for(text_file, tmp_path / "out", schedule="constant"))
    (first.output / "model.safetensors").unlink()  # as if it had been killed before its last act
    again = resume(first.output)
    assert (again.step, again.loss) == (12, first.loss)
    assert evaluate(Checkpoint.load(first.output), text_file).loss == pytest.approx(first.loss, rel=1e-6)
    longer = resume(first.output, steps=16)
    assert longer.step == 16
    assert (16, "eval_loss") in losses(longer.output)


def test_resume_without_a_checkpoint_begins_again(text_file, tmp_path):
    whole = train(options_for(text_file, tmp_path / "whole"))
    options = options_for(text_file, tmp_path / "broken")
    with pytest.raises(RuntimeError, match="stop"):
        train(options, callbacks=[At(2, lambda: (_ for _ in ()).throw(RuntimeError("stop")))])
    resume(options.output)
    assert losses(options.output) == pytest.approx(losses(whole.output), rel=1e-6)


@pytest.mark.parametrize("model", ["gru", "transformer", "gpt2"])
def test_bfloat16_is_near_float32(model, text_file, tmp_path):
    full, half = (train(options_for(text_file, tmp_path / str(on), model=model, bf16=on)) for on in (False, True))
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 700}, "expected at least 701 characters of validation text for one sequence of 700"),
        ({"seq_len": 200, "vocabulary": "word"}, "expected at least 201 tokens of validation text"),
        ({"vocabulary": "bpe", "vocab_size": 20}, "vocab_size: expected at least 256 for bpe, got 20"),
        ({"model": "gpt2", "heads": 3}, "heads: expected a divisor of hidden_size"),
        ({"model": "transformer", "heads": 3}, "heads: expected a divisor of hidden_size"),
        ({"model": "transformer", "seq_len": 1}, "seq_len: expected at least 2 for transformer, got 1"),
    ],
    ids=["short", "few-words", "bpe", "heads-gpt2", "heads", "context"],
)
def test_nothing_is_written_before_all_is_found_good(changes, message, text_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(options_for(text_file, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"dropout": math.nan}, "dropout: expected 0 to 1, got nan"),
        ({"model": "rnn"}, "model: expected one of gru, lstm, transformer, gpt2, got rnn"),
        ({"steps": 3, "epochs": 1.0}, "steps, epochs: expected one of them"),
        ({"save_every": 6}, "save_every: expected a multiple of eval_every"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0"),
        ({"epochs": math.inf, "steps": None}, "epochs: expected a finite number, got inf"),
        ({"data": Path("a\udcff.txt")}, r"data: expected a name in UTF-8, got 'a\\udcff.txt'"),
        ({"output": Path("\ud800")}, r"output: expected a name in UTF-8, got '\\ud800'"),
    ],
)
def test_bad_option(changes, message, text_file):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(options_for(text_file, Path("out")), **changes)


def test_resume_wants_the_text_that_the_run_began_with(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "run")
    train(options)
    moved = Path(shutil.copy(text_file, tmp_path / "moved.txt"))
    resume(options.output, data=moved)
    moved.write_text(text_file.read_text(encoding="utf-8").swapcase(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"moved.txt: expected the text that the run in .* began with, got another"):
        resume(options.output, steps=16)


def test_only_some_options_change_on_resume(text_file):
    options = options_for(text_file, Path("out"))
    assert options.changed(epochs=2.0).steps is None
    assert options.changed(model="gru").model == "gru"
    with pytest.raises(ValueError, match="lr: cannot change when a run goes on, was None, got 1"):
        options.changed(lr=1.0)


def test_folders_are_not_overwritten_by_accident(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out", steps=1, eval_every=1)
    (tmp_path / "out").mkdir()
    train(options)
    with pytest.raises(ValueError, match="holds a training run already"):
        train(options)
    kept = options.output / "checkpoint-1" / "mine"
    kept.touch()
    train(options, overwrite=True)
    assert not kept.exists()
    with pytest.raises(ValueError, match="exists and is no training run"):
        train(dataclasses.replace(options, output=tmp_path), overwrite=True)


def test_two_processes_do_not_train_in_one_folder(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out", steps=4)
    train(options)
    with FileLock(options.output / LOCK):
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="out: another process is training in it"):
                train(options, **how)
    assert (options.output / "model.safetensors").is_file()
    assert resume(options.output, steps=8).step == 8


# Losses that only rise, so that the first validation is the best.
RISING = {"optimizer": "sgd", "lr": 30.0, "clip": 0.0, "schedule": "constant", "warmup": 0.0}


def test_the_best_weights_of_a_finished_run_stay_or_are_missed(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out", eval_every=2, **RISING)
    result = train(options)
    weights = (options.output / "model.safetensors").read_bytes()
    state = json.loads((options.output / "trainer_state.json").read_text())
    best = options.output / f"checkpoint-{state['best_global_step']}"
    assert state["best_global_step"] < result.step
    assert resume(options.output).loss == result.loss
    assert (options.output / "model.safetensors").read_bytes() == weights
    shutil.rmtree(best)
    with pytest.raises(ValueError, match=f"{best.name}: expected the checkpoint with the run's best weights"):
        resume(options.output)
    assert (options.output / "model.safetensors").read_bytes() == weights
    # Trained on, the best is among what is still there.
    result = resume(options.output, steps=16)
    loss = evaluate(Checkpoint.load(options.output), text_file).loss
    assert loss == pytest.approx(result.loss, rel=1e-6)


def test_the_best_is_among_the_weights_that_are_saved(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out", eval_every=2, save_every=4, **RISING)
    result = train(options)
    state = json.loads((options.output / "trainer_state.json").read_text())
    assert state["best_global_step"] % 4 == 0
    best = options.output / f"checkpoint-{state['best_global_step']}" / "model.safetensors"
    assert best.read_bytes() == (options.output / "model.safetensors").read_bytes()
    assert result.loss == state["best_metric"]


def test_intervals_may_change_on_resume(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out", steps=8)
    train(options)
    resume(options.output, steps=12, eval_every=2)
    assert [step for step, key in losses(options.output) if key == "eval_loss"] == [4, 8, 10, 12]


@pytest.mark.parametrize("stopped_at", [2, 6])
def test_a_stopped_run_may_end_where_it_stopped(stopped_at, text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out")
    stopped = train(options, callbacks=[At(stopped_at - 1, lambda: signal.raise_signal(signal.SIGINT))])
    assert (stopped.interrupted, stopped.step) == (True, stopped_at)
    result = resume(options.output, steps=stopped_at)
    assert (result.interrupted, result.step) == (False, stopped_at)
    assert math.isfinite(result.loss)
    assert (options.output / "model.safetensors").is_file()


def test_what_a_user_keeps_in_a_run_is_left_alone(text_file, tmp_path):
    options = options_for(text_file, tmp_path / "out", steps=4)
    train(options)
    (options.output / "checkpoint-mine").mkdir()
    (options.output / "checkpoint-notes.txt").write_text("best so far")
    resume(options.output, steps=8)
    assert (options.output / "checkpoint-mine").is_dir()
    data = options.output / "text.txt"
    data.write_bytes(text_file.read_bytes())
    with pytest.raises(ValueError, match="expected data outside of"):
        train(dataclasses.replace(options, data=data), overwrite=True)
    assert data.is_file()
    with pytest.raises(ValueError, match="resume, overwrite: expected one of them, got both"):
        train(options, resume=True, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(options.output)
    assert train(dataclasses.replace(options, output=link), overwrite=True).step == 4
    assert link.is_symlink()


def test_a_schedule_may_end_where_it_began(text_file, tmp_path):
    for schedule in ("linear", "cosine"):
        options = options_for(text_file, tmp_path / schedule, steps=2, schedule=schedule, min_lr=1.0, warmup=0.0)
        assert train(options).step == 2


def test_paths_may_be_strings(text_file, tmp_path):
    with pytest.raises(TypeError, match="data: expected a path, got int"):
        TrainingOptions(data=5)
    train(options_for(str(text_file), str(tmp_path / "out"), steps=4))
    assert TrainingOptions.load(str(tmp_path / "out")).output == tmp_path / "out"
    loaded = Checkpoint.load(str(tmp_path / "out"))
    assert evaluate(loaded, str(text_file)) == evaluate(loaded, text_file)


def test_a_text_that_ends_within_a_character_is_shown_whole(text_file, tmp_path, monkeypatch):
    """Byte pairs: what is no whole character yet is held back, and at the end shown as what it is."""
    train(options_for(text_file, tmp_path / "out", steps=4, vocabulary="bpe", vocab_size=300))
    loaded = Checkpoint.load(tmp_path / "out")
    tokens = loaded.tokenizer("a\u20ac")["input_ids"]
    for end, expected in ((len(tokens), "a\u20ac"), (len(tokens) - 1, "a\ufffd")):
        monkeypatch.setattr(loaded.model, "stream_tokens", lambda *_, end=end, **__: iter(tokens[:end]))
        pieces: list[str] = []
        generate(loaded, "the", end, pieces.append)
        assert "".join(pieces) == expected
