"""What a training run is told: every option with its default, its limits and its help text, once."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

FILE_NAME = "training_options.json"

Model = Literal["gru", "lstm", "transformer", "gpt2"]
Vocabulary = Literal["char", "word", "bpe"]
Normalization = Literal["nfc", "nfkc", "none"]
Optimizer = Literal["adamw", "adam", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]

# What None stands for. The transformers' is nanoGPT's recipe for a CPU but for its learning rate, 1e-3, which ends at a
# validation loss of 1.90 on tinyshakespeare where this one ends at 1.77.
_RECURRENT = {
    "hidden_size": 512, "layers": 1, "seq_len": 128, "batch_size": 32, "steps": 1000, "lr": 3e-3, "dropout": 0.1,
    "weight_decay": 0.01,
}  # fmt: skip
_TRANSFORMER = {
    "hidden_size": 128, "layers": 4, "seq_len": 64, "batch_size": 12, "steps": 2000, "lr": 3e-3, "dropout": 0.0,
    "weight_decay": 0.1,
}  # fmt: skip
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "gru": _RECURRENT,
    "lstm": _RECURRENT,
    "transformer": _TRANSFORMER,
    "gpt2": _TRANSFORMER,
}

# What may differ from the run that is resumed: how long, how often, and where things are.
CHANGEABLE = {"data", "output", "steps", "epochs", "eval_every", "save_every", "log_every", "threads"}
_DIGEST = "data_sha256"


def _digest(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def _check_name(option: str, path: Path | None) -> None:
    """Files of a run name the data, and a JSON string holds no other bytes than UTF-8's."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{option}: expected a name in UTF-8, got {str(path)!a}") from None


def _option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "min": low, "max": high})


