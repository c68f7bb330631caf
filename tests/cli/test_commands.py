"""The commands, end to end and on bad input."""

import errno
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import cli
from fastlm.cli import main

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"embedding-size": 8, "hidden-size": 16, "heads": 2, "layers": 1}
RUN = {"batch-size": 4, "eval-every": 4, "threads": 1}
TINY = [f"--{name}={value}" for name, value in {**SIZES, **RUN}.items()]


def train(data, output, *more):
    return main(["train", "lm", "--data", str(data), "--output", str(output), "--seq-len", "16", *TINY, *more])


def shown(capsys, *arguments):
    assert main([str(it) for it in arguments]) == 0
    return capsys.readouterr().out


def figure(text, name):
    return float(re.search(rf"^{name} +([\d.]+)", text, re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("model", "vocabulary"), [("gru", "char"), ("lstm", "word"), ("transformer", "word"), ("gpt2", "bpe")]
)
def test_train_evaluate_generate(model, vocabulary, text_file, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--model", model, "--vocabulary", vocabulary, "--vocab-size", "300", "--steps", "8"]
    assert train(text_file, output, *options) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{output}: after 8 steps, validation loss ")
    begin, *lines = captured.err.splitlines()
    assert begin.endswith("tokens: 8 steps from 0")
    assert [line.split(":")[0] for line in lines] == ["step 4/8", "step 8/8"]

    found = shown(capsys, "evaluate", output, "--data", text_file)
    loss, bits = (float(re.search(pattern, captured.out)[1]) for pattern in (r"loss ([\d.]+)", r"([\d.]+) bits"))
    assert figure(found, "loss") == pytest.approx(loss, abs=2e-4)
    assert figure(found, "bits per character") == pytest.approx(bits, rel=0.01)  # of which one is of all characters
    whole = shown(capsys, "evaluate", output, "--data", text_file, "--whole")
    assert "all of it" in whole

    command = ["generate", output, "--prompt", "the", "--max-new-tokens", "40", "--top-k", "20", "--top-p", "0.95"]
    first = shown(capsys, *command, "--seed", "3")
    assert first.startswith("the")
    assert first == shown(capsys, *command, "--seed", "3") != shown(capsys, *command, "--seed", "4")
    assert "<unk>" not in first
    checkpoint = shown(capsys, "generate", output / "checkpoint-4", "--greedy", "--max-new-tokens", "20")
    assert checkpoint == shown(capsys, "generate", output / "checkpoint-4", "--greedy", "--max-new-tokens", "20")


def test_interactive_answers_every_line(text_file, tmp_path, capsys, monkeypatch):
    assert train(text_file, tmp_path / "out", "--steps", "1") == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\nsat on\n"))
    text = shown(capsys, "generate", tmp_path / "out", "--interactive", "--max-new-tokens", "5", "--greedy")
    assert re.match(r"the.{5}\nsat on.{5}\n$", text, re.DOTALL)
    # A line that cannot be gone on from does not end the conversation.
    monkeypatch.setattr(sys, "stdin", io.StringIO("\x01\nthe\n"))
    assert main(["generate", str(tmp_path / "out"), "--interactive", "--max-new-tokens", "5", "--greedy"]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(r"the.{5}\n", captured.out, re.DOTALL)
    assert "error: prompt: expected text that the vocabulary knows" in captured.err
    assert main(["generate", str(tmp_path / "out"), "--prompt", "\udcff"]) == 2
    assert capsys.readouterr().err == "error: prompt: expected UTF-8 text, got other bytes\n"


def test_resume_takes_the_options_of_the_run(text_file, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    assert train(text_file, output, "--steps", "4", "--schedule", "constant") == 0
    assert main(["train", "lm", "--resume", "--output", str(output), "--steps", "8"]) == 0
    assert "after 8 steps" in capsys.readouterr().out
    assert main(["train", "lm", "--resume", "--output", str(output), "--hidden-size", "20"]) == 2
    assert "hidden_size: cannot change when a run goes on, was 16, got 20" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(text_file, tmp_path, capsys, monkeypatch):
    def interrupt(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)

    output = tmp_path / "my run"
    with monkeypatch.context() as patch:
        patch.setattr("fastlm.cli.progress.ProgressCallback.on_step_begin", interrupt)
        assert train(text_file, output, "--steps", "6") == 130
    advice = capsys.readouterr().err.splitlines()[-1]
    assert main(["generate", str(output)]) == 2
    assert "the run in it is not finished: go on with fastlm train lm --resume" in capsys.readouterr().err
    assert advice == f"stopped at step 1; go on: fastlm train lm --resume --output '{output}'"
    assert main(shlex.split(advice.partition("fastlm ")[2])) == 0
    assert "after 6 steps" in capsys.readouterr().out


def test_terminal_sees_what_is_done_with_the_text(text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich: a terminal
    monkeypatch.setenv("TERM", "xterm")
    assert train(text_file, tmp_path / "out", "--steps", "4") == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    for beginning in ("reading", "learning the vocabulary", "tokenizing"):
        assert any(line.startswith(beginning) and "%" in line for line in lines)
    assert any(re.search(r"4/4 loss [\d.]+, [\d,]+ tokens/s", line) for line in lines)
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(text_file)]) == 0
    assert re.search(r"evaluating.*100%", capsys.readouterr().err)


def test_help_names_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "lm", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("--data", "--model", "--vocabulary", "--resume", "--label-smoothing", "--context", "--debug"):
        assert name in text


def test_info(capsys):
    assert "backends" in shown(capsys, "info")


BAD_DATA = [
    pytest.param(None, "No such file or directory", id="missing"),
    pytest.param("folder", "Is a directory", id="folder"),
    pytest.param(b"", "expected text, got an empty file", id="empty"),
    pytest.param(b"abc\xff" * 1000, "expected UTF-8 text, got byte 0xff at 3", id="binary"),
    pytest.param(b"short", "expected at least 17 characters of training text", id="train"),
    pytest.param(b"abcd" * 20, "expected at least 17 characters of validation text", id="valid"),
]


@pytest.mark.parametrize(("content", "message"), BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing(content, message, tmp_path, capsys):
    path = tmp_path / "data.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert train(path, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: {re.escape(str(path))}: .*{message}.*\n", captured.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "lm"], "expected a text file, in --data or FASTLM_DATA"),
        (["train", "lm", "--data", "x", "--steps", "many"], "--steps"),
        (["train", "lm", "--data", "x", "--hidden-size", "0"], "--hidden-size"),
        (["train", "lm", "--data", "x", "--threads", "100000"], "--threads"),
        (["train", "lm", "--data", "x", "--model", "rnn"], "'gru', 'lstm', 'transformer', 'gpt2'"),
        (["train", "lm", "--data", "x", "--steps", "1", "--epochs", "1"], "steps, epochs: expected one of them"),
        (["train", "lm", "--resume"], "expected the folder of the run to resume"),
        (["train", "lm", "--resume", "--output", "nowhere"], "found no training_options.json"),
        (["evaluate", "nowhere", "--data", "x"], "found no config.json"),
        (["generate", "nowhere"], "found no config.json"),
        (["generate", "nowhere", "--temperature", "inf"], "--temperature"),
        (["dance"], "No such command 'dance'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_without_a_command_the_help_is_shown(capsys):
    for arguments in ([], ["train"]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert "Usage: fastlm" in captured.out + captured.err
        assert "error" not in captured.err


def test_a_pipe_is_no_data(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert train(tmp_path / "pipe", tmp_path / "out") == 2
    assert "pipe: expected a regular file, for it is read more than once" in capsys.readouterr().err


def test_damaged_checkpoints_are_named(text_file, tmp_path, capsys):
    output = tmp_path / "out"
    assert train(text_file, output, "--steps", "1") == 0
    capsys.readouterr()
    for name in ("tokenizer.json", "model.safetensors"):
        (output / name).write_bytes(b"\x00")
        assert main(["generate", str(output)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {output}: cannot read the model or its vocabulary: ")
    (output / "training_options.json").write_text("{")
    assert main(["evaluate", str(output), "--data", str(text_file)]) == 2
    assert "training_options.json: expected what a training run wrote" in capsys.readouterr().err


def test_a_full_disk_is_named():
    """However the library that met it wrapped it."""
    error = RuntimeError("unexpected pos 63168 vs 63060")
    error.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/model.safetensors")
    assert cli._describe(error) == "run/model.safetensors: No space left on device"


def test_debug_shows_where_an_error_came_from(tmp_path, capsys):
    assert train(tmp_path / "none", tmp_path / "out", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in [name for name in sys.modules if name.startswith("fastlm.training.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["train", "lm", "--data", "x"]) == 2
    assert "pip install 'fastlm[lm]'" in capsys.readouterr().err


def test_process(text_file, tmp_path):
    """Status, streams and imports of a process of its own: help needs none of the large packages."""
    code = """
import sys
import fastlm
assert not {"transformers", "typer", "datasets", "rich"} & set(sys.modules)
from fastlm import cli
from fastlm.cli import main
assert main(["train", "lm", "--help"]) == 0
assert not {"transformers", "datasets", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "-m", "fastlm", "evaluate", str(tmp_path), "--data", str(text_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}: expected the folder of a trained model, found no config.json\n"


@pytest.mark.skipif("FASTLM_DATA" not in os.environ, reason="FASTLM_DATA names no text")
def test_learns_from_real_text(tmp_path, capsys, monkeypatch):
    """A few hundred steps beat the frequencies of characters by far."""
    text = REAL_TEXT[:200_000]
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    arguments = ["--hidden-size", "64", "--embedding-size", "32", "--seq-len", "32", "--steps", "300", "--threads", "1"]
    assert main(["train", "lm", "--data", str(path), "--output", str(tmp_path / "out"), *arguments]) == 0
    counts = torch.tensor([text.count(character) for character in set(text)], dtype=torch.float64)
    entropy = torch.distributions.Categorical(counts).entropy().item()
    loss = float(re.search(r"loss ([\d.]+)", capsys.readouterr().out)[1])
    assert loss < 0.8 * entropy


REAL_TEXT = Path(os.environ["FASTLM_DATA"]).read_text(encoding="utf-8") if "FASTLM_DATA" in os.environ else ""
