"""A training run from a text file to a folder with a model, its vocabulary, checkpoints, logs and a loss curve."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from filelock import FileLock, Timeout
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from fastlm.integrations.transformers import NAME as ATTENTION
from fastlm.integrations.transformers import register
from fastlm.models import RNNConfig, RNNForCausalLM, TransformerConfig, TransformerForCausalLM
from fastlm.training.data import BlockDataset, Progress, Show, StreamDataset, Tokens, split_file, tokenize
from fastlm.training.options import FILE_NAME, TrainingOptions
from fastlm.training.plot import plot_losses
from fastlm.training.tokenizer import learn_tokenizer, make_normalizer
from fastlm.training.trainer import LanguageModelTrainer, LogBeforeSave, StopOnInterrupt

CURVE = "loss.png"
LOCK = ".lock"


@dataclasses.dataclass
class Result:
    """What a run came to."""

    output: Path
    step: int
    interrupted: bool  # by Ctrl-C; a checkpoint of that step is there
    # Of the validation text, in nats a token: the best one, whose weights are in the output folder. Of a run that was
    # interrupted, as it was measured on the way (--eval-batches).
    loss: float | None
    characters_per_token: float  # of the validation text


@dataclasses.dataclass
class Corpus:
    """A text's two parts and the vocabulary they are read with."""

    tokenizer: PreTrainedTokenizerFast
    train: Tokens
    valid: Tokens
    characters_per_token: float  # of valid


def train(
    options: TrainingOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    show: Show | None = None,
) -> Result:
    """Trains a language model on a text file; nothing is written before the file and all options are found good.

    Args:
        options (TrainingOptions): what to train, on what, how and for how long.
        resume (bool): go on with the run in options.output, from its last checkpoint or, where none was reached, from
            the beginning. `options` are then its own: see `TrainingOptions.load`. Default: False.
        overwrite (bool): replace a run in options.output. Default: False.
        callbacks (sequence of TrainerCallback): further ones, to show progress. Default: none.
        show (callable, optional): show(stage, done) is called before the first step: what is done with the text, and
            how much of it, 0 to 1, or None where nobody knows. Default: None.

    Raises:
        OSError, ValueError: the data, an option or the output folder is no good, or the loss never was a number; the
            message says which and why.
    """
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected one of them, got both")
    options = options.resolved()
    output = options.output.absolute()  # type: ignore[union-attr]
    if not resume:
        _check_free(output, overwrite)
    if overwrite and options.data is not None and options.data.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{options.data}: expected data outside of {output}, which would be replaced")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    quiet()

    corpus = load_corpus(options, output if resume else None, Progress(show))
    set_seed(options.seed)
    model = make_model(options, len(corpus.tokenizer))
    with _alone_in(output):
        _prepare_folder(output, options, corpus.tokenizer, overwrite and not resume)
        trainer, interrupt = make_trainer(options, output, model, corpus, callbacks)
        checkpoint = last_checkpoint(output) if resume else None
        if checkpoint is not None and _is_done(trainer, checkpoint):
            trainer.restore_best(checkpoint)
        else:
            with interrupt.installed():
                trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.state
        interrupted = state.global_step < state.max_steps
        loss = _finish(trainer, output, interrupted)
    return Result(output, state.global_step, interrupted, loss, corpus.characters_per_token)


