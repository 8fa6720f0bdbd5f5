"""A run's folder: what it was told, what it saw, and its checkpoints.

    run.json            what it was told
    metrics.jsonl       what it saw, a line a step
    loss.png            the curve of it
    bad_samples.jsonl   samples that could not be used, and why
    checkpoints/        step-*: trained weights and AdamW's moments (distributed.py)
    finished            the stage's model folder is written

Whatever is here when the power fails, the run can go on from it.
"""

import json
import os
import shutil
from pathlib import Path

from torch import Tensor

from nanoeemllm.checkpoint import read_json
from nanoeemllm.config import UserError
from nanoeemllm.distributed import Group, is_whole, load_state, save_state
from nanoeemllm.plot import line_chart

KEEP = 2      # checkpoints: the newest, and the one before in case it is not whole


class Run:
    """A run's folder. The first process alone writes, aside and renamed or line by line; checkpoints come from all."""

    def __init__(self, folder: Path, settings: dict, group: Group, resume: bool, force: bool = False):
        """settings: plain JSON, what the run is told. Raises UserError where they are not those of the run resumed,
        or where a run that is there already would be overwritten."""
        self.folder, self.checkpoints, self.group = folder, folder / "checkpoints", group
        self.metrics, self.bad_samples = folder / "metrics.jsonl", folder / "bad_samples.jsonl"
        self.bad = 0
        self.is_finished = group.first_alone(lambda: self._open(settings, resume, force))

    def _open(self, settings: dict, resume: bool, force: bool) -> bool:
        told = self.folder / "run.json"
        settings = json.loads(json.dumps(settings))                      # tuples to lists, as they will be read
        if told.exists() and (resume or not force):
            if not resume:
                raise UserError(f"{self.folder} holds a run already: go on with it (--resume), train it anew (--force), or "
                                "give another --out")
            before = read_json(told)
            changed = [f"{key} was {before.get(key)!r} and is now {settings.get(key)!r}"
                       for key in sorted(before.keys() | settings.keys()) if before.get(key) != settings.get(key)]
            if changed:
                raise UserError(f"{self.folder} cannot be resumed with other settings: {'; '.join(changed)}")
        else:
            held = [] if force or not self.folder.exists() else [f for f in self.folder.iterdir() if f.name[0] != "."]
            if held:
                raise UserError(f"{self.folder} holds {held[0].name} but no run.json: move it away, or train anew (--force)")
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_aside(told, json.dumps(settings, indent=1).encode())
        self.checkpoints.mkdir(exist_ok=True)
        for unfinished in self.checkpoints.glob(".writing-*"):
            shutil.rmtree(unfinished)
        return (self.folder / "finished").exists()

    def finish(self):
        """The stage's model folder is written: the checkpoints are not needed any more."""
        if self.group.is_first:
            write_aside(self.folder / "finished", b"")
            shutil.rmtree(self.checkpoints)

    # ---- checkpoints ----

    def saved_steps(self) -> list[int]:
        return sorted(int(p.name[5:]) for p in self.checkpoints.glob("step-*") if p.name[5:].isdecimal())

    def save(self, step: int, state: dict[str, Tensor]):
        """Checkpoint after `step` steps; the newest KEEP stay."""
        path = self.checkpoints / f"step-{step:08d}"
        if not path.exists():
            save_state(state, path, self.group)
        if self.group.is_first:
            for old in self.saved_steps()[:-KEEP]:
                shutil.rmtree(self.checkpoints / f"step-{old:08d}")

    def load(self, state: dict[str, Tensor]) -> int:
        """Reads the newest whole checkpoint into state. Returns how many steps it has behind it, 0 without any."""
        step = self.group.first_alone(self._go_back)
        if step:
            load_state(state, self.checkpoints / f"step-{step:08d}", self.group)
        return step

    def _go_back(self) -> int:
        """To the newest whole checkpoint; what was written down behind it will be written again."""
        for step in reversed(self.saved_steps()):
            path = self.checkpoints / f"step-{step:08d}"
            if is_whole(path):
                break
            print(f"the checkpoint of step {step} is not whole: going back to the one before it")
            shutil.rmtree(path)
        else:
            step = 0
        self._forget_after(step, self.metrics)
        self.bad = self._forget_after(step, self.bad_samples)
        return step

    @staticmethod
    def _forget_after(step: int, file: Path) -> int:
        """Returns how many lines stay. Some may have been cut short."""
        def stays(line: str) -> bool:
            try:
                return line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                return False

        if not file.exists():
            return 0
        lines = list(filter(stays, file.read_text().splitlines(keepends=True)))
        write_aside(file, "".join(lines).encode())
        return len(lines)

    # ---- what it saw ----

    def note(self, line: dict):
        if self.group.is_first:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")

    def note_bad(self, step: int, bad: list[tuple[str, str]], samples: int, batch_size: int, allowed: float):
        """Writes down what could not be used. Raises UserError where that is more than the part `allowed` of all samples
        so far, of which the first thousand count as one."""
        self.bad += len(bad)
        if self.group.is_first:
            with open(self.bad_samples, "a") as file:
                file.writelines(json.dumps({"step": step, "id": key, "reason": why}) + "\n" for key, why in bad)
        self.bad = self.group.first_alone(lambda: self.bad)              # on resuming, the first one alone has counted
        if self.bad > allowed * max(step * batch_size, min(1000, samples)):
            raise UserError(f"{self.bad} of {step * batch_size:,} samples so far could not be used, over {allowed:.2%} "
                            f"(the last: {bad[-1][0]}: {bad[-1][1]}): see {self.bad_samples}, mend them or allow more with "
                            "--max-bad; then --resume")

    def draw_curve(self):
        if self.group.is_first:
            lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
            series = {name: [(line["step"], line[key]) for line in lines if key in line]
                      for name, key in (("training", "loss"), ("held out", "held_out_loss"))}
            line_chart(self.folder / "loss.png", {name: points for name, points in series.items() if points},
                       title=self.folder.name, x_label="step", y_label="loss", log_y=True)


def write_aside(path: Path, data: bytes):
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
