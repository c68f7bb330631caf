"""What the machine could do at most, measured in the same process as the workloads, and what it is called."""

import platform
import statistics
import time
from pathlib import Path

import torch

from fastlm import _native

PEAK_SECONDS = 0.05
READ_BYTES = 1 << 28  # well beyond any last-level cache


class Limits:
    """Fused multiply-add peak (fp32), the product's tile in L1, memory read rate; medians of samples over the run."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._peaks: list[float] = []
        self._tiles: list[float] = []
        self._reads: list[float] = []
        self._memory = torch.ones(READ_BYTES // 4)

    def sample(self) -> None:
        """Takes one sample of each."""
        if _native.module is not None:
            self._peaks.append(_native.module.fma_peak(self._threads, PEAK_SECONDS))
            self._tiles.append(_native.module.tile_peak(self._threads, PEAK_SECONDS))
        start = time.perf_counter()
        self._memory.sum()
        self._reads.append(READ_BYTES / (time.perf_counter() - start) / 1e9)

    @property
    def peak_gflops(self) -> float | None:
        """None where the extension that measures it is missing."""
        return statistics.median(self._peaks) if self._peaks else None

    @property
    def tile_gflops(self) -> float | None:
        """What the tile under fastlm's products reaches with everything in L1, close to the peak on a quiet core."""
        return statistics.median(self._tiles) if self._tiles else None

    @property
    def read_gbs(self) -> float:
        """GB/s from memory."""
        return statistics.median(self._reads)


def cpu_name() -> str:
    """The processor as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
