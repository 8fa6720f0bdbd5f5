"""The papers' tables on the tiny world: trained, scored, and printed as mean and spread over seeds.

    python -m nanoeemllm.tables paths       accuracy, operations, prefill time of every path, 64 and 256 visual tokens
    python -m nanoeemllm.tables aligner     what the aligner needs, at the trained size and at a larger one (Table 6)
    python -m nanoeemllm.tables composite   eemllm-f by its number of composite layers, training-free on llava's weights
    python -m nanoeemllm.tables data        accuracy by the number of training pairs, eemllm and flamingo

A table is made of runs: a path, a picture size, a seed, a share of the training. A run that is done is a line of the
results file and is not done again; a run that was stopped goes on from its checkpoint. Stop it when you like, start the
same command again. --draw prints the tables and draws the plot from the results alone.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanoeemllm.backbone import make_backbones, tiny_config, tiny_tokenizer
from nanoeemllm.checkpoint import load, read_json
from nanoeemllm.command_line import Parser, positive, run_command, visual_path_from
from nanoeemllm.config import PRESETS, UserError, VisualPathConfig
from nanoeemllm.distributed import join
from nanoeemllm.evaluate import evaluate_rows
from nanoeemllm.flops import forward_operations
from nanoeemllm.layout import build_layout
from nanoeemllm.model import EEMLLM
from nanoeemllm.plot import line_chart
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.run import write_aside
from nanoeemllm.toy import WorldConfig, exam
from nanoeemllm.training import Stopped

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # the script at the top of the repository

PATHS = {"llava": "", "eemllm": "", "naavit": "", "saisa": "", "yopo": "--last-visual-layer 2", "flamingo": "--every 1"}
SIZES = {64: 64, 128: 256}                                  # pixels a side -> visual tokens
ALIGNERS = {"none": "", "V O": "vo", "V FFN": "vf", "O FFN": "of", "V O FFN": "vof"}
SHARES = (0.125, 0.25, 0.5, 1.0)                            # of the training's steps; no pair is seen twice
BATCH, LAYERS = 16, PRESETS["tiny"].llama.num_hidden_layers


class Job(NamedTuple):
    """What is trained."""
    path: str
    flags: str = ""                                         # the path's settings, as train.py takes them
    size: int = 64
    seed: int = 0
    share: float = 1.0

    @property
    def name(self) -> str:
        return "_".join([self.path, *self.flags.replace("--", "").split(), f"{self.size}px", f"seed{self.seed}"]
                        + [f"{self.share:g}"] * (self.share != 1))


class Asked(NamedTuple):
    """What is scored: a trained job, perhaps under another path or on pictures of another size."""
    job: Job
    path: VisualPathConfig | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        layers = "-".join(map(str, self.path.composite_layers)) if self.path else ""
        return self.job.name + (f" as {self.path.name} {layers}" if self.path else "") + (
            f" at {self.size}px" if self.size else "")


def composite(job: Job, count: int) -> Asked:
    """llava's weights with the last `count` layers composite."""
    layers = tuple(range(LAYERS - count, LAYERS))
    return Asked(job, VisualPathConfig("eemllm-f", composite_layers=layers) if count else None)


def lines_of(table: str, seed: int) -> dict[tuple, Asked]:
    """(row, column) of a table -> what is scored for it with this seed."""
    if table == "paths":
        cells = {(name, f"{V} visual tokens"): Asked(Job(name, flags, size, seed))
                 for name, flags in PATHS.items() for size, V in SIZES.items()}
        return cells | {("eemllm-f", f"{V} visual tokens"): composite(Job("llava", size=size, seed=seed), 2)
                        for size, V in SIZES.items()}
    if table == "aligner":
        jobs = {row: Job("eemllm", f"--aligner={letters}" if letters != "vof" else "", seed=seed)
                for row, letters in ALIGNERS.items()}
        return {(row, column): Asked(job, size=size) for row, job in jobs.items()
                for column, size in (("64 visual tokens, as trained", None), ("256, not trained", 128))}
    if table == "composite":
        return {(f"{count} of {LAYERS} layers", "64 visual tokens"): composite(Job("llava", seed=seed), count)
                for count in range(LAYERS + 1)}
    return {(f"{share:g} of the pairs", name): Asked(Job(name, PATHS[name], seed=seed, share=share))
            for share in SHARES for name in ("eemllm", "flamingo")}


