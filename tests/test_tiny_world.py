"""The two commands of the README, as a user runs them, with few steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanoeemllm.checkpoint import load
from nanoeemllm.toy import WorldConfig, draw, make_scene

ROOT = Path(__file__).parents[1]


def run(folder: Path, script: str, *arguments) -> str:
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / f"out/{stage}-run/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with out/, what train.py printed): backbones, and 150 steps of either stage."""
    folder = tmp_path_factory.mktemp("tiny-world")
    return folder, run(folder, "train.py", "--steps", 150, "--device", "cpu")


def test_train_learns_and_reports(trained):
    folder, said = trained
    mean = lambda values: sum(values) / len(values)
    pretrain, finetune = losses(folder, "pretrain"), losses(folder, "finetune")
    assert len(pretrain) == len(finetune) == 150
    assert 1.6 < mean(pretrain[:5]) < 2.3 and 0.6 < mean(pretrain[-5:]) < 0.78              # measured 1.90 and 0.69
    assert 0.7 < mean(finetune[:5]) < 1.1 and 0.32 < mean(finetune[-5:]) < 0.44             # 0.87 and 0.38
    held_out, never_seen, other_picture, _ = map(float, re.search(r"overall +(.+)", said)[1].split())
    assert 48 < held_out < 65 and never_seen > 42 and other_picture < 35                     # 56, 52, 24
    assert all((folder / f"out/{stage}-run/loss.png").stat().st_size > 1000 for stage in ("pretrain", "finetune"))
    start, end = load(folder / "out/backbone", "cpu").state_dict(), load(folder / "out/finetune", "cpu").state_dict()
    assert all(start[name].equal(end[name]) for name in start if name.startswith("vision."))


def test_sample_answers(trained):
    folder, _ = trained
    draw(make_scene(WorldConfig(), "held-out", 0), 48).save(folder / "scene.png")
    said = run(folder, "sample.py", "--image", "scene.png", "--prompt", "how many things are there?", "--device", "cpu")
    assert said.strip() in ("one", "two", "three")
