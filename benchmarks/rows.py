"""The CSV: one row per workload, mode and provider of a run."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass
class Row:
    """One measurement with everything that is needed to judge it; times in milliseconds."""

    date: str  # of the run's start: rows of one run share it
    op: str
    workload: str
    provider: str
    mode: str
    dtype: str
    isa: str
    threads: int
    p50: float
    p20: float
    p80: float
    gflops: float  # GFLOP/s of useful work
    share: float | None  # of the machine's fused multiply-add peak in this run
    torch_ratio: float | None  # torch's time over this one's, same run
    peak_gflops: float | None
    read_gbs: float
    malloc_mmap_max: str  # MALLOC_MMAP_MAX_ of the environment: it decides what large temporaries cost
    cpu: str
    torch: str
    provider_version: str
    fastlm: str
    git: str
    gbs: float | None  # GB/s of what the call must read, where that is its limit
    tile_gflops: float | None  # the product's innermost tile in L1, in this run


_NUMBERS = {field.name: int if field.type is int else float for field in fields(Row) if field.type not in (str,)}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV, with the header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()})


def read(path: Path) -> list[Row]:
    """All rows of a CSV."""
    with path.open(newline="") as file:
        return [Row(**{name: _parse(name, text) for name, text in line.items()}) for line in csv.DictReader(file)]


def _parse(name: str, text: str) -> object:
    if name not in _NUMBERS:
        return text
    return _NUMBERS[name](text) if text else None


Group = dict[str, Row]  # one workload and mode of one run, by provider


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str], Group]:
    """{(op, workload, mode): rows by provider} of the newest run that timed it; providers of two runs never mix."""
    groups: dict[tuple[str, str, str], Group] = {}
    for row in sorted(rows, key=lambda row: row.date):
        key = (row.op, row.workload, row.mode)
        group = groups.get(key, {})
        if any(other.date != row.date for other in group.values()):
            group = {}
        groups[key] = {**group, row.provider: row}
    return groups


def ours(group: Group) -> Row | None:
    """The fastest row of fastlm."""
    return min((row for name, row in group.items() if name.startswith("fastlm")), key=lambda r: r.p50, default=None)


def fastest_peer(group: Group) -> Row | None:
    """The fastest row of anything else, torch included."""
    rows = (row for name, row in group.items() if not name.startswith(("fastlm", "without")))
    return min(rows, key=lambda r: r.p50, default=None)