# ---- runs ----

def train_job(job: Job, args) -> Path:
    """Both stages, by train.py, from the backbones of the picture size; returns the model folder."""
    world, backbone, out = WorldConfig(job.size, seed=job.seed), args.out / f"backbone-{job.size}", args.out / job.name
    with alone(args.out):
        make_backbones(backbone, WorldConfig(job.size))
    stages = (("pretrain", args.pretrain_steps, backbone), ("finetune", args.finetune_steps, out / "pretrain"))
    with alone(out):
        for stage, steps, start in stages:
            flags = train.parse([str(flag) for flag in (
                "--stage", stage, "--init", start, "--out", out, "--resume", "--seed", job.seed, "--device", "cpu",
                "--batch-size", BATCH, "--steps", max(1, round(steps * job.share)), "--visual-path", job.path,
                *job.flags.split())])
            with join("cpu") as group:
                train.run_stage(stage, flags, world, group)
    return out / "finetune"


@contextlib.contextmanager
def alone(folder: Path):
    """One command at a time in this folder; another one waits here."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(held)


def score(asked: Asked, folder: Path, questions: int) -> dict:
    """Accuracy in percent on both splits, and the operations of a prefill of one question."""
    model, accuracy = load(folder, "cpu", visual_path=asked.path).eval(), {}
    if asked.size:
        model = at_size(model, asked.size)
    for split in ("never-seen", "held-out"):
        asked_of = exam(WorldConfig(asked.size or asked.job.size), split, questions)
        rows = [{"image": e.picture, "question": e.question, "answer": e.answer} for e in asked_of]
        accuracy[split] = next(iter(evaluate_rows(model, rows)["overall"].values()))
    ids, side = prompt_of(model, rows[0]["question"]), model.config.vision.grid_size
    count = forward_operations(model.config, build_layout([ids], [[(side, side)]])[1], 1)
    return {"accuracy": accuracy["held-out"], "never-seen": accuracy["never-seen"],
            "operations": count.total() - count["encoder"] - count["projector"], "encoder": count["encoder"]}


def prompt_of(model: EEMLLM, question: str) -> list[int]:
    return encode_prompt(model.tokenizer, "<image>\n" + question, model.config.chat_template)


@torch.inference_mode()
def time_prefills() -> dict[str, float]:
    """"row, column" of the paths' table -> milliseconds from a picture and a question to the first token's scores, with
    random weights. Paths take turns, so that a machine with other work on it disturbs all alike; the median of 50."""
    asked_of, times = {}, {}
    for (row, column), asked in lines_of("paths", 0).items():
        flags = train.parse(["--visual-path", asked.job.path, *asked.job.flags.split()])
        world = WorldConfig(asked.job.size)
        config = tiny_config(world)
        config = dataclasses.replace(config, visual_path=asked.path or visual_path_from(flags))
        model, e = EEMLLM(config, tiny_tokenizer(config)), exam(world, "held-out", 1)[0]
        model.initialize()
        asked_of[f"{row}, {column}"] = model, prompt_of(model, e.question), e.picture
    for turn in range(52):
        for place, (model, ids, picture) in asked_of.items():
            start = time.perf_counter()
            model.logits(ids, [picture])
            if turn > 1:
                times.setdefault(place, []).append(1000 * (time.perf_counter() - start))
    return {place: round(statistics.median(found), 2) for place, found in times.items()}


def at_size(model: EEMLLM, size: int) -> EEMLLM:
    """The model with its position table stretched to larger pictures (bicubic), as is usual where none was trained."""
    vision = dataclasses.replace(model.config.vision, image_size=size, min_image_size=size)
    table, old, new = model.vision.position_embedding, model.config.vision.grid_size, vision.grid_size
    grid = table.weight.T.unflatten(1, (old, old))[None]
    table.weight = torch.nn.Parameter(F.interpolate(grid, (new, new), mode="bicubic")[0].flatten(1).T.contiguous())
    model.config, model.vision.config = dataclasses.replace(model.config, vision=vision), vision
    return model


class Results:
    """A JSON file: settings, a line a run, and the paths' times."""

    def __init__(self, file: Path, settings: dict):
        self.file, self.data = file, {"settings": settings, "runs": {}, "prefill_ms": {}}
        self.read()
        if self.data["settings"] != settings:
            raise UserError(f"{file} holds results of {self.data['settings']}, not {settings}: give another --results")

    def read(self):
        if self.file.exists():
            self.data |= read_json(self.file)

    @property
    def runs(self) -> dict[str, dict]:
        return self.data["runs"]

    def add(self, part: str, result: dict):
        """Adds to a part of the file what another command, at work on another table, may have added to meanwhile."""
        with alone(self.file.parent):
            self.read()
            self.data[part] |= result
            write_aside(self.file, json.dumps(self.data, indent=1).encode())


