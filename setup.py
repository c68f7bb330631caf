"""Builds the one extension, fastlm._C; everything else is in pyproject.toml.

FASTLM_PURE=1      compile nothing: every operation runs on the plain reference
FASTLM_WIDE_ISA=1  also compile the test ISAs "wide", AVX-512's geometry on AVX2 registers, and "wide_amx"
MAX_JOBS=N         parallel compiler processes (with ninja)
"""

import os
import platform
import shutil
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PURE = os.environ.get("FASTLM_PURE", "0") not in ("", "0")
# Asked for by an isolated build beside pyproject's own; the stable ABI lets the result run on any later torch.
BUILD_REQUIREMENTS = ["torch==2.13.0", "ninja", "pybind11>=2.12"]


def sources(wide: bool) -> list[str]:
    """Every .cpp of csrc for this machine, in a fixed order."""
    isas = {"scalar"} | ({"avx2", "avx512"} if platform.machine() in ("x86_64", "AMD64") else set())
    if wide:
        isas.add("wide")
    found = sorted((ROOT / "csrc").rglob("*.cpp"))
    return [
        str(path.relative_to(ROOT)) for path in found if path.parent.name != "isa" or path.stem.split("_")[0] in isas
    ]


def extension() -> dict[str, object]:
    """Arguments of setup() that build the extension through torch's build support."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    wide = os.environ.get("FASTLM_WIDE_ISA", "0") not in ("", "0")
    macros = [
        ("TORCH_TARGET_VERSION", "0x020d000000000000"),  # the stable ABI of torch 2.13: later ones keep it
        ("FASTLM_TORCH_VERSION", f'"{torch.__version__}"'),
    ]
    module = CppExtension(
        "fastlm._C",
        sources(wide),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=macros + ([("FASTLM_WIDE_ISA", "1")] if wide else []),
        # No contraction: a fused multiply-add stands in the source or nowhere. psabi: no vector crosses a call.
        extra_compile_args=[
            *("-O3", "-g0", "-std=c++17", "-ffp-contract=off"),
            *("-fvisibility=hidden", "-Wall", "-Wno-psabi"),
        ],
    )
    # The stable ABI needs no libtorch_python, and binding to it would tie the wheel to one torch.
    module.libraries = [name for name in module.libraries if name != "torch_python"]
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


class Refusal:
    """Stands in where torch, pybind11 or a compiler is missing: metadata and sdist work, a build says so."""

    error: ImportError

    def run(self) -> None:
        """Refuses."""
        raise SystemExit(
            f"fastlm: cannot compile its kernels: {self.error}. Install a C++ compiler (g++) and"
            f" {', '.join(BUILD_REQUIREMENTS)} first (an isolated build does the latter), or set FASTLM_PURE=1 to build"
            " without kernels."
        )


class RefusedBuild(Refusal, build):
    """Of pip install."""


class RefusedExtension(Refusal, build_ext):
    """Of setup.py build_ext, which make runs."""


def arguments() -> dict[str, object]:
    """All of setup()'s arguments."""
    if PURE:
        return {}
    requirements: dict[str, object] = {"setup_requires": BUILD_REQUIREMENTS}
    try:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            raise ImportError(f"found no C++ compiler ({compiler})")
        return requirements | extension()
    except ImportError as error:
        Refusal.error = error
        commands: dict[str, type[Command]] = {"build": RefusedBuild, "build_ext": RefusedExtension}
        return requirements | {"cmdclass": commands}


setup(**arguments())
