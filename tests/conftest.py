"""One thread a worker, and the kernels under Triton's interpreter beside all other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")     # before PyTorch is loaded: workers share the cores

INTERPRETED = pytest.StashKey[subprocess.Popen]()


def pytest_collection_modifyitems(items):
    """The test that waits for the interpreter comes last: it takes minutes, on a core of its own."""
    items.sort(key=lambda item: item.name == "test_under_the_interpreter")


def pytest_collection_finish(session):
    """TRITON_INTERPRET has to be set before Triton is imported, hence a process."""
    names = {item.name for item in session.items}
    if "test_under_the_interpreter" in names and not session.config.option.collectonly:
        tests = Path(__file__).with_name("kernel_interpreted.py")
        session.config.stash[INTERPRETED] = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", str(tests)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, preexec_fn=lambda: os.nice(15),
            env={**os.environ, "TRITON_INTERPRET": "1"})        # the other tests come first


def pytest_sessionfinish(session):
    process = session.config.stash.get(INTERPRETED, None)
    if process is not None and process.poll() is None:      # the session ended early
        process.kill()
