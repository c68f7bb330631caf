"""Loads the compiled extension once and keeps the reason where it cannot."""

import importlib
from types import ModuleType

module: ModuleType | None = None
reason: str | None = None
broken = False  # built, but not to be loaded

try:
    module = importlib.import_module("fastlm._C")
except ImportError as error:
    # A missing module was never built (FASTLM_PURE=1); anything else is a broken build and is told whole.
    reason = f"the extension fastlm._C is not available: {error}"
    broken = not isinstance(error, ModuleNotFoundError)
else:
    module.cpu_isa()  # chosen now, so that a wrong FASTLM_CPU_ISA is an error of the import
