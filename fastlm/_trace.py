"""Which path each call of an operation takes, recorded while `fastlm.explain` runs something."""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple


class Call(NamedTuple):
    """One call of an operation; reason says why the reference ran, None means that the kernel did."""

    operation: str
    reason: str | None


# None unless a recording runs, so that a caller pays one comparison: `if _trace.calls is not None: _trace.record(...)`.
calls: list[Call] | None = None
_lock = threading.RLock()
_thread: int | None = None


def record(operation: str, reason: str | None) -> None:
    """Notes a call, if it comes from the thread that records."""
    if calls is not None and threading.get_ident() == _thread:
        calls.append(Call(operation, reason))


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Collects the calls that this thread makes inside; one recording at a time."""
    global calls, _thread
    with _lock:
        outer = calls, _thread
        calls, _thread = [], threading.get_ident()
        try:
            yield calls
        finally:
            calls, _thread = outer
