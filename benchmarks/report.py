"""Makes tables and plots from CSVs of run.py, and checks the speed targets.

python benchmarks/report.py benchmarks/results/avx512_bf16.csv --summary README.md --plots benchmarks/results
python benchmarks/report.py --check
"""

import argparse
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import rows
import targets
from registry import ATTENTION_OPS, MODEL_OPS, MODES, OPS

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TITLES = {"forward": "forward", "training": "forward + backward (whole models: a training step)"}
FAMILIES = {"recurrent": OPS, "attention": ATTENTION_OPS, "language models": MODEL_OPS}
PLOTTED = ("recurrent", "attention")
# The lines of the summary, by op/workload in float32. Plain products have none.
SUMMARY = {
    "GRU layers and cells": r"gru/(b.*(\d|_2layer|_bi)|cell.*)",
    "LSTM layers and cells": r"lstm/(b.*(\d|_2layer|_bi)|cell.*)",
    "GRU and LSTM: several lengths, episodes": r"(gru|lstm)/.*_(varlen|resets)",
    "GRU and LSTM: gradients from the last of 400 steps": r"(gru|lstm)/.*_last",
    "GRU and LSTM: single steps, state carried (`Stream`)": r"(gru|lstm)/stream_b1.*",
    "attention, every key seen": r"attention/(.*_full|bias.*)",
    "attention, causal": r"attention/(?!drop).*_causal",
    "attention: windows, documents, padding, packed sequences": r"attention/(window|docs|keypad|varlen).*",
    "attention with dropout": r"attention/drop.*",
    "attention: decoding": r"attention/decode.*",
    "`nn.MultiheadAttention`": r"mha/.*",
    "dropout": r"dropout/.*",
    "output layer with its loss": r"cross_entropy/.*",
    "small language models and a classifier, whole": r"(gru|lstm)/(LM-.|CLS)",
    "greedy text (`stream_tokens`)": r"(gru|lstm)/stream_100_tokens",
    "transformers' `generate()`, GPT-2 small": r"gpt2/.*|(gru|lstm)/generate_.*",
}
Groups = Mapping[tuple[str, str, str], rows.Group]


