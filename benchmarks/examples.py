"""Trains the example language models with the command line, as a user would, and writes what they reach.

    python benchmarks/examples.py --data tinyshakespeare.txt

Needs `pip install "fastlm[lm]"`. Seconds are those of the whole command, imports and validations included. Results go
to results/examples.csv, the curves of the character models to results/examples.png.
"""

import argparse
import csv
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import machine
import torch

import fastlm

WORDS = "--vocabulary word --embedding-size 128 --hidden-size 256 --seq-len 64 --batch-size 32 --steps 400"
# name: options of `fastlm train lm`; the character models named so take about the same time.
SYSTEMS = {
    "gru_words": f"--model gru {WORDS}",
    "lstm_words": f"--model lstm {WORDS}",
    "transformer_characters": "--model transformer --eval-every 500",
    "gru_characters": "--model gru --steps 400 --eval-every 100",
    "default": "",
}
SEEDS = {"transformer_characters": 3}  # else 1
HERE = Path(__file__).parent


@dataclass
class Run:
    """One training run."""

    date: str
    system: str
    options: str
    seed: int
    steps: int
    seconds: float  # of the whole command
    loss: float  # of the whole validation text, nats a token
    bits_per_character: float
    cpu: str
    threads: int
    torch: str
    fastlm: str


def run(system: str, seed: int, data: Path) -> tuple[Run, list[tuple[float, float]]]:
    """Trains one, and returns it with its curve: (seconds, validation loss), steps taken to be of equal length."""
    options = SYSTEMS[system]
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "fastlm", "train", "lm", "--data", str(data), "--output", f"{folder}/run", "--seed", str(seed)]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command, *options.split()], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{system}: status {done.returncode}: {done.stderr}")
        history = json.loads(Path(folder, "run", "trainer_state.json").read_text())["log_history"]
    losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    steps = losses[-1][0]
    reached = re.search(r"validation loss ([\d.]+) .* ([\d.]+) bits per character", done.stdout)
    assert reached is not None
    result = Run(
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), system, options, seed, steps,
        round(seconds, 1), float(reached[1]), float(reached[2]), machine.cpu_name(), torch.get_num_threads(),
        torch.__version__, fastlm.__version__,
    )  # fmt: skip
    print(f"{system}, seed {seed}: {seconds:.0f} s, {done.stdout.rstrip().partition(': ')[2]}", flush=True)
    return result, [(step / steps * seconds, loss) for step, loss in losses]


def plot(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Validation loss over time, of the character models' first seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of the whole command", ylabel="validation loss (nats a character)")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), "o-", label=name.replace("_", ", "))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the CSV and the PNG")
    arguments = parser.parse_args(argv)
    runs, curves = [], {}
    for system in arguments.systems:
        for seed in range(SEEDS.get(system, 1)):
            result, curve = run(system, 1337 + seed, arguments.data)
            runs.append(result)
            if system.endswith("characters"):
                curves.setdefault(system, curve)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "examples.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in runs)
    if curves:
        plot(curves, arguments.output / "examples.png")


if __name__ == "__main__":
    main()
