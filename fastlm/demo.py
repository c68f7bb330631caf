"""The main job: one character-level GRU language model trained twice on real text, with torch.nn.GRU and with fastlm.

Both copies start from the same weights and see the same batches, in alternating blocks of steps, so that both meet the
same machine. Shown: whether the losses agree, the time of a step and of its recurrent layer, validation, a sample.

    python -m fastlm.demo
"""

import argparse
import contextlib
import copy
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics as reference_topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastlm

REFERENCE = "the Python language reference"
BLOCK = 10  # steps of one model before the other takes its turn
COMPARED_STEPS = 100
LOSS_LIMIT = 0.01  # largest relative difference of the losses over the compared steps
HELD_OUT = 0.1  # share of the text, at its end, kept for validation
HELD_OUT_LIMIT = 100_000  # characters
PROMPT_CHARS = 64


def reference_text() -> str:
    """The Python language reference, as every CPython carries it for help().

    Several topics are printed a second time inside a longer one. They are left out: the held-out text must not have
    been seen in training.
    """
    ordered = [reference_topics[name].strip() for name in sorted(reference_topics)]

    def repeated(topic: str) -> bool:
        body = topic.partition("\n\n")[2]
        return any(body in other for other in ordered if other is not topic)

    return "\n\n".join(topic for topic in ordered if not repeated(topic))


class Corpus(NamedTuple):
    """A text as character indices: `alphabet[index]` is the character."""

    alphabet: str
    train: Tensor
    valid: Tensor

    @classmethod
    def of(cls, text: str, seq_len: int) -> "Corpus":
        """Splits a text; both parts must hold at least one sequence and the character after it."""
        needed = math.ceil((seq_len + 2) / HELD_OUT)
        if len(text) < needed:
            raise ValueError(f"expected at least {needed} characters for --seq-len {seq_len}, got {len(text)}")
        points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
        codes, tokens = torch.unique(points, return_inverse=True)
        if len(codes) < 2:
            raise ValueError("expected at least 2 different characters, got 1")
        split = len(text) - min(int(len(text) * HELD_OUT), max(HELD_OUT_LIMIT, seq_len + 1))
        return cls("".join(map(chr, codes.tolist())), tokens[:split], tokens[split:])

    def decode(self, tokens: Tensor) -> str:
        """The text of a 1-D tensor of indices."""
        return "".join(self.alphabet[index] for index in tokens.tolist())


class CharModel(nn.Module):
    """Embedding, GRU, linear layer to the alphabet: tokens (T, B) -> logits (T, B, alphabet)."""

    def __init__(self, alphabet: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, embedding)
        self.rnn = nn.GRU(embedding, hidden, layers)
        self.head = nn.Linear(hidden, alphabet)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the logits of each next character and the state to go on from."""
        output, state = self.rnn(self.embedding(tokens), state)
        return self.head(output), state


class LayerTimer:
    """Seconds a layer took in its last call and in its last backward, by hooks around it.

    Forward is the time between the hooks before and after the call. Backward begins when the gradient of the layer's
    output is complete and ends when that of its input is. The CPU engine works in the calling thread, one node after
    another in reverse order of creation, so the whole backward of the layer, its weights' gradients included, lies
    between the two and nothing else does: the head ran before, the embedding runs after.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.forward = self.backward = 0.0
        self._start = 0.0
        layer.register_forward_pre_hook(lambda *_: self._begin())
        layer.register_forward_hook(lambda *_: self._end("forward"))
        layer.register_full_backward_pre_hook(lambda *_: self._begin())
        layer.register_full_backward_hook(lambda *_: self._end("backward"))

    def _begin(self) -> None:
        self._start = time.perf_counter()

    def _end(self, phase: str) -> None:
        setattr(self, phase, time.perf_counter() - self._start)


class Times(NamedTuple):
    """Seconds of one training step, or their medians."""

    step: float
    forward: float  # of the recurrent layer alone, as is backward
    backward: float