def _ms(value: float) -> str:
    """Three digits, never in exponent form."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    """Bold where fastlm loses."""
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value < 0.995 else f"{value:.2f}"


def _share(own: rows.Row | None) -> str:
    """Of the arithmetic peak; for a row whose limit is memory, of a plain read."""
    if own is None or own.share is None:
        return "-"
    return f"{own.share:.2f}" if own.gbs is None else f"{own.gbs / own.read_gbs:.2f} of a read, {own.gbs:.0f} GB/s"


def _line(op: str, workload: str, group: rows.Group) -> str:
    torch_row, peer, own = group.get("torch"), rows.fastest_peer(group), rows.ours(group)
    cells = [
        f"{op} {workload}",
        _ms(torch_row.p50) if torch_row else "-",
        f"{_ms(peer.p50)} {peer.provider}" if peer else "-",
        _ms(own.p50) + (f" {own.provider}" if own.provider != "fastlm" else "") if own else "-",
        _share(own),
        _ratio(group["fastlm"].torch_ratio if "fastlm" in group else None),
        _ratio(peer.p50 / own.p50 if peer and own else None),
    ]
    return f"| {' | '.join(cells)} |"


def _table(title: str, groups: Groups) -> list[str]:
    head = "| workload | torch ms | fastest peer ms | fastlm ms | share of peak | times torch | times fastest peer |"
    lines = [_line(op, workload, group) for (op, workload, _), group in groups.items()]
    return [f"**{title}**", "", head, "|---" + "|--:" * 6 + "|", *lines, ""] if lines else []


def _range(values: Iterable[float | None]) -> str:
    known = [round(value) for value in values if value is not None]
    return "unknown" if not known else str(known[0]) if min(known) == max(known) else f"{min(known)} to {max(known)}"


def _conditions(groups: Groups) -> list[str]:
    """One paragraph, a sentence for every machine and setting that rows come from."""
    every = [row for group in groups.values() for row in group.values()]
    runs = defaultdict(list)
    for row in every:
        runs[row.cpu, row.threads, row.isa or "none", row.malloc_mmap_max or "unset"].append(row)
    sentences = []
    for (cpu, threads, isa, malloc), own in sorted(runs.items()):
        dates, commits = sorted({row.date[:10] for row in own}), sorted({row.git or "no git" for row in own})
        sentences.append(
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {cpu}, threads {threads}, float32 (_bf16: bfloat16),"
            f" instruction set {isa}, {_range(row.peak_gflops for row in own)} GFLOP/s peak,"
            f" {_range(row.tile_gflops for row in own)} of it in a tile in L1,"
            f" {_range(row.read_gbs for row in own)} GB/s read,"
            f" fastlm {', '.join(sorted({row.fastlm for row in own}))} ({', '.join(commits)}),"
            f" MALLOC_MMAP_MAX_ {malloc}."
        )
    versions = sorted({row.provider_version for row in every if not row.provider_version.startswith("fastlm")})
    return [f"{' '.join(sentences)} Peers: {', '.join(versions)}. Medians; bold: fastlm is slower.", ""]


def markdown(groups: Groups) -> str:
    """Tables of forward, training and plain products, losses included."""
    lines = _conditions(groups) if groups else []
    for family, ops in FAMILIES.items():
        for mode in MODES:
            shown = {key: group for key, group in groups.items() if key[0] in ops and key[2] == mode}
            lines += _table(f"{family.capitalize()}: {TITLES[mode]}", shown)
    lines += _table("Matrix products", {key: g for key, g in groups.items() if key[0] == "gemm"})
    return "\n".join(lines)


def _spread(ratios: Sequence[float]) -> str:
    """The median, and the least and the greatest."""
    if len(set(ratios)) < 2:
        return _ratio(ratios[0] if ratios else None)
    return f"{_ratio(median(ratios))} ({_ratio(min(ratios))} to {_ratio(max(ratios))})"


def in_summary(pattern: str, op: str, workload: str) -> bool:
    """True where a line of the summary has this workload."""
    return not workload.endswith("_bf16") and re.fullmatch(pattern, f"{op}/{workload}") is not None


def summary(groups: Groups) -> str:
    """One line for every kind of workload: how many times as fast, from the least to the greatest."""
    heads = [head for mode in MODES for head in (f"{mode}: times torch", "times the fastest peer")]
    lines = [f"| | workloads | {' | '.join(heads)} |", "|---" + "|--:" * 5 + "|"]
    for kind, pattern in SUMMARY.items():
        found = {key: group for key, group in groups.items() if in_summary(pattern, *key[:2])}
        cells = [kind, str(len({(op, workload) for op, workload, _ in found}))]
        for mode in MODES:
            of_mode = [group for (_, _, its_mode), group in found.items() if its_mode == mode]
            pairs = [(group.get("torch"), rows.fastest_peer(group), rows.ours(group)) for group in of_mode]
            cells.append(_spread([torch_row.p50 / own.p50 for torch_row, _, own in pairs if torch_row and own]))
            cells.append(_spread([peer.p50 / own.p50 for _, peer, own in pairs if peer and own]))
        if found:
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rewrite(page: Path, text: str) -> None:
    """Puts text between the two markers of a file."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: no {BEGIN} ... {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def plot(groups: Groups, family: str, path: Path) -> None:
    """Share of the peak for torch, the fastest peer and fastlm, one panel per op and mode of a family."""
    from matplotlib.figure import Figure

    ops = FAMILIES[family]
    figure = Figure(figsize=(14, 9), layout="constrained")
    panels = figure.subplots(len(MODES), len(ops), sharey=True)
    bars = {
        "torch": (lambda group: group.get("torch"), "#b0b0b0"),
        "fastest peer": (rows.fastest_peer, "#6baed6"),
        "fastlm": (rows.ours, "#d94801"),
    }
    for panel, (mode, op) in zip(panels.flat, itertools.product(MODES, ops), strict=True):
        shown = {key[1]: group for key, group in groups.items() if key[0] == op and key[2] == mode}
        for offset, (label, (choose, color)) in zip((-0.27, 0.0, 0.27), bars.items(), strict=True):
            chosen = [choose(group) for group in shown.values()]
            shares = [row.share or 0 if row else 0 for row in chosen]
            panel.bar([i + offset for i in range(len(shares))], shares, 0.27, label=label, color=color)
        panel.set_xticks(range(len(shown)), list(shown), rotation=45, ha="right", fontsize=8)
        panel.set_title(f"{op.upper()}: {TITLES[mode]}", fontsize=10)
        panel.set_ylim(0, 1)
        panel.grid(axis="y", alpha=0.3)
    panels[0, 0].legend()
    figure.supylabel("share of the fused multiply-add peak")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the status is 1 where --check found a missed target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [Path(__file__).parent / "results" / "benchmarks.csv"]
    parser.add_argument("csv", nargs="*", type=Path, default=default, help="default: results/benchmarks.csv")
    parser.add_argument("--summary", type=Path, help="file whose table of all kinds of workloads is replaced")
    parser.add_argument("--tables", type=Path, help="file whose tables of all workloads are replaced")
    parser.add_argument("--plots", type=Path, help="folder to write PNGs to, one per family of layers")
    parser.add_argument("--check", action="store_true", help="print for every speed target whether it was reached")
    arguments = parser.parse_args(argv)
    groups = rows.latest(row for path in arguments.csv for row in rows.read(path))
    for page, make in ((arguments.summary, summary), (arguments.tables, markdown)):
        if page:
            rewrite(page, make(groups))
    for family in PLOTTED if arguments.plots else ():
        plot(groups, family, arguments.plots / f"{family}.png")
    if arguments.check:
        found = list(targets.verdicts(groups))
        print(*(verdict.text for verdict in found), sep="\n")
        counts = [sum(verdict.reached is state for verdict in found) for state in (True, False, None)]
        print("{} reached, {} missed, {} not measured".format(*counts))
        return 1 if counts[1] else 0
    if not (arguments.summary or arguments.tables or arguments.plots):
        print(markdown(groups))
    return 0


if __name__ == "__main__":
    sys.exit(main())
