"""The tree of commands."""

import typer

from fastlm.cli.evaluate import evaluate
from fastlm.cli.generate import generate
from fastlm.cli.info import info
from fastlm.cli.train import train_lm

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Language models on the CPU: train one on a text file, measure it, let it write.",
)
train = typer.Typer(no_args_is_help=True, help="Train a model.")
app.add_typer(train, name="train")
train.command("lm")(train_lm)
app.command()(evaluate)
app.command()(generate)
app.command()(info)
