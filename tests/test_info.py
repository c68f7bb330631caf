import importlib.util
import json
import re
from importlib import metadata

import pytest
import torch

import fastlm
from fastlm import _info, _native
from tests.child import check_python, run_python

KEYS = ["version", "torch_built", "torch_running", "cpu_isa", "cpu_isas", "threads", "backends"]


def test_what_it_holds() -> None:
    info = fastlm.info()
    assert list(info) == KEYS
    assert info["version"] == fastlm.__version__
    assert info["torch_running"] == torch.__version__
    assert info["threads"] == 1
    assert set(info["backends"]) == {"reference", "cpu", "cuda", "triton"}
    for entry in info["backends"].values():
        assert entry["available"] == (entry["reason"] is None)
    json.dumps(info)


def test_with_and_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        build_info = staticmethod(lambda: {"torch": "2.13.0", "compiler": "g++", "isas": ["scalar"]})
        cpu_isa = staticmethod(lambda: "avx2")
        cpu_isas = staticmethod(lambda: ["scalar", "avx2"])

    monkeypatch.setattr(_native, "module", Extension)
    assert [fastlm.info()[key] for key in KEYS[1:5:2]] == ["2.13.0", "avx2"]
    monkeypatch.setattr(_native, "module", None)
    assert [fastlm.info()[key] for key in ("torch_built", "cpu_isa", "cpu_isas")] == [None, None, []]


def test_prints_one_line_per_entry() -> None:
    text = str(fastlm.info())
    for key in KEYS:
        assert re.search(rf"^{key}:", text, re.MULTILINE)
    assert re.search(r"^  cuda:\n    available: False\n    reason: \w", text, re.MULTILINE)


def test_run_as_a_module() -> None:
    done = run_python(
        "import runpy, warnings; warnings.simplefilter('error'); runpy.run_module('fastlm.info', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("version: ")


def test_callable_after_its_module_is_imported() -> None:
    out = check_python("before = fastlm.info()\nimport fastlm.info\nprint(fastlm.info() == before)")
    assert out.strip() == "True"


def test_importing_probes_no_device_and_prints_nothing() -> None:
    assert check_python("assert not torch.cuda.is_initialized()") == ""


def test_importing_leaves_the_compiler_and_its_settings_alone() -> None:
    """They read the environment once, and a user may still be about to set it."""
    code = """
import os, sys, torch
before = dict(os.environ)
import fastlm
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules], os.environ == before)
"""
    assert check_python(code, head="").strip() == "[] True"


def test_version_in_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    spec = importlib.util.spec_from_file_location("_info_copy", _info.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.version == "0+source"
