"""Runs code in a fresh Python, for what is read once at start or must not touch this process."""

import os
import subprocess
import sys

HEAD = "import torch, fastlm\nfrom tests.numerics import *\n"


def run_python(code: str, *, head: str = HEAD, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs head + code with these environment variables added; the caller looks at output and exit status."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FASTLM_")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", head + code], env=env | environment, capture_output=True, text=True, timeout=120
    )


def check_python(code: str, *, head: str = HEAD, **environment: str) -> str:
    """`run_python` that must succeed; returns what it printed."""
    done = run_python(code, head=head, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
