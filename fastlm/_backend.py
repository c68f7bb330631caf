"""One table of back ends, the choice among them, and how a fallback is told.

`backend(name)` or FASTLM_BACKEND forces one; FASTLM_STRICT=1 turns every fallback into an error.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fastlm import _native

_Function = TypeVar("_Function", bound=Callable[..., Any])

NAMES = ("reference", "cpu", "cuda", "triton")
_forced: str | None = os.environ.get("FASTLM_BACKEND") or None
_warned: set[str] = set()


class FastlmFallbackWarning(UserWarning):
    """A call ran on the reference because no kernel covers it; shown once per reason."""


def constant_while_compiling(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler, and let it read its environment, as
    soon as fastlm is imported.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def available() -> dict[str, dict[str, object]]:
    """{name: {"available": bool, "reason": str | None}} for every back end."""
    cpu_reason = _native.reason
    return {
        "reference": {"available": True, "reason": None},
        "cpu": {"available": cpu_reason is None, "reason": cpu_reason},
        "cuda": {"available": False, "reason": "this version of fastlm has no CUDA kernels"},
        "triton": {"available": False, "reason": "this version of fastlm has no Triton kernels"},
    }


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    entry = available()[name]
    if not entry["available"]:
        raise RuntimeError(f"{source}: back end {name!r} is not available: {entry['reason']}")
    return name


if _forced is not None:
    _check_name(_forced, "FASTLM_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a back end for the calls inside (eager only): "reference", "cpu", "cuda" or "triton".

    Of the whole process, not of a thread. A `Stream` keeps the one that it was made with.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the back end is not available here (`fastlm.info()` says why), or, at a call inside, has no kernel
            for it.
    """
    global _forced
    previous, _forced = _forced, _check_name(name, "fastlm.backend")
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The back end forced by `backend()` or FASTLM_BACKEND, or None."""
    return _forced


def has_kernels() -> bool:
    """True where kernels run that are no operations: they are there, and the reference is not forced."""
    return _native.module is not None and _forced != "reference"


def fall_back(reason: str) -> None:
    """Tells that the reference runs: one warning per reason, or an error under FASTLM_STRICT=1 or a forced back end."""
    if _forced not in (None, "reference"):
        raise RuntimeError(f"fastlm (back end {_forced!r} is forced): {reason}")
    if os.environ.get("FASTLM_STRICT", "0") not in ("", "0"):
        raise RuntimeError(f"fastlm (FASTLM_STRICT=1): {reason}")
    if reason not in _warned:
        _warned.add(reason)
        _warn(f"fastlm runs the plain reference: {reason}")


@constant_while_compiling  # told at once, and not traced
def _warn(message: str) -> None:
    """At the first caller outside of fastlm's own operations and modules."""
    warnings.warn(message, FastlmFallbackWarning, stacklevel=_depth_of_caller())


def _depth_of_caller() -> int:
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        depth, frame = depth + 1, frame.f_back
    return depth


def _is_ours(module: str) -> bool:
    """True too for what calls a module's forward."""
    return module.partition(".")[0] == "fastlm" or module == "torch.nn.modules.module"


if _native.broken:
    assert _native.reason is not None
    fall_back(_native.reason)  # with no call to tell it at: without an extension the operations are the reference
