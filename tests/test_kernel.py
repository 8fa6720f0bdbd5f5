"""Runs kernel_interpreted.py with TRITON_INTERPRET=1, which has to be set before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path


def test_under_the_interpreter():
    tests = Path(__file__).with_name("kernel_interpreted.py")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(tests)], capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
