"""The training loop: what is trained, the schedule, steps, checkpoints, and what a run writes down.

A run's folder holds `run.json` (what it was told), `metrics.jsonl` (what it saw, a line a step), `loss.png` and
`checkpoints/step-*`. The loss of a step is the mean cross entropy over the learned-from tokens of the whole global
batch, however it is cut into micro-batches.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from nanoeemllm.config import UserError
from nanoeemllm.data import Packed
from nanoeemllm.model import EEMLLM, Batch
from nanoeemllm.plot import line_chart
from nanoeemllm.visual_path import learns_in_pretrain


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one stage."""
    stage: str                          # "pretrain" or "finetune"
    steps: int
    batch_size: int                     # samples an optimizer step, over all processes and micro-batches
    learning_rate: float
    warmup: float = 0.03                # part of the steps in which the learning rate rises
    weight_decay: float = 0.0
    clip: float = 1.0                   # largest norm of the gradient
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    checkpoint_every: int = 500
    keep: int = 2                       # newest checkpoints kept


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to 0. Steps count from 0."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def freeze_for(model: EEMLLM, stage: str) -> list[nn.Parameter]:
    """Leaves to train what the stage trains and returns it: the projector (and what else a visual path put between
    encoder and language model) alone, or with the language model."""
    for name, p in model.named_parameters():
        p.requires_grad_(learns_in_pretrain(name) or stage == "finetune" and name.startswith("decoder."))
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(params: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, fused=True)


class Stopped(Exception):
    """The run was asked to stop (SIGINT, SIGTERM) and has saved itself."""


class Run:
    """A run's folder: settings, metrics, checkpoints. Everything is written aside and renamed."""

    def __init__(self, folder: Path, settings: dict, resume: bool, force: bool = False):
        """settings: plain JSON, what the run is told. Raises UserError where they are not those of the run resumed,
        or where a run that is there already would be overwritten."""
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        told = folder / "run.json"
        if told.exists() and (resume or not force):
            if not resume:
                raise UserError(f"{folder} holds a run already: go on with it (--resume), train it anew (--force), or give "
                                "another --out")
            before = json.loads(told.read_text())
            changed = [f"{key} was {before.get(key)!r} and is now {settings.get(key)!r}"
                       for key in sorted(before.keys() | settings.keys()) if before.get(key) != settings.get(key)]
            if changed:
                raise UserError(f"{folder} cannot be resumed with other settings: {'; '.join(changed)}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            self.checkpoints.mkdir(parents=True)
            write_aside(told, json.dumps(settings, indent=1).encode())
        self.metrics = folder / "metrics.jsonl"

    @property
    def is_finished(self) -> bool:
        return (self.folder / "finished").exists()

    def finish(self):
        """The stage's model folder is written: the checkpoints are not needed any more."""
        write_aside(self.folder / "finished", b"")
        shutil.rmtree(self.checkpoints)

    def saved_steps(self) -> list[int]:
        return sorted(int(p.name.removeprefix("step-")) for p in self.checkpoints.glob("step-*"))

    def save(self, step: int, state: dict, keep: int):
        """Checkpoint after `step` steps; the newest `keep` stay."""
        path = self.checkpoints / f"step-{step:08d}"
        aside = self.checkpoints / f".writing-{os.getpid()}"
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        for old in self.saved_steps()[:-keep]:
            (self.checkpoints / f"step-{old:08d}").unlink()

    def load(self) -> tuple[int, dict | None]:
        """The newest checkpoint that is whole: (steps done, its state), or (0, None)."""
        for step in reversed(self.saved_steps()):
            try:
                return step, torch.load(self.checkpoints / f"step-{step:08d}", weights_only=True)
            except Exception as error:
                print(f"checkpoint of step {step} is broken ({error}); trying the one before")
        return 0, None

    def forget_metrics_after(self, step: int):
        """On resuming: what a stopped run wrote behind its last checkpoint will be written again."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        write_aside(self.metrics, "".join(l for l in lines if json.loads(l)["step"] <= step).encode())

    def draw_curve(self):
        points = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        line_chart(self.folder / "loss.png", {"loss": [(p["step"], p["loss"]) for p in points]},
                   title=self.folder.name, x_label="step", y_label="loss", log_y=True)


def write_aside(path: Path, data: bytes):
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def train(model: EEMLLM, load: Callable[[int], Iterable[Packed]], config: TrainConfig, run: Run):
    """Trains in place. load(first) yields the micro-batches of all steps from `first` on (data.Loader).

    Raises Stopped after a signal, the step finished and saved; UserError if the loss is not finite.
    """
    params = freeze_for(model, config.stage)
    optimizer = make_optimizer(params, config)
    first, state = run.load()
    if state is not None:
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    run.forget_metrics_after(first)

    def checkpoint(step: int):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        run.save(step, {"model": trained, "optimizer": optimizer.state_dict()}, config.keep)

    stop = _stop_on_signals()
    with open(run.metrics, "a") as metrics, tqdm(total=config.steps, initial=first, desc=config.stage,
                                                 disable=None, mininterval=0.5) as bar:
        for step, micro_batches in steps_of(load(first)):
            start = time.perf_counter()
            loss, norm = optimizer_step(model, params, optimizer, micro_batches, config, step)
            seconds = time.perf_counter() - start
            tokens = sum(len(b.ids) + len(b.layout.visual.position) for b in micro_batches)
            line = {"step": step + 1, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm,
                    "tokens_per_s": tokens / seconds, "seconds": seconds}
            metrics.write(json.dumps(line) + "\n")
            bar.set_postfix_str(f"loss {loss:.3f}, lr {line['lr']:.1e}, {line['tokens_per_s']:,.0f} tokens/s",
                                refresh=False)
            bar.update()
            if (step + 1) % config.checkpoint_every == 0 or stop or step + 1 == config.steps:
                metrics.flush()
                checkpoint(step + 1)
                if stop and step + 1 < config.steps:
                    raise Stopped(f"stopped after step {step + 1} of {config.steps}; it is saved: run the same command "
                                  "with --resume to go on")
    run.draw_curve()


def steps_of(packed: Iterable[Packed]) -> Iterator[tuple[int, list[Batch]]]:
    """(step, all its micro-batches)"""
    micro_batches = []
    for p in packed:
        micro_batches.append(p.batch)
        if p.last:
            yield p.step, micro_batches
            micro_batches = []


def optimizer_step(model: EEMLLM, params: list[nn.Parameter], optimizer: torch.optim.Optimizer,
                   micro_batches: list[Batch], config: TrainConfig, step: int) -> tuple[float, float]:
    """One update from all micro-batches: (mean loss over their learned-from tokens, norm of the gradient)."""
    learned = max(1, sum(len(b.targets) for b in micro_batches))
    total = 0.0
    for batch in micro_batches:
        loss = model(batch.to(model.device)) / learned
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(params, config.clip).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        keys = [key for batch in micro_batches for key in batch.keys]
        raise UserError(f"the loss is {total} and its gradient {norm} at step {step + 1}, samples {', '.join(keys[:8])}: "
                        "the last checkpoint stands; lower the learning rate or look at these samples")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def _stop_on_signals() -> list[int]:
    """A list that stays empty until SIGINT or SIGTERM arrives. A second signal ends the program at once."""
    caught: list[int] = []

    def handle(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return caught