class Trainee:
    """One of the two models, with its optimizer and the loss and times of every step."""

    def __init__(self, name: str, model: CharModel, lr: float) -> None:
        self.name, self.model = name, model
        self.losses: list[float] = []
        self._times: list[Times] = []
        self._optimizer = torch.optim.Adam(model.parameters(), lr)
        self._timer = LayerTimer(model.rnn)

    def step(self, batch: Tensor) -> None:
        """One training step on character windows (T + 1, B)."""
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = next_char_loss(self.model, batch)
        loss.backward()
        self._optimizer.step()
        self.losses.append(loss.item())
        self._times.append(Times(time.perf_counter() - start, self._timer.forward, self._timer.backward))

    def medians(self) -> Times:
        """Medians over all steps, so that a few disturbed ones do not count."""
        return Times(*(statistics.median(column) for column in zip(*self._times, strict=True)))


def next_char_loss(model: CharModel, windows: Tensor) -> Tensor:
    """Mean cross entropy (nats) of every next character in windows (T + 1, B)."""
    logits, _ = model(windows[:-1])
    return cross_entropy(logits.flatten(0, 1), windows[1:].flatten())


def batches(train: Tensor, seq_len: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Windows (seq_len + 1, batch) at random places of the text; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seq_len + 1).unsqueeze(1)
    for _ in range(steps):
        yield train[torch.randint(len(train) - seq_len, (batch,), generator=generator) + offsets]


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr: rich's where it is installed, else one plain line. Yields update(done, text)."""
    if importlib.util.find_spec("rich") is None:
        yield lambda done, text: print(f"\r{done:>{len(str(total))}}/{total} {text}", end="", file=sys.stderr)
        print(file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=total, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def train(trainees: list[Trainee], windows: Iterator[Tensor], steps: int) -> None:
    """Trains all on the same windows, in alternating blocks."""
    done = 0
    with progress(steps * len(trainees)) as update:
        for first in range(0, steps, BLOCK):
            block = [next(windows) for _ in range(min(BLOCK, steps - first))]
            for trainee in trainees:
                for window in block:
                    trainee.step(window)
                    done += 1
                    update(done, f"{trainee.name}: loss {trainee.losses[-1]:.3f}")


@torch.no_grad()
def bits_per_char(model: CharModel, text: Tensor, seq_len: int, batch: int) -> float:
    """Mean over the whole text, read in windows that each start from a zero state, as in training."""
    windows = text.unfold(0, seq_len + 1, seq_len)
    total = sum(next_char_loss(model, part.T).item() * len(part) for part in windows.split(batch))
    return total / len(windows) / math.log(2)


@torch.no_grad()
def generate(model: CharModel, prompt: Tensor, length: int, temperature: float, seed: int) -> Tensor:
    """Samples `length` characters after a prompt (T,), one by one, the state carried from step to step."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.unsqueeze(1)
    state = None
    sample = []
    for _ in range(length):
        logits, state = model(tokens, state)
        tokens = torch.multinomial((logits[-1] / temperature).softmax(-1), 1, generator=generator)
        sample.append(tokens)
    return torch.cat(sample).flatten()


def largest_difference(ours: Trainee, theirs: Trainee) -> float:
    """Largest relative difference of the losses over the compared steps; NaN if a loss is."""
    a, b = (torch.tensor(trainee.losses[:COMPARED_STEPS], dtype=torch.float64) for trainee in (ours, theirs))
    return ((a - b).abs() / b).max().item()


def print_summary(ours: Trainee, theirs: Trainee, bits: dict[str, float], chars_per_step: int) -> None:
    """A table of both models and their ratios: the speed-up, above 1 where fastlm is faster."""
    a, b = ours.medians(), theirs.medians()
    print(f"{'median per training step':<34}{theirs.name:>14}{ours.name:>14}{'speed-up':>10}")
    for label, mine, other in (
        ("recurrent layer, forward", a.forward, b.forward),
        ("recurrent layer, backward", a.backward, b.backward),
        ("recurrent layer", a.forward + a.backward, b.forward + b.backward),
        ("whole step", a.step, b.step),
    ):
        print(f"{label:<34}{other * 1e3:>11.1f} ms{mine * 1e3:>11.1f} ms{other / mine:>9.2f}x")
    print(f"{'tokens/s of the whole step':<34}{chars_per_step / b.step:>14,.0f}{chars_per_step / a.step:>14,.0f}")
    print(f"{'validation bits per character':<34}{bits[theirs.name]:>14.4f}{bits[ours.name]:>14.4f}")


def positive(kind: Callable[[str], float], below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number of this kind above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"expected a number above 0{limit}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def seed(text: str) -> int:
    """An argparse type: what torch takes for a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**63 - 1}, got {text}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command line; no option is needed."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlm.demo",
        description="Trains one character-level GRU language model with torch.nn.GRU and with fastlm, and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole, real = positive(int), positive(float)
    parser.add_argument("--data", type=Path, metavar="FILE", help="UTF-8 text; None: the Python language reference")
    parser.add_argument("--steps", type=whole, default=200, help="training steps of each model")
    parser.add_argument("--batch", type=whole, default=32, help="sequences a step")
    parser.add_argument("--seq-len", type=whole, default=128, help="characters a sequence")
    parser.add_argument("--embedding", type=whole, default=64, help="size of the character embedding")
    parser.add_argument("--hidden", type=whole, default=512, help="hidden units of the GRU")
    parser.add_argument("--layers", type=whole, default=1, help="layers of the GRU")
    parser.add_argument("--lr", type=real, default=3e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=seed, default=0, help="of the weights, the batches and the sample")
    parser.add_argument("--sample", type=whole, default=400, metavar="N", help="characters to generate at the end")
    parser.add_argument("--temperature", type=real, default=0.7, help="of the sample; lower is more cautious")
    parser.add_argument("--threads", type=positive(int, 1025), help="CPU threads; None: torch's own choice")
    return parser


