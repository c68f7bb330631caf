"""transformers' Trainer for language models: targets that are already shifted, and a state carried along the text."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from fastlm.models import RNNCache, RNNForCausalLM, TransformerForCausalLM
from fastlm.ops import linear_cross_entropy
from fastlm.training.data import IGNORED, Batch, BlockDataset

STATE_FILE = "carried_state.safetensors"


def next_token_loss(
    model: PreTrainedModel, batch: Batch, state: RNNCache | None, label_smoothing: float = 0.0
) -> tuple[Tensor, RNNCache | None]:
    """Mean cross-entropy (nats) of a batch's targets, and the state to go on from, detached; None in a transformer."""
    inputs, targets = batch["input_ids"], batch["shift_labels"]
    if isinstance(model, RNNForCausalLM | TransformerForCausalLM):
        recurrent = isinstance(model, RNNForCausalLM)
        loss, *kept = model(  # a tuple: its items have no names, which depend on transformers' version
            inputs,
            cache=None if batch["first"] else state,
            shift_labels=targets,
            use_cache=recurrent,
            skip_logits=True,
            label_smoothing=label_smoothing,
            return_dict=False,
        )
        return loss, kept[0].detach() if recurrent else None
    hidden = model.base_model(inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    loss = linear_cross_entropy(hidden, head.weight, targets, head.bias, IGNORED, label_smoothing=label_smoothing)
    return loss, None


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Cross-entropy (nats) of each target in the batches of a stream, on average, and how many there are."""
    model.eval()
    total, count, state = 0.0, 0, None
    for batch in batches:
        loss, state = next_token_loss(model, batch, state)
        targets = int((batch["shift_labels"] != IGNORED).sum())
        total, count = total + loss.item() * targets, count + targets
    return total / count, count


class LanguageModelTrainer(Trainer):
    """A Trainer whose batches come from `fastlm.training.data`.

    A recurrent model's state is carried from batch to batch (from micro-batch to micro-batch where gradients are
    accumulated), starts from zero with the streams, and is saved and restored with every checkpoint.
    """

    def __init__(
        self, *args: Any, label_smoothing: float = 0.0, eval_batches: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, data_collator=_same, **kwargs)
        self.label_smoothing, self.eval_batches = label_smoothing, eval_batches
        self.carried: RNNCache | None = None
        # The loss is a mean; counting targets for another one would take time in every step.
        self.model_accepts_loss_kwargs = False

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[Any]:
        """Around the whole loss; accelerate's is around a model's forward, and no output layer of a transformer."""
        return self.accelerator.autocast()

    def compute_loss(self, model: PreTrainedModel, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a training batch; moves the carried state on."""
        loss, self.carried = next_token_loss(model, inputs, self.carried, self.label_smoothing)
        return loss

    def evaluation_loop(self, dataloader: Iterable[Batch], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Replaces a loop that weighs all batches alike and knows no state."""
        with self.compute_loss_context_manager():
            loss, count = mean_loss(self.model, itertools.islice(dataloader, self.eval_batches))
        return EvalLoopOutput(None, None, {f"{kwargs.get('metric_key_prefix', 'eval')}_loss": loss}, count)

    def final_loss(self) -> float:
        """Of the best weights, after training, on the whole of the validation text."""
        if self.eval_batches is None:
            return self.state.best_metric
        with self.compute_loss_context_manager():
            return mean_loss(self.model, self.get_eval_dataloader())[0]

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: it would take time in every step."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        dataset = train_dataset or self.train_dataset
        if isinstance(dataset, BlockDataset):  # an epoch is as many tokens as there are
            return RandomSampler(dataset, replacement=True, num_samples=max(1, len(dataset) // dataset.seq_len))
        return super()._get_train_sampler(dataset)

    # These two are called where a checkpoint is complete but for trainer_state.json, and before the first step after
    # a resume.
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.carried is not None:
            state = {"h": self.carried.h, "c": self.carried.c}
            tensors = {name: it.contiguous() for name, it in state.items() if it is not None}
            save_file(tensors, Path(output_dir, STATE_FILE))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and isinstance(self.model, RNNForCausalLM):
            self.carried = load_state(Path(checkpoint, STATE_FILE))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)  # those of a checkpoint may have been others
        best = self._best_folder()
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        if self.state.best_model_checkpoint is None:  # what is gone cannot be the best of the run
            self.state.best_metric = self.state.best_global_step = None
        return position

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Only a validation whose weights are saved can be the best."""
        return self.control.should_save and super()._determine_best_metric(*args, **kwargs)

    def _best_folder(self) -> Path:
        """Where it is now: the run's folder may have moved since."""
        return Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")

    def restore_best(self, checkpoint: str) -> None:
        """Takes over a checkpoint of the last step and its run's best weights, without training.

        Raises:
            ValueError: these are gone.
        """
        self.state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        self.state.max_steps = self.state.global_step
        if self.state.best_global_step is None:  # stopped before it was validated
            self._load_from_checkpoint(checkpoint)
            self.state.best_metric = self.evaluate()["eval_loss"]
            return
        best = self._best_folder()
        if not best.is_dir():
            raise ValueError(f"{best}: expected the checkpoint with the run's best weights, found none")
        self.state.best_model_checkpoint = str(best)
        self._load_best_model()


def load_state(path: Path) -> RNNCache:
    """The state saved with a checkpoint.

    Raises:
        ValueError: it is missing or damaged; going on without it would give other losses.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected the carried state of a recurrent model: {error}") from error
    if not {"h"} <= set(tensors) <= {"h", "c"} or not all(it.isfinite().all() for it in tensors.values()):
        raise ValueError(f"{path}: expected finite tensors h and, for an LSTM, c, got {', '.join(tensors)}")
    return RNNCache(tensors["h"], tensors.get("c"))


def _same(batch: Batch) -> Batch:
    return batch


class LogBeforeSave(TrainerCallback):
    """Begins a new mean of the training loss with every checkpoint, so that a resumed run logs the same ones."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after DefaultFlowCallback, which decides what is saved."""
        control.should_log |= control.should_save


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends training after the step under way, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.stopped = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listens to Ctrl-C; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self.stopped = True
            signal.signal(signal.SIGINT, previous)

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for the checkpoint and the end."""
        if self.stopped:
            control.should_save = control.should_training_stop = True
