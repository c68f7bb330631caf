"""What a training run left: loaded, evaluated on a text, generated from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.generation import BaseStreamer

from fastlm.integrations.transformers import NAME as ATTENTION
from fastlm.integrations.transformers import register
from fastlm.models._causal import CausalLM
from fastlm.training.data import Progress, Show, Split, StreamDataset, split_file, tokenize
from fastlm.training.metrics import bits_per_character, perplexity
from fastlm.training.options import FILE_NAME, TrainingOptions
from fastlm.training.run import quiet
from fastlm.training.trainer import mean_loss


class Checkpoint(NamedTuple):
    """A model, its vocabulary, and the options of the run that made them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    options: TrainingOptions

    @classmethod
    def load(cls, folder: Path | str) -> "Checkpoint":
        """Reads a run's folder, or one of the checkpoints in it.

        Raises:
            ValueError: the folder holds no trained model, or a damaged one.
        """
        quiet()
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            unfinished = "; the run in it is not finished: go on with fastlm train lm --resume"
            raise ValueError(
                f"{folder}: expected the folder of a trained model, found no config.json"
                f"{unfinished if (folder / FILE_NAME).is_file() else ''}"
            )
        options = TrainingOptions.load(folder if (folder / FILE_NAME).is_file() else folder.absolute().parent)
        register()
        attention = ATTENTION if options.model == "gpt2" else None
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers, tokenizers and safetensors have one of their own each
            raise ValueError(f"{folder}: cannot read the model or its vocabulary: {error}") from error
        return cls(model.eval(), tokenizer, options)


class Evaluation(NamedTuple):
    """How well a model predicts a text."""

    loss: float  # nats a token
    tokens: int  # predicted: all but the first
    characters: int  # of their text, about
    unknown: float  # share of tokens that stand for what the vocabulary lacks

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return perplexity(self.loss)

    @property
    def bits_per_character(self) -> float:
        """Of the text."""
        return bits_per_character(self.loss, self.characters / self.tokens)


def evaluate(checkpoint: Checkpoint, data: Path | str, whole: bool = False, *, show: Show | None = None) -> Evaluation:
    """Evaluates a model on the validation part of a text, as split in training, or on all of it.

    A recurrent model carries its state along; a transformer reads blocks of its context's length. show() hears on the
    way what is being done and how much of it is.
    """
    model, tokenizer, options = checkpoint
    data, progress = Path(data), Progress(show)
    train, valid = split_file(data, tokenizer.backend_tokenizer.normalizer, options.validation, progress)
    part = Split(data, train.normalizer, 0, valid.last) if whole else valid
    tokens = tokenize(part, tokenizer.backend_tokenizer, progress)
    seq_len: int = options.resolved().seq_len  # type: ignore[assignment]
    if len(tokens) < seq_len + 1:
        raise ValueError(f"{data}: expected at least {seq_len + 1} tokens to evaluate on, got {len(tokens)}")
    # As many streams as in training: how far back a token's context begins depends on it.
    stream = StreamDataset(tokens, seq_len, options.resolved().batch_size)  # type: ignore[arg-type]
    batches = DataLoader(stream, stream.rows, collate_fn=lambda batch: batch)
    loss, count = mean_loss(model, progress.over("evaluating", batches, len(batches)))
    unknown = tokens.count(tokenizer.unk_token_id) / len(tokens)
    return Evaluation(loss, count, round(part.characters * count / len(tokens)), unknown)


def generate(
    checkpoint: Checkpoint,
    prompt: str,
    max_new_tokens: int,
    emit: Callable[[str], Any],
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> None:
    """Goes on with a text; emit() gets every piece of the new text as soon as it is known.

    Args:
        checkpoint (Checkpoint): the model and its vocabulary.
        prompt (str): text to go on with; "" stands for the beginning of a line.
        max_new_tokens (int): length of the new text.
        emit (callable): is called with each piece.
        do_sample (bool): draw tokens; False takes the likeliest each time. Default: True.
        temperature (float): divides the scores. Default: 1.
        top_k (int): draw among so many likeliest tokens; 0: among all. Default: 0.
        top_p (float): draw among the fewest likeliest tokens that have this probability together. Default: 1.
        seed (int, optional): makes the draws repeatable. Default: None.
    """
    model, tokenizer, _ = checkpoint
    if seed is not None:
        set_seed(seed)
    decoder = DecodeStream(skip_special_tokens=False)
    held: list[int] = []

    def put(token: int) -> None:
        text = decoder.step(tokenizer.backend_tokenizer, token)
        if text:
            emit(text)
            held.clear()
        else:  # bytes that are no whole character yet
            held.append(token)

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt: expected UTF-8 text, got other bytes") from None
    tokens = tokenizer(prompt or "\n")["input_ids"]
    if not tokens:
        raise ValueError(f"prompt: expected text that the vocabulary knows, got {prompt!r}")
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if do_sample else {}
    unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]  # there is nothing to write for it
    if isinstance(model, CausalLM):
        for token in model.stream_tokens(tokens, max_new_tokens, do_sample, suppress_tokens=unknown, **sampling):
            put(token)
    else:
        sampling = {"do_sample": do_sample, "suppress_tokens": unknown or None, **sampling}
        _generate_in_context(model, tokens, max_new_tokens, put, **sampling)
    rest = tokenizer.decode(held)
    if rest:
        emit(rest)


def _generate_in_context(
    model: Any, tokens: list[int], max_new_tokens: int, put: Callable[[int], None], **sampling: Any
) -> None:
    """Generates beyond a model's context: where it is full, the newer half of it is read again."""
    context = model.config.max_position_embeddings
    done = 0
    while done < max_new_tokens:
        if len(tokens) >= context:
            tokens = tokens[-max(1, context // 2) :]
        count = min(max_new_tokens - done, context - len(tokens))
        output = model.generate(
            torch.tensor([tokens]), max_new_tokens=count, streamer=_Streamer(put), use_cache=True, **sampling
        )
        tokens = output[0].tolist()
        done += count


class _Streamer(BaseStreamer):
    """Hands generate()'s new tokens on; the first call is the prompt."""

    def __init__(self, put: Callable[[int], None]) -> None:
        self._put, self._prompt = put, True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self._put(int(value))
        self._prompt = False

    def end(self) -> None:
        pass