def load(path: Path | None, seq_len: int) -> Corpus:
    """The corpus of a file, or of the language reference; ValueError or OSError say what is wrong with a file."""
    try:
        return Corpus.of(reference_text() if path is None else path.read_text(encoding="utf-8"), seq_len)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}") from error


def print_setting(args: argparse.Namespace, corpus: Corpus) -> None:
    """What runs where, and on what."""
    info = fastlm.info()
    kernels = info["backends"]["cpu"]
    isa = info["cpu_isa"] or "none"
    print(f"fastlm {info['version']}, torch {info['torch_running']}, {torch.get_num_threads()} threads, kernels: {isa}")
    if not kernels["available"]:
        print(f"No speed-up to expect, fastlm runs its plain PyTorch reference: {kernels['reason']}")
    print(f"Data: {args.data or REFERENCE}, {len(corpus.train):,} characters and {len(corpus.valid):,} held out")
    print(f"Model: embedding {args.embedding}, {args.layers} x GRU {args.hidden}, {len(corpus.alphabet)} characters")
    print(f"Training: {args.steps} steps of {args.batch} x {args.seq_len} characters, each model", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; 1 if the losses of the two models disagree, else 0."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        corpus = load(args.data, args.seq_len)
    except (OSError, ValueError) as error:
        parser.error(f"{args.data or REFERENCE}: {error}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print_setting(args, corpus)

    torch.manual_seed(args.seed)
    model = CharModel(len(corpus.alphabet), args.embedding, args.hidden, args.layers)
    ours = Trainee("fastlm", fastlm.replace(copy.deepcopy(model)), args.lr)
    theirs = Trainee("torch.nn.GRU", model, args.lr)
    train([theirs, ours], batches(corpus.train, args.seq_len, args.batch, args.steps, args.seed), args.steps)

    if not theirs.losses[-1] < 10 * theirs.losses[0]:  # nor is NaN
        print(f"error: training diverged, to a loss of {theirs.losses[-1]:.3g}; choose a lower --lr", file=sys.stderr)
        return 1
    bits = {it.name: bits_per_char(it.model, corpus.valid, args.seq_len, args.batch) for it in (theirs, ours)}
    prompt = corpus.valid[:PROMPT_CHARS]
    sample = generate(ours.model, prompt, args.sample, args.temperature, args.seed)
    print(f"\nHeld-out text:\n{corpus.decode(prompt)}\n\nas the fastlm model goes on:\n{corpus.decode(sample)}\n")
    print_summary(ours, theirs, bits, args.batch * args.seq_len)

    difference = largest_difference(ours, theirs)
    compared = min(args.steps, COMPARED_STEPS)
    print(f"losses over the first {compared} steps: largest relative difference {difference:.1e}")
    if difference <= LOSS_LIMIT:
        return 0
    print(f"error: the losses disagree by more than {LOSS_LIMIT:.0%}", file=sys.stderr)  # also where one is NaN
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
