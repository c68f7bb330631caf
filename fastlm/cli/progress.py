"""What is shown while training, on stderr: a bar on a terminal, else a line with every validation."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState


@contextlib.contextmanager
def show_progress() -> Iterator[TrainerCallback]:
    """Yields the callback that shows a run's progress."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield ProgressCallback(console)
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        yield ProgressCallback(console, bar)


class ProgressCallback(TrainerCallback):
    """Shows steps, losses, tokens/s of the steps themselves, and the time left."""

    def __init__(self, console: Console, bar: Progress | None = None) -> None:
        self._console, self._bar = console, bar
        self._loss = ""
        self._seconds = self._begun = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Says what is trained on what; learns how long the run is."""
        model, batches = kwargs["model"], kwargs["train_dataloader"]
        self._console.print(
            f"{model.num_parameters():,} parameters, vocabulary of {model.config.vocab_size:,}, "
            f"{len(batches.dataset.tokens):,} tokens: {state.max_steps:,} steps from {state.global_step:,}"
        )
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._tokens_per_step = sequences * batches.dataset.seq_len
        self._first_step = state.global_step
        if self._bar is not None:
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, text="")

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops the clock and moves the bar."""
        self._seconds += time.perf_counter() - self._begun
        self._move(state)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Takes the loss; prints a line for a validation."""
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f}, "
            self._move(state)
        if "eval_loss" in logs:
            self._console.print(
                f"step {state.global_step}/{state.max_steps}: {self._loss}validation {logs['eval_loss']:.4f}, "
                f"{self._rate(state):,.0f} tokens/s"
            )

    def _move(self, state: TrainerState) -> None:
        if self._bar is not None:
            text = f"{self._loss}{self._rate(state):,.0f} tokens/s"
            self._bar.update(self._task, completed=state.global_step, text=text)

    def _rate(self, state: TrainerState) -> float:
        return (state.global_step - self._first_step) * self._tokens_per_step / max(self._seconds, 1e-9)
