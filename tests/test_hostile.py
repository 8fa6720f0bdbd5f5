"""No input ends in a traceback, hangs, or harms what was saved: hostile.py, a test a group."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GROUPS = ("config", "environment", "file", "flag", "output", "path", "program", "record",
          "tokenizer", "weights")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all cases, run by a process of their own: forks of one that has threads may hang."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, Path(__file__).with_name("hostile.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (folder / "results.json").exists(), done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("group", GROUPS)
def test_one_line_and_no_harm(results, group):
    wrong = [f"{line['name']}: {line['wrong']}: {line['stderr'][-200:]!r}" for line in results
             if line["name"].startswith(group + "/") and line["wrong"]]
    assert not wrong, "\n".join(wrong)


def test_there_are_many_of_every_kind(results):
    names = [line["name"] for line in results]
    assert len(set(names)) == len(names) >= 300
    assert {name.split("/")[0] for name in names} == set(GROUPS)
