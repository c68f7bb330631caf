"""`fastlm generate`."""

import sys
from typing import Annotated

import typer

from fastlm.cli.options import CheckpointFolder, Debug


def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[str, typer.Option(help="Text to go on with. Default: the beginning of a line.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the new text.")] = 500,
    temperature: Annotated[float, typer.Option(min=0.01, max=100, help="Lower is more cautious.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Sample among the fewest tokens so likely together.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes the text repeatable.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Ask for prompts until end of input.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
    debug: Debug = False,
) -> None:
    """Let a model write, after a prompt or after each line typed (--interactive)."""
    import torch

    from fastlm import training

    torch.set_num_threads(threads)
    loaded = training.Checkpoint.load(checkpoint)

    def write(text: str) -> None:
        begun = False

        def show(piece: str) -> None:  # the prompt with its first piece: a bad prompt is not shown
            nonlocal begun
            print(piece if begun else text + piece, end="", flush=True)
            begun = True

        training.generate(
            loaded,
            text,
            max_new_tokens,
            show,
            do_sample=not greedy,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        print("" if begun else text, flush=True)

    if not interactive:
        write(prompt)
        return
    if prompt:
        write(prompt)
    while (line := _ask()) is not None:
        try:
            write(line)
        except KeyboardInterrupt:  # ends the text, not the conversation
            print()
        except ValueError as error:  # of this line alone
            print(f"error: {error}", file=sys.stderr)


def _ask() -> str | None:
    """A line typed after "> "; None at the end of input or on Ctrl-C."""
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
