"""Every test starts alike: one torch thread, fixed seeds, no back end forced, uninitialised memory full of NaN.

FASTLM_CPU_ISA is respected: it chooses what the tests without the isa fixture run on.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from fastlm import _backend, _native
from tests.numerics import differs

ISAS = ["pure"] if _native.module is None else _native.module.cpu_isas()


def pytest_report_header() -> str:
    if _native.module is None:
        return f"fastlm: pure Python, no kernels are tested ({_native.reason})"
    return f"fastlm: {_native.module.__file__}, ISA {_native.module.cpu_isa()}, usable: {', '.join(ISAS)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked full unless FASTLM_TEST_FULL=1, and what would run the same kernels twice."""
    full = os.environ.get("FASTLM_TEST_FULL", "0") not in ("", "0")
    left_out = [item for item in items if (item.get_closest_marker("full") and not full) or _is_another_again(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_another_again(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "isa" not in parameters or item.get_closest_marker("bfloat16"):
        return False
    return not differs(parameters["isa"], parameters.get("dtype", torch.float32))


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTLM_STRICT", raising=False)
    monkeypatch.setattr(_backend, "_forced", None)
    monkeypatch.setattr(_backend, "_warned", set())
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Deterministic mode fills what aten::empty returns with NaN, in C++ too: a kernel that reads it is found out.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set usable here ("pure" without the extension)."""
    if _native.module is None:
        yield request.param
        return
    previous = _native.module.cpu_isa()
    _native.module.set_cpu_isa(request.param)
    yield request.param
    _native.module.set_cpu_isa(previous)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