# ---- tables ----

def spread(values: list[float]) -> str:
    """mean +- half the range"""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def draw(table: str, results: Results, seeds: int) -> list[str]:
    """Markdown: a row a row, a column a column; what is not run yet is left empty."""
    cells: dict[tuple, list[dict]] = {}
    for seed in range(seeds):
        for place, asked in lines_of(table, seed).items():
            cells.setdefault(place, []).extend([results.runs[asked.name]] if asked.name in results.runs else [])
    rows, columns = dict.fromkeys(row for row, _ in cells), dict.fromkeys(column for _, column in cells)
    more = " | operations : llava | prefill, ms" if table == "paths" else ""
    lines = ["| | " + " | ".join(f"{column}: accuracy{more}" for column in columns) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in rows:
        line = []
        for column in columns:
            found, llava = cells[row, column], cells.get(("llava", column))
            line.append(spread([r["accuracy"] for r in found]) if found else "")
            if table == "paths":
                line.append(f"{found[0]['operations'] / llava[0]['operations']:.2f}" if found and llava else "")
                ms = results.data["prefill_ms"].get(f"{row}, {column}")
                line.append(f"{ms:.1f}" if ms else "")
        lines.append(f"| {row} | " + " | ".join(line) + " |")
    return lines


def plot(results: Results, seeds: int, file: Path):
    """Accuracy against operations: a dot a path and number of visual tokens."""
    series: dict[str, list] = {}
    for row, column in lines_of("paths", 0):
        names = [lines_of("paths", seed)[row, column].name for seed in range(seeds)]
        found = [results.runs[name] for name in names if name in results.runs]
        if found:
            accuracy = statistics.mean(run["accuracy"] for run in found)
            series.setdefault(row, []).append((found[0]["operations"] / 1e6, accuracy))
    if series:
        line_chart(file, {name: sorted(points) for name, points in series.items()}, title="64 and 256 visual tokens",
                   x_label="10^6 operations of the language model in a prefill", y_label="accuracy, %", log_x=True)


def main(argv: list[str] | None = None):
    parser = Parser(__doc__, "python -m nanoeemllm.tables")
    add = parser.add_argument
    add("table", choices=("paths", "aligner", "composite", "data", "all"))
    add("--out", type=Path, default=Path("out/tables"), metavar="DIR", help="where the runs are (out/tables)")
    add("--results", type=Path, default=Path(__file__).parent / "assets/tables.json", metavar="FILE")
    add("--seeds", type=positive(int), default=3)
    add("--pretrain-steps", type=positive(int), default=300)
    add("--finetune-steps", type=positive(int), default=800)
    add("--questions", type=positive(int), default=700, help="of each split (700)")
    add("--draw", action="store_true", help="print what there is, train nothing")
    args = parser.parse_args(argv)
    settings = {"steps": [args.pretrain_steps, args.finetune_steps], "batch_size": BATCH, "questions": args.questions}
    results = Results(args.results, settings)
    tables = ("paths", "aligner", "composite", "data") if args.table == "all" else (args.table,)
    if not args.draw:
        results.add("runs", {})                                 # a file that cannot be written is told before the work
    try:
        every = (lines_of(table, seed).values() for seed in range(args.seeds) for table in tables)
        for asked in (asked for group in every for asked in group):
            if asked.name not in results.runs and not args.draw:
                print(f"\n{asked.name}", flush=True)
                results.add("runs", {asked.name: score(asked, train_job(asked.job, args), args.questions)})
        if "paths" in tables and not args.draw and not results.data["prefill_ms"]:
            results.add("prefill_ms", time_prefills())
    except Stopped:
        print("stopped; the same command goes on")
    for table in tables:
        print(f"\n{table}\n", *draw(table, results, args.seeds), sep="\n")
        if table == "data":
            print(f"\nAll pairs: {BATCH * sum(settings['steps']):,}, captions and conversations, each seen once.")
    if "paths" in tables:
        plot(results, args.seeds, args.results.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
