"""The curve of a run's losses."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Draws training and validation loss over the steps of a Trainer's log_history, into a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would look for a display
    axes = figure.add_subplot(xlabel="step", ylabel="cross-entropy (nats a token)")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        entries = [entry for entry in history if key in entry]
        axes.plot([entry["step"] for entry in entries], [entry[key] for entry in entries], style, label=label, ms=4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
