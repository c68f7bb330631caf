"""What is shipped is complete, and importing it touches nothing."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("csrc", "fastlm")
TOP_FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree")


def run_python(code: str, *args: str, cwd: Path, **environment: str) -> str:
    """Runs code in a fresh interpreter and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, into: Path) -> Path:
    """Builds an "sdist" or "wheel" of a source tree without network or compiler."""
    code = "import sys; from setuptools import build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    run_python(code, kind, str(into), cwd=source, FASTLM_PURE="1")
    (built,) = into.iterdir()
    return built


def files_of(root: Path, folder: str) -> set[str]:
    """What a folder holds, as paths from root, without what was built there."""
    found = (path.relative_to(root) for path in (root / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.suffix != ".so" and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """An sdist, made from a copy, since building writes into the source tree."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, copy / folder)
    for name in TOP_FILES:
        shutil.copy(ROOT / name, copy)
    return build("sdist", copy, out)


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_sdist_is_complete(unpacked):
    for folder in SHIPPED:
        assert files_of(unpacked, folder) == files_of(ROOT, folder)
    assert set(TOP_FILES) <= {path.name for path in unpacked.iterdir()}


def test_sdist_holds_nothing_built(unpacked):
    assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".pyc", ".o")]


def test_wheel_from_sdist_is_complete(unpacked, tmp_path):
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as archive:
        names = set(archive.namelist())
    assert files_of(ROOT, "fastlm") <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith("fastlm")]


def test_works_without_the_extension():
    code = """
import sys
sys.modules["fastlm._C"] = None  # what an import finds where it was never built
import torch, fastlm
cpu = fastlm.info()["backends"]["cpu"]
model = fastlm.replace(torch.nn.GRU(3, 4))
output, _ = model(torch.ones(5, 2, 3))
print(cpu["available"], "fastlm._C" in cpu["reason"], tuple(output.shape))
"""
    assert run_python(code, cwd=ROOT).split("\n")[0] == "False True (5, 2, 4)"


@pytest.mark.parametrize("command", [["build"], ["build_ext", "--inplace"]], ids=str)
def test_a_missing_compiler_is_told(command, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fastlm").mkdir()
    (tmp_path / "fastlm" / "__init__.py").write_text('__version__ = "0"\n')
    environment = {**os.environ, "CXX": "no-such-compiler", "FASTLM_PURE": "0"}
    arguments = [sys.executable, "setup.py", "-q", *command]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "found no C++ compiler (no-such-compiler). Install" in done.stderr
    assert "FASTLM_PURE=1" in done.stderr


def test_import_changes_nothing():
    code = """
import sys, warnings
import torch

def state():
    threads = torch.get_num_threads(), torch.get_num_interop_threads()
    modes = torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    return threads, modes, torch.get_rng_state().tolist(), torch.cuda.is_initialized()

def heavy():
    return {"transformers", "triton", "matplotlib", "rich"} & set(sys.modules)

before = state(), heavy()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import fastlm
assert (state(), heavy()) == before
"""
    run_python(code, cwd=ROOT)


def test_code_in_the_readme_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    run_python("import sys\nfor block in sys.argv[1:]: exec(block, {})", *blocks, cwd=ROOT)
