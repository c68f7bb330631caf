"""What is shown on stderr meanwhile: bars on a terminal; else, of a training, a line with every validation."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastlm.training.data import Show


@contextlib.contextmanager
def show_progress() -> Iterator["ProgressCallback"]:
    """Yields the callback that shows a run's progress."""
    console = _console()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with contextlib.closing(_Stages(console)) as stages:
        try:
            yield ProgressCallback(console, bar, stages)
        finally:
            bar.stop()


@contextlib.contextmanager
def show_stages() -> Iterator[Show]:
    """Yields what shows how far a stage of some work is; off a terminal it shows nothing."""
    with contextlib.closing(_Stages(_console())) as stages:
        yield stages.show


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


class _Stages:
    """A bar for one stage after another, which leaves nothing behind."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def show(self, stage: str, done: float | None) -> None:
        """Moves the bar, or begins a new one, which only moves to and fro where `done` is None."""
        if self._task is None or self._bar.tasks[0].description != stage:
            if self._task is None:
                self._bar.start()
            else:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, total=None if done is None else 1)
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


class ProgressCallback(TrainerCallback):
    """Shows steps, losses, tokens/s of the steps themselves, and the time left."""

    def __init__(self, console: Console, bar: Progress, stages: _Stages) -> None:
        self._console, self._bar, self._stages = console, bar, stages
        self.show = stages.show
        self._loss = ""
        self._seconds = self._begun = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Says what is trained on what; learns how long the run is."""
        self._stages.close()
        model, batches = kwargs["model"], kwargs["train_dataloader"]
        self._console.print(
            f"{model.num_parameters():,} parameters, vocabulary of {model.config.vocab_size:,}, "
            f"{len(batches.dataset.tokens):,} tokens: {state.max_steps:,} steps from {state.global_step:,}"
        )
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._tokens_per_step = sequences * batches.dataset.seq_len
        self._first_step = state.global_step
        self._bar.start()
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
        text = f"{self._loss}{self._rate(state):,.0f} tokens/s"
        self._bar.update(self._task, completed=state.global_step, text=text)

    def _rate(self, state: TrainerState) -> float:
        return (state.global_step - self._first_step) * self._tokens_per_step / max(self._seconds, 1e-9)
