"""Times every workload of registry.py with every provider, after checking each against float64.

    python benchmarks/run.py --filter 'gru/b32' --providers torch,fastlm --modes forward

Needs `pip install "fastlm[bench]"`, and `[bench-peers]` for ONNX Runtime and OpenVINO; what is missing is skipped.
Exits with 1 where a provider computed something wrong: it is named and not timed.
"""

import argparse
import datetime
import gc
import itertools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import report
import rows
import torch
from providers import PROVIDERS, Call, Provider, reference
from registry import MODES, WORKLOADS, Workload
from torch import Tensor

import fastlm

# One sample lasts at least this long, however short the call: the clock and the loop are then below 1 %.
SAMPLE_SECONDS = 0.005
MIN_ROUNDS = 2
SWEEPS = 3  # samples of each provider in one slot of its thread pool
# ONNX Runtime, OpenVINO and torch each own threads that spin for up to tens of milliseconds after a call, waiting for
# the next one. They need that to be fast, so it stays on; instead each pool gets slots of its own, and the others are
# given this long to fall asleep first.
CALM_SECONDS = 0.05
HERE = Path(__file__).parent


def disagreement(results: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> str | None:
    """None where every result is within `tolerance` of its largest value, else what is wrong."""
    if len(results) != len(truth):
        return f"{len(results)} results instead of {len(truth)}"
    for i, (result, expected) in enumerate(zip(results, truth, strict=True)):
        what = "output" if i == 0 else f"gradient {i}"
        if result.shape != expected.shape:
            return f"{what}: shape {tuple(result.shape)} instead of {tuple(expected.shape)}"
        error, allowed = (result - expected).abs().max().item(), tolerance * expected.abs().max().item()
        if not error <= allowed:  # NaN is wrong too
            return f"{what}: off by {error:.1e}, allowed are {allowed:.1e}"
    return None


def interleave(calls: Mapping[str, Call], pools: Mapping[str, str], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every provider, in samples taken in turn: A B A B A B (one pool), C C C (the next), again.

    A slow spell of a shared machine so hits all of them alike.
    """
    slots = [list(names) for _, names in itertools.groupby(sorted(calls, key=pools.__getitem__), pools.__getitem__)]
    counts = {name: max(1, math.ceil(SAMPLE_SECONDS / _warm_up(call))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for rounds in itertools.count(1):
            for slot in slots:
                if len(slots) > 1:
                    time.sleep(CALM_SECONDS)
                    for name in slot:
                        calls[name]()  # wakes the pool and fills the caches
                for name in slot * SWEEPS:
                    samples[name].append(_seconds_per_call(calls[name], counts[name]))
            if rounds >= MIN_ROUNDS and time.perf_counter() > deadline:
                return samples
    finally:
        gc.enable()


def _warm_up(call: Call) -> float:
    """Seconds per call after the first, slow ones."""
    call()
    times = [_seconds_per_call(call, 1)]
    while len(times) < 3 and sum(times) < 0.1:
        times.append(_seconds_per_call(call, 1))
    return min(times)


def _seconds_per_call(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def measure(
    workload: Workload, mode: str, providers: Iterable[Provider], threads: int, seconds: float
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds per call by provider, and what was refused."""
    calls, refused = {}, []
    with torch.set_grad_enabled(mode == "training"):
        truth = workload.comparable(reference(workload, mode))
        for provider in providers:
            call = provider.prepare(workload, mode, threads)
            if call is None:
                continue
            wrong = None
            if provider.comparable:
                wrong = disagreement(workload.comparable(call()), truth, workload.tolerance)
            if wrong is None:
                calls[provider.name] = call
            else:
                refused.append(f"REFUSED {provider.name} on {workload.op}/{workload.name} {mode}: {wrong}")
        del truth
        pools = {provider.name: provider.pool for provider in providers}
        return interleave(calls, pools, seconds) if calls else {}, refused


def _git_version() -> str:
    """The commit, "-dirty" where more has changed since than results, which a run before this one may have added to."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _installed(providers: Iterable[Provider]) -> list[Provider]:
    found = []
    for provider in providers:
        if provider.version() is None:
            print(f"skipped {provider.name}: {provider.package} is not installed")
        else:
            found.append(provider)
    return found


def _arguments(argv: Sequence[str] | None, providers: Mapping[str, Provider]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known: Iterable[str]) -> object:
        def parse(text: str) -> list[str]:
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)} (known: {', '.join(known)})")
            return text.split(",")

        return parse

    parser.add_argument("--filter", default="", metavar="REGEX", help="searched in OP/WORKLOAD, as in gru/b1_t1_256")
    parser.add_argument("--providers", type=names(providers), default=list(providers), metavar="A,B")
    parser.add_argument("--modes", type=names(MODES), default=list(MODES), metavar="A,B", help="forward,training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per workload and mode, all providers together")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "benchmarks.csv", help="CSV, appended to")
    return parser.parse_args(argv)


def _rows(
    workload: Workload,
    mode: str,
    samples: Mapping[str, Sequence[float]],
    common: Mapping[str, Any],
    versions: Mapping[str, str],
) -> list[rows.Row]:
    """One of every provider, without the machine's limits."""
    quantiles = {name: np.percentile(times, (50, 20, 80)) * 1e3 for name, times in samples.items()}
    torch_p50 = quantiles["torch"][0] if "torch" in quantiles else None
    return [
        rows.Row(
            **common,
            dtype=str(workload.dtype).removeprefix("torch."),
            op=workload.op,
            workload=workload.name,
            provider=name,
            mode=mode,
            p50=p50,
            p20=p20,
            p80=p80,
            gflops=workload.gflop(mode) / p50 * 1e3,
            share=None,
            torch_ratio=torch_p50 / p50 if torch_p50 else None,
            peak_gflops=None,
            read_gbs=None,
            tile_gflops=None,
            provider_version=versions[name],
            gbs=workload.gbytes / p50 * 1e3 if getattr(workload, "bound_by_memory", False) else None,
        )
        for name, (p50, p20, p80) in quantiles.items()
    ]


def _add_limits(measured: Sequence[rows.Row], limits: machine.Limits) -> None:
    """They are known best after the last sample."""
    for row in measured:
        row.peak_gflops, row.tile_gflops, row.read_gbs = limits.peak_gflops, limits.tile_gflops, limits.read_gbs
        row.share = row.gflops / row.peak_gflops if row.peak_gflops else None


def main(
    argv: Sequence[str] | None = None,
    workloads: Sequence[Workload] = WORKLOADS,
    providers: Mapping[str, Provider] = PROVIDERS,
) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _arguments(argv, providers)
    torch.set_num_threads(arguments.threads)
    chosen = _installed(providers[name] for name in arguments.providers)
    limits = machine.Limits(arguments.threads)
    todo = [
        (workload, mode)
        for workload in workloads
        for mode in arguments.modes
        if mode in workload.modes and re.search(arguments.filter, f"{workload.op}/{workload.name}")
    ]
    if not todo:
        print(f"no workload and mode matches --filter {arguments.filter!r} --modes {','.join(arguments.modes)}")
        return 2
    common = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "isa": fastlm.info()["cpu_isa"] or "",
        "threads": arguments.threads,
        "malloc_mmap_max": os.environ.get("MALLOC_MMAP_MAX_", ""),
        "cpu": machine.cpu_name(),
        "torch": torch.__version__,
        "fastlm": fastlm.info()["version"],
        "git": _git_version(),
    }
    versions = {provider.name: f"{provider.package} {provider.version()}" for provider in chosen}
    measured: list[rows.Row] = []
    failures: list[str] = []
    try:
        for done, (workload, mode) in enumerate(todo, 1):
            limits.sample()
            samples, refused = measure(workload, mode, chosen, arguments.threads, arguments.seconds)
            failures += refused
            new = _rows(workload, mode, samples, common, versions)
            line = "  ".join(f"{row.provider} {row.p50:.4g} ms" for row in new)
            print(
                f"[{done}/{len(todo)}] {workload.op}/{workload.name} {mode}: {line}", *refused, sep="\n  ", flush=True
            )
            measured += new
    finally:  # an interrupted run keeps what it has
        _add_limits(measured, limits)
        rows.append(arguments.output, measured)
    print(report.markdown(rows.latest(measured)), *failures, f"rows added to {arguments.output}", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ["FASTLM_STRICT"] = "1"  # the plain reference must not be timed under fastlm's name
    sys.exit(main())
