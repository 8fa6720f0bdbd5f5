"""The kernels under Triton's interpreter: kernel_interpreted.py, which conftest.py has started."""

from conftest import INTERPRETED


def test_under_the_interpreter(pytestconfig):
    process = pytestconfig.stash[INTERPRETED]
    output, _ = process.communicate()
    assert process.returncode == 0, output[-5000:]
