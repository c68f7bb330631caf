"""What this installation of fastlm can do, to paste into an issue."""

import importlib.metadata

import torch

from fastlm import _backend, _native
from fastlm._report import Report

try:
    version = importlib.metadata.version("fastlm")
except importlib.metadata.PackageNotFoundError:
    version = "0+source"  # imported from a source tree that was never installed


def info() -> Report:
    """Versions, instruction sets, threads and which back ends work here, with the reason where one does not.

    Returns:
        A dict that prints well: version, torch_built (the torch that the extension was compiled against),
        torch_running, cpu_isa (in use), cpu_isas (this CPU's), threads, backends {name: {available, reason}}.
        What only the extension knows is None without it.
    """
    native = _native.module
    return Report(
        version=version,
        torch_built=native.build_info()["torch"] if native else None,
        torch_running=torch.__version__,
        cpu_isa=native.cpu_isa() if native else None,
        cpu_isas=native.cpu_isas() if native else [],
        threads=torch.get_num_threads(),
        backends=_backend.available(),
    )
