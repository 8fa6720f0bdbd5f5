"""A run's folder: its settings, its metrics and its checkpoints.

    run.json            the settings
    metrics.jsonl       a line a step: loss, learning rate, gradient norm, tokens a second, ...
    loss.png            its curve
    bad_samples.jsonl   samples that could not be used, and why
    checkpoints/        step-*: trained weights and AdamW's moments
    finished            the stage's model folder is written

Whatever is here when the power fails, the run can be resumed from it.
"""

import contextlib
import fcntl
import json
import shutil
import zlib
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from nanoeemllm.border.files import (finish_replacement, flush, quoted, read_json, replace_folder,
                                     write_aside)
from nanoeemllm.border.plot import line_chart
from nanoeemllm.config import UserError
from nanoeemllm.training.config import TrainConfig
from nanoeemllm.training.distributed import ProcessGroup

KEPT = 2      # checkpoints: the newest, and the one before in case it is damaged
FORMAT = 2    # of the folder
WHOLE = "whole.json"      # written last: of every file in the checkpoint its checksum


class RunFolder:
    """The first process alone writes, aside and renamed or line by line; all write checkpoints."""

    def __init__(self, folder: Path, settings: dict, group: ProcessGroup, resume: bool,
                 force: bool = False):
        """settings: plain JSON. Raises UserError where they are not those of the run to resume,
        where a run would be overwritten, and where another process trains here."""
        self.folder, self.checkpoints, self.group = folder, folder / "checkpoints", group
        self.metrics, self.bad_samples = folder / "metrics.jsonl", folder / "bad_samples.jsonl"
        self.bad = 0
        settings = json.loads(json.dumps(settings | {"format": FORMAT}))     # tuples become lists
        self.is_finished = group.on_first(lambda: self._open(settings, resume, force))

    def _open(self, settings: dict, resume: bool, force: bool) -> bool:
        config = self.folder / "run.json"
        finish_replacement(self.folder)
        if self.folder.exists():
            self._lock()
        held = [file.name for file in self.folder.glob("*") if file.name[0] != "."]
        if resume and config.exists():
            before = read_json(config)
            changed = [f"{key} was {before.get(key)!r} and is now {settings.get(key)!r}"
                       for key in sorted(before.keys() | settings.keys())
                       if before.get(key) != settings.get(key)]
            if changed:
                raise UserError(f"{quoted(self.folder)} cannot be resumed: {'; '.join(changed)}: go"
                                " on with the settings and the release that began it, or train "
                                "anew (--force)")
        elif held and not force:
            why = "a run already: go on with it (--resume)" if config.exists() else (
                f"{held[0]} but no run.json: move it away")
            raise UserError(f"{quoted(self.folder)} holds {why}, train anew (--force), or give "
                            "another --out")
        else:
            with replace_folder(self.folder) as aside:
                (aside / "run.json").write_text(json.dumps(settings, indent=1))
            self._lock()
        self.checkpoints.mkdir(exist_ok=True)
        for unfinished in self.checkpoints.glob(".writing-*"):
            shutil.rmtree(unfinished)
        return (self.folder / "finished").exists()

    def _lock(self):
        """Held until the process ends, however it ends; its data workers do not inherit it."""
        self.lock = open(self.folder / ".lock", "a")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process trains in {quoted(self.folder)}: wait for it, or "
                            "give another --out") from error

    def finish(self):
        """The stage's model folder is written: the checkpoints are not needed any more."""
        if self.group.is_first:
            write_aside(self.folder / "finished", b"")
            shutil.rmtree(self.checkpoints)

    # ---- checkpoints: PyTorch's own distributed format, the same for any number of processes ----

    def saved_steps(self) -> list[int]:
        names = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Tensor]):
        """Checkpoint after `step` steps, of tensors (plain, or shards of whole ones): aside,
        flushed to the disk, then renamed; the newest KEPT stay. Several machines must see the same
        folder. Raises UserError where it cannot be written."""
        folder, group = self._checkpoint(step), self.group
        aside = folder.with_name(f".writing-{folder.name}")
        try:
            group.on_first(lambda: aside.mkdir(parents=True))
            dcp.save(state, storage_writer=dcp.FileSystemWriter(aside), no_dist=group.size == 1)
            files = sorted(aside.iterdir())[group.rank::group.size]
            checksums = group.gather([(file.name, _checksum(file)) for file in files])
            if group.is_first:
                write_aside(aside / WHOLE, json.dumps(dict(checksums)).encode())
                aside.rename(folder)
                flush(folder.parent)
                for old in self.saved_steps()[:-KEPT]:
                    shutil.rmtree(self._checkpoint(old))
        except (OSError, UserError, dcp.api.CheckpointException) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = str(error).splitlines()[-1]
            raise UserError(f"{quoted(folder)} cannot be written ({reason}): the checkpoint before "
                            "it stands; make room on the disk and go on with --resume") from error

    def load(self, state: dict[str, Tensor]) -> int:
        """Reads the newest whole checkpoint into state, sharded in any way. Returns its step, 0
        without any. What was logged after it will be logged again."""
        step, group = 0, self.group
        for saved in reversed(group.on_first(self.saved_steps)):
            folder = self._checkpoint(saved)
            if self.is_whole(saved):
                dcp.load(state, storage_reader=dcp.FileSystemReader(folder),
                         no_dist=group.size == 1)
                step = saved
                break
            if group.is_first:
                print(f"the checkpoint of step {saved} is not whole: going back to the one before "
                      "it")
                shutil.rmtree(folder)
        self.bad = group.on_first(lambda: self._forget_after(step))
        return step

    def is_whole(self, step: int) -> bool:
        """Whether a checkpoint has all its files, each with all its bytes unchanged."""
        folder, group = self._checkpoint(step), self.group
        try:
            checksums = sorted(json.loads((folder / WHOLE).read_text()).items())
            damaged = sum(_checksum(folder / name) != checksum
                          for name, checksum in checksums[group.rank::group.size])
        except (OSError, ValueError):
            damaged = 1
        return not any(group.gather([damaged]))

    def _forget_after(self, step: int) -> int:
        """Returns how many bad samples stay."""
        for file in (self.metrics, self.bad_samples):
            kept = [line for line in _logged(file) if line["step"] <= step]
            if file.exists():
                write_aside(file, "".join(json.dumps(line) + "\n" for line in kept).encode())
        return len(kept)

    # ---- metrics ----

    def log(self, line: dict, file: Path | None = None):
        if self.group.is_first:
            with open(file or self.metrics, "a") as log:
                log.write(json.dumps(line) + "\n")

    def log_bad(self, step: int, bad: list[tuple[str, str]], config: TrainConfig, allowed: float):
        """Writes down samples that could not be used. Raises UserError where they are more than the
        part `allowed` of all samples so far, of which the first thousand count as one."""
        self.bad += len(bad)
        for key, reason in bad:
            self.log({"step": step, "id": key, "reason": reason}, self.bad_samples)
        seen = step * config.batch_size
        if self.bad > allowed * max(seen, min(1000, config.steps * config.batch_size)):
            key, reason = bad[-1]
            raise UserError(f"{self.bad} of {seen:,} samples so far could not be used, over "
                            f"{allowed:.2%} (the last: {key}: {reason}): see "
                            f"{quoted(self.bad_samples)}, mend them or allow more with --max-bad; "
                            "then --resume")

    def draw_curve(self):
        if self.group.is_first:
            lines, series = _logged(self.metrics), {}
            for name, key in (("training", "loss"), ("held out", "held_out_loss")):
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    series[name] = points
            line_chart(self.folder / "loss.png", series, title=self.folder.name, x_label="step",
                       y_label="loss", log_y=True)


def _logged(file: Path) -> list[dict]:
    """The lines before one that was cut short."""
    lines = []
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                lines.append(json.loads(line))
    return lines


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return checksum