def quiet() -> None:
    """Keeps transformers and datasets from writing to the terminal, which is for whoever calls."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_corpus(options: TrainingOptions, saved: Path | None = None, progress: Progress | None = None) -> Corpus:
    """Reads, splits and tokenizes the data, with the vocabulary of a folder or one learnt from the training part."""
    if options.data is None:
        raise ValueError("data: expected a text file, got none")
    progress = progress or Progress()
    normalizer = make_normalizer(options.normalization, options.lowercase)
    parts = split_file(options.data, normalizer, options.validation, progress)
    for name, part in zip(("training", "validation"), parts, strict=True):
        _check_length(options, name, part.characters, "characters")
    if saved is None:
        texts = progress.texts("learning the vocabulary", parts[0])
        if options.vocabulary == "bpe":
            texts = progress.then("merging byte pairs", texts)
        tokenizer = learn_tokenizer(texts, options.vocabulary, options.vocab_size, normalizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    tokens = [tokenize(part, tokenizer.backend_tokenizer, progress) for part in parts]
    for name, found in zip(("training", "validation"), tokens, strict=True):
        _check_length(options, name, len(found), "tokens")
    return Corpus(tokenizer, tokens[0], tokens[1], parts[1].characters / len(tokens[1]))


def _check_length(options: TrainingOptions, part: str, length: int, unit: str) -> None:
    needed = options.seq_len + 1  # type: ignore[operator]
    if length < needed:
        raise ValueError(
            f"{options.data}: expected at least {needed} {unit} of {part} text for one sequence of {options.seq_len} "
            f"and its last target, got {length}"
        )


def make_model(options: TrainingOptions, vocab_size: int) -> PreTrainedModel:
    """A model with new weights."""
    if options.model == "transformer":
        return TransformerForCausalLM(
            TransformerConfig(
                vocab_size=vocab_size,
                hidden_size=options.hidden_size,
                num_layers=options.layers,
                num_heads=options.heads,
                max_position_embeddings=options.seq_len,
                dropout=options.dropout,
            )
        )
    if options.model == "gpt2":
        register()
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=options.seq_len,
            n_embd=options.hidden_size,
            n_layer=options.layers,
            n_head=options.heads,
            activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
            resid_pdrop=options.dropout,
            embd_pdrop=options.dropout,
            attn_pdrop=options.dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = ATTENTION
        return GPT2LMHeadModel(config)
    return RNNForCausalLM(
        RNNConfig(
            vocab_size=vocab_size,
            embedding_size=options.embedding_size,
            hidden_size=options.hidden_size,
            num_layers=options.layers,
            cell=options.model,
            dropout=options.dropout,
            tie_word_embeddings=options.tie,
        )
    )


def make_trainer(
    options: TrainingOptions, output: Path, model: PreTrainedModel, corpus: Corpus, callbacks: Sequence[TrainerCallback]
) -> tuple[LanguageModelTrainer, StopOnInterrupt]:
    """The Trainer of a run, and what stops it."""
    seq_len, batch = options.seq_len, options.batch_size
    train_set: Any = StreamDataset(corpus.train, seq_len, batch)  # type: ignore[arg-type]
    batch = train_set.rows
    if options.is_transformer:
        train_set = BlockDataset(corpus.train, seq_len)  # type: ignore[arg-type]
    valid_set = StreamDataset(corpus.valid, seq_len, batch)  # type: ignore[arg-type]
    interrupt = StopOnInterrupt()
    board = TensorBoardCallback()
    board.logging_dir = str(output / "tensorboard")
    trainer = LanguageModelTrainer(
        model,
        _make_arguments(options, output, batch, valid_set.rows),
        label_smoothing=options.label_smoothing,
        eval_batches=options.eval_batches,
        train_dataset=train_set,
        eval_dataset=valid_set,
        processing_class=corpus.tokenizer,
        optimizer_cls_and_kwargs=_adam(options) if options.optimizer == "adam" else None,
        callbacks=[interrupt, LogBeforeSave(), board, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, interrupt


def _make_arguments(options: TrainingOptions, output: Path, batch_size: int, eval_rows: int) -> TrainingArguments:
    lowest = options.lr * options.min_lr  # type: ignore[operator]
    schedule, settings = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("polynomial", {"lr_end": lowest, "power": 1.0}),
        "cosine": ("cosine_with_min_lr", {"min_lr": lowest}),
    }["constant" if options.min_lr == 1 else options.schedule]
    length = {"num_train_epochs": options.epochs} if options.steps is None else {"max_steps": options.steps}
    return TrainingArguments(
        str(output),
        **length,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=eval_rows,
        gradient_accumulation_steps=options.accumulate,
        train_sampling_strategy="random" if options.is_transformer else "sequential",
        learning_rate=options.lr,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=settings,
        warmup_steps=options.warmup,
        optim="sgd" if options.optimizer == "sgd" else "adamw_torch_fused",
        optim_args=f"momentum={options.momentum}" if options.optimizer == "sgd" else None,
        adam_beta2=options.beta2,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        bf16=options.bf16,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,  # it would look at the loss of every step, and hide what happens
        seed=options.seed,
        use_cpu=True,
        use_cache=True,  # it goes into the model's configuration, for generate()
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",  # TensorBoard's callback is made with a folder of its own
    )


def _adam(options: TrainingOptions) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Plain Adam, for which the Trainer has no name."""
    return torch.optim.Adam, {"lr": options.lr, "betas": (0.9, options.beta2), "fused": True}


def _check_free(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and all(entry.name == LOCK for entry in output.iterdir())):
        return
    if not (output / FILE_NAME).is_file():
        raise ValueError(f"{output}: exists and is no training run; name another output folder")
    if not overwrite:
        raise ValueError(f"{output}: holds a training run already; go on with --resume or replace it with --overwrite")


@contextlib.contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other processes' runs out of it."""
    output.resolve().mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output / LOCK, timeout=0).acquire()
    except Timeout:
        raise ValueError(f"{output}: another process is training in it") from None
    with lock:
        yield


def _prepare_folder(output: Path, options: TrainingOptions, tokenizer: PreTrainedTokenizerFast, replace: bool) -> None:
    if replace:
        for entry in output.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
    options.save(output)  # first, for it may refuse
    tokenizer.save_pretrained(output)


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint of a run; incomplete ones, which a kill left behind, are removed.

    What else there is in the folder is not touched.
    """
    complete = []
    folders = [it for it in output.iterdir() if re.fullmatch(r"checkpoint-\d+", it.name) and it.is_dir()]
    for folder in folders:
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # what is written last
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            complete.append(folder)
    return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]))) if complete else None


def _is_done(trainer: LanguageModelTrainer, checkpoint: str) -> bool:
    """Whether a checkpoint is of the last step; the Trainer would do one more."""
    total = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step >= total


def _finish(trainer: LanguageModelTrainer, output: Path, interrupted: bool) -> float | None:
    """Writes the curve, and the best model where the run came to its end; returns that one's loss."""
    state = trainer.state
    plot_losses(state.log_history, output / CURVE)
    if interrupted:
        return state.best_metric
    if not math.isfinite(state.best_metric):
        raise ValueError(f"{output}: the validation loss was never a finite number; train with a lower lr")
    trainer.save_model(str(output))
    loss = trainer.final_loss()
    state.log_history.append({"final_loss": loss, "step": state.global_step})
    trainer.save_state()
    return loss
