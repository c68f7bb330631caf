"""`fastlm evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.options import DATA_VARIABLE, CheckpointFolder, Debug, Threads


def evaluate(
    checkpoint: CheckpointFolder,
    data: Annotated[Path, typer.Option(envvar=DATA_VARIABLE, help="UTF-8 text file.")],
    whole: Annotated[bool, typer.Option("--whole", help="All of the text, not its validation part alone.")] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """How well a model predicts a text: perplexity of a token, bits per character."""
    import torch

    from fastlm import training
    from fastlm.cli.progress import show_stages

    if threads is not None:
        torch.set_num_threads(threads)
    with show_stages() as show:
        found = training.evaluate(training.Checkpoint.load(checkpoint), data, whole, show=show)
    print(f"{'text':<20} {data}, {'all of it' if whole else 'validation part'}")
    print(f"{'predicted':<20} {found.tokens:,} tokens, {found.characters:,} characters")
    print(f"{'unknown tokens':<20} {found.unknown:.2%}")
    print(f"{'loss':<20} {found.loss:.4f} nats a token")
    print(f"{'perplexity':<20} {found.perplexity:.3f}")
    print(f"{'bits per character':<20} {found.bits_per_character:.4f}")
