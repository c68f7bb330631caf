"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

DATA_VARIABLE = "FASTLM_DATA"

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
CheckpointFolder = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a training run, or of a checkpoint in it.")
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads. Default: torch's choice.")]