@dataclasses.dataclass
class TrainingOptions:
    """Options of `fastlm.training.train`. None in an option of the model: its value in MODEL_DEFAULTS. Paths may be
    strings.
    """

    data: Path = _option(None, "UTF-8 text file.")
    output: Path | None = _option(None, "Folder to make. Default: named after the data and the model.")

    model: Model = _option("gru", "transformer: nanoGPT's recipe for a CPU; gpt2: the same with transformers' GPT-2.")
    embedding_size: int = _option(128, "Width of a token's embedding in gru and lstm.", 1)
    hidden_size: int | None = _option(None, "Width of the layers.", 1)
    layers: int | None = _option(None, "Number of layers.", 1)
    heads: int = _option(4, "Attention heads of a transformer; they divide --hidden-size.", 1)
    dropout: float | None = _option(None, "Share of activations dropped in training.", 0, 1)
    tie: bool = _option(False, "gru and lstm: the output layer shares the embedding's weights (a transformer's does).")

    vocabulary: Vocabulary = _option("char", "What a token is: a character, a word, or a byte pair (bpe).")
    vocab_size: int = _option(10_000, "Most entries of a vocabulary of words or byte pairs.", 2)
    normalization: Normalization = _option("nfc", "Unicode normal form of the text.")
    lowercase: bool = _option(False, "Turn the text to lower case.")
    validation: float = _option(0.1, "Share of the text, at its end, kept for validation.", 0.0001, 0.9)

    seq_len: int | None = _option(None, "Tokens a sequence: truncation of back-propagation, or the context.", 1)
    batch_size: int | None = _option(None, "Sequences a step.", 1)
    accumulate: int = _option(1, "Batches whose gradients make one step.", 1)
    steps: int | None = _option(None, "Training steps.", 1)
    epochs: float | None = _option(None, "Passes over the training text, instead of --steps.", 0.0001)
    lr: float | None = _option(None, "Highest learning rate.", 0)
    optimizer: Optimizer = _option("adamw", "adamw and adam are torch's fused ones.")
    momentum: float = _option(0.9, "Momentum of sgd.", 0, 0.9999)
    beta2: float = _option(0.99, "Second decay rate of adamw and adam.", 0, 0.99999)
    weight_decay: float | None = _option(None, "Weight decay, of all weights but biases and norms.", 0)
    schedule: Schedule = _option("cosine", "Learning rate after the warm-up; linear and cosine end at --min-lr.")
    warmup: float = _option(0.05, "Steps in which the learning rate rises; below 1, their share of all.", 0)
    min_lr: float = _option(0.1, "Last learning rate, as a share of --lr.", 0, 1)
    clip: float = _option(1.0, "Largest norm of the gradient; 0: no limit.", 0)
    label_smoothing: float = _option(0.0, "Share of the target spread over the vocabulary.", 0, 1)
    bf16: bool = _option(False, "Matrix products in bfloat16 (autocast).")

    eval_every: int = _option(250, "Steps between validations.", 1)
    eval_batches: int | None = _option(
        None, "Batches that a validation reads. Default: all; the final figure is of all in any case.", 1
    )
    save_every: int | None = _option(
        None, "Steps between checkpoints: --eval-every or a multiple, the default being it.", 1
    )
    log_every: int = _option(10, "Steps between entries in the log.", 1)
    seed: int = _option(1337, "Of the weights, the batches and dropout.", 0)
    threads: int | None = _option(None, "CPU threads. Default: torch's choice.", 1, 1024)

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, str | Path):
                raise TypeError(f"{name}: expected a path, got {type(path).__name__}")
            setattr(self, name, None if path is None else Path(path))
        for option in dataclasses.fields(self):
            value, low, high = getattr(self, option.name), option.metadata["min"], option.metadata["max"]
            if value is not None and ((low is not None and not value >= low) or (high is not None and value > high)):
                expected = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{option.name}: expected {expected}, got {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option.name}: expected a finite number, got {value}")
            choices = get_args(get_type_hints(type(self))[option.name])
            if choices and isinstance(choices[0], str) and value not in choices:
                raise ValueError(f"{option.name}: expected one of {', '.join(choices)}, got {value}")
        if self.lr == 0:
            raise ValueError("lr: expected a number above 0, got 0")
        for name in ("data", "output"):
            _check_name(name, getattr(self, name))
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps, epochs: expected one of them, got both")
        if self.save_every is not None and self.save_every % self.eval_every:
            raise ValueError(
                f"save_every: expected a multiple of eval_every ({self.eval_every}), so that the best checkpoint "
                f"is among those kept, got {self.save_every}"
            )

    @property
    def is_transformer(self) -> bool:
        """Whether the model reads blocks of text, each by itself; the others read streams."""
        return self.model in ("transformer", "gpt2")

    def resolved(self) -> "TrainingOptions":
        """A copy in which no default is left open."""
        filled = dict(MODEL_DEFAULTS[self.model], save_every=self.eval_every)
        if self.epochs is not None:
            del filled["steps"]
        if self.data is not None:
            filled["output"] = Path(f"{self.data.stem}-{self.model}")
        done = dataclasses.replace(self, **{name: it for name, it in filled.items() if getattr(self, name) is None})
        if done.is_transformer and done.seq_len < 2:  # type: ignore[operator]
            raise ValueError(f"seq_len: expected at least 2 for {done.model}, got {done.seq_len}")
        if done.is_transformer and done.hidden_size % done.heads:  # type: ignore[operator]
            raise ValueError(f"heads: expected a divisor of hidden_size ({done.hidden_size}), got {done.heads}")
        return done

    def save(self, folder: Path) -> None:
        """Writes them to a folder, as JSON, with a digest of the text.

        Raises:
            ValueError: the folder has those of a run that began with another text.
        """
        digest, path = _digest(self.data), folder / FILE_NAME
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).get(_DIGEST, digest) != digest:
            raise ValueError(f"{self.data}: expected the text that the run in {folder} began with, got another one")
        values = {**dataclasses.asdict(self), "data": str(self.data.absolute()), "output": str(folder)}
        values[_DIGEST] = digest
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> "TrainingOptions":
        """Reads what `save` wrote to a folder, which becomes `output`.

        Raises:
            ValueError: it holds no run, or a damaged file.
        """
        folder = Path(folder)
        path = folder / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop(_DIGEST, None)
            return cls(**{**values, "data": Path(values["data"]), "output": folder})
        except FileNotFoundError:
            raise ValueError(f"{folder}: expected the folder of a training run, found no {FILE_NAME}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected what a training run wrote: {error}") from error

    def changed(self, **values: Any) -> "TrainingOptions":
        """The options of a run that goes on, with these in place of its own.

        Raises:
            ValueError: one of them cannot change.
        """
        for name, value in values.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                raise ValueError(f"{name}: cannot change when a run goes on, was {getattr(self, name)}, got {value}")
        if "steps" in values or "epochs" in values:
            values = {"steps": None, "epochs": None, **values}
        if "eval_every" in values:
            values = {"save_every": None, **values}
        return dataclasses.replace(self, **values)
