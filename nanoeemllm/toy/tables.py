"""The papers' tables on the tiny world: trained, scored, printed as mean and spread over seeds.

    python -m nanoeemllm.toy.tables paths       visual paths: accuracy, operations, prefill time
    python -m nanoeemllm.toy.tables aligner     what the aligner needs, at two sizes of images
    python -m nanoeemllm.toy.tables composite   eemllm-f by its number of composite layers
    python -m nanoeemllm.toy.tables data        accuracy by the number of training pairs

What the results file lacks is trained (by train.py), scored and added to it, one run after another.
Stop it when you like: the same command goes on. --draw prints what there is and trains nothing.
"""

import fcntl
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

import nanoeemllm
from nanoeemllm import paths
from nanoeemllm.border.command import Parser, positive, run_command
from nanoeemllm.border.files import make_folder, read_json, write_aside
from nanoeemllm.border.plot import line_chart
from nanoeemllm.border.table import print_table
from nanoeemllm.border.typed import read_typed
from nanoeemllm.config import PRESETS, ModelConfig, UserError, VisualPath
from nanoeemllm.data import cost
from nanoeemllm.evaluation import evaluate_rows
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.toy.backbones import make_backbones, tiny_config, tiny_tokenizer
from nanoeemllm.toy.world import WorldConfig, exam
from nanoeemllm.weights.folder import load
from nanoeemllm.weights.initialize import initialize

STEPS = {"pretrain": 300, "finetune": 800}
BATCH, QUESTIONS = 16, 700
SETTINGS = {"steps": [*STEPS.values()], "batch_size": BATCH, "questions": QUESTIONS}
ASSETS = Path(nanoeemllm.__file__).parent / "assets"
SCRIPT = ASSETS.parents[1] / "train.py"


class Run(NamedTuple):
    """A model that is trained, and how it is scored."""
    path: str                       # what follows --visual-path
    scored_path: str = ""           # another one that reads the trained weights; "": as trained
    size: int = 64                  # pixels a side
    scored_size: int = 0            # 0: as trained
    share: float = 1.0              # of the training steps; no pair is seen twice
    seed: int = 0

    @property
    def name(self) -> str:
        """In the results file. The first word names the folder of the trained model."""
        path = self.path.replace("--", "").replace(" ", "_")
        name = f"{path}_{self.size}px_seed{self.seed}"
        if self.share != 1:
            name += f"_{self.share:g}"
        if self.scored_path:
            name += " as " + self.scored_path.replace("--composite-layers ", "").replace(",", "-")
        return name + (f" at {self.scored_size}px" if self.scored_size else "")


PATHS = {
    "llava": {"path": "llava"},
    "eemllm": {"path": "eemllm"},
    "naavit": {"path": "naavit"},
    "saisa": {"path": "saisa"},
    "yopo": {"path": "yopo --last-visual-layer 2"},
    "flamingo": {"path": "flamingo --every 1"},
    "eemllm-f": {"path": "llava", "scored_path": "eemllm-f --composite-layers 1,2"},
}
ALIGNERS = {
    "none": {"path": "eemllm --aligner="},
    "V O": {"path": "eemllm --aligner=vo"},
    "V FFN": {"path": "eemllm --aligner=vf"},
    "O FFN": {"path": "eemllm --aligner=of"},
    "V O FFN": {"path": "eemllm"},
}
COMPOSITE = {
    "0 of 3 layers": {"path": "llava"},
    "1 of 3 layers": {"path": "llava", "scored_path": "eemllm-f --composite-layers 2"},
    "2 of 3 layers": {"path": "llava", "scored_path": "eemllm-f --composite-layers 1,2"},
    "3 of 3 layers": {"path": "llava", "scored_path": "eemllm-f --composite-layers 0,1,2"},
}
SHARES = {f"{share:g} of the pairs": {"share": share} for share in (0.125, 0.25, 0.5, 1.0)}


def runs_of(rows: dict, columns: dict) -> dict:
    """(row, column) -> the run, of seed 0, with the settings of both"""
    places = itertools.product(rows, columns)
    return {(row, column): Run(**rows[row], **columns[column]) for row, column in places}


TABLES = {
    "paths": runs_of(PATHS, {"64 visual tokens": {}, "256 visual tokens": {"size": 128}}),
    "aligner": runs_of(ALIGNERS, {"64 visual tokens, as trained": {},
                                  "256, not trained": {"scored_size": 128}}),
    "composite": runs_of(COMPOSITE, {"64 visual tokens": {}}),
    "data": runs_of(SHARES, {"eemllm": PATHS["eemllm"], "flamingo": PATHS["flamingo"]}),
}


# ---- training and scoring ----

def train(run: Run, out: Path) -> Path:
    """Both stages, by train.py, from backbones of the same image size. Returns the model folder.
    Stopped by Ctrl-C, it goes on from train.py's checkpoint the next time."""
    folder, model = out / run.name.split()[0], out / f"backbone-{run.size}"
    make_backbones(model, WorldConfig(run.size))
    for stage, steps in STEPS.items():
        flags = (f"--stage {stage} --resume --device cpu --seed {run.seed} "
                 f"--picture-size {run.size} --batch-size {BATCH} "
                 f"--steps {max(1, round(steps * run.share))} --visual-path {run.path}")
        command = [sys.executable, SCRIPT, "--init", model, "--out", folder, *flags.split()]
        child = subprocess.Popen(command)
        try:
            child.wait()
        except KeyboardInterrupt:           # the child gets it, too, and writes a checkpoint
            child.wait()
            raise
        if child.returncode:
            raise UserError(f"{folder}: train.py ended with exit code {child.returncode}")
        model = folder / stage
        if not (model / "config.json").exists():                # it alone was stopped
            raise KeyboardInterrupt
    return model


def visual_path_of(run: Run) -> VisualPath:
    parser = Parser("")
    paths.add_flags(parser)
    args = parser.parse_args(["--visual-path", *(run.scored_path or run.path).split()])
    return paths.from_args(args, PRESETS["tiny"])


def score(run: Run, folder: Path) -> float:
    """Exact match on held-out scenes, in percent."""
    model = load(folder, "cpu", visual_path=visual_path_of(run)).eval()
    if run.scored_size:
        stretch(model, run.scored_size)
    rows = exam(WorldConfig(run.scored_size or run.size), "held-out", QUESTIONS)
    return evaluate_rows(model, rows)["overall"]["accuracy"]


def stretch(model: EEMLLM, size: int):
    """Interpolates the position table for larger images, as is usual where none was trained."""
    table, old = model.vision.position_embedding, model.config.vision
    new = replace(old, image_size=size, min_image_size=size)
    grid = table.weight.T.unflatten(1, (old.grid_size, old.grid_size))          # (C, side, side)
    grid = F.interpolate(grid[None], (new.grid_size, new.grid_size), mode="bicubic")[0]
    table.weight = torch.nn.Parameter(grid.flatten(1).T.contiguous())
    model.vision.config = new
    model.config = replace(model.config, vision=new)


# ---- costs ----

def first_question(run: Run) -> tuple[ModelConfig, list[int], Image.Image]:
    """The prefill that is counted and timed."""
    world = WorldConfig(run.size)
    config = replace(tiny_config(world), visual_path=visual_path_of(run))
    row = exam(world, "held-out", 1)[0]
    ids = encode_prompt(tiny_tokenizer(config), "<image>\n" + row["question"],
                        config.chat_template)
    return config, ids, row["image"]


@functools.cache
def operations(run: Run) -> float:
    """Of the language model; attention's as the papers count it."""
    config, ids, _ = first_question(run)
    sample = len(ids) - 1, [config.vision.grid_size ** 2]           # less the image
    return cost.operations(config, [sample], rectangles=True)[0]


@torch.inference_mode()
def time_prefills(runs: dict, turns: int = 50) -> dict:
    """Milliseconds from an image and a question to the first token's logits, with random weights:
    the median of `turns`. Runs take turns, so that other work on the machine slows all alike."""
    questions = {}
    for place, run in runs.items():
        config, *question = first_question(run)
        questions[place] = EEMLLM(config), *question
        initialize(questions[place][0])
    times = {place: [] for place in runs}
    for _ in range(turns + 2):
        for place, (model, ids, image) in questions.items():
            start = time.perf_counter()
            model.logits(ids, [image])
            times[place].append(1000 * (time.perf_counter() - start))
    return {place: round(statistics.median(found[2:]), 2) for place, found in times.items()}


# ---- results ----

def read_results(file: Path) -> dict:
    """{"settings", "runs": {name: {"accuracy"}}, "prefill_ms": {"row, column": milliseconds}}"""
    data = read_json(file)
    try:
        numbers = data["prefill_ms"] | {name: run["accuracy"] for name, run in data["runs"].items()}
        is_ours = data["settings"] == SETTINGS
    except (KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{file} does not hold accuracies and times of {SETTINGS}: give another "
                        "--results")
    for name, number in numbers.items():
        read_typed(float, number, f"{file}: {name}", {"least": 0})
    return data


def add_results(file: Path, part: str, found: dict) -> dict:
    """Adds to what other commands may have added meanwhile; returns all there is."""
    make_folder(file.parent)
    folder = os.open(file.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)          # another command waits here
    try:
        data = {"settings": SETTINGS, "runs": {}, "prefill_ms": {}}
        if os.path.lexists(file):
            data = read_results(file)
        data[part] |= found
        write_aside(file, json.dumps(data, indent=1).encode())
    finally:
        os.close(folder)
    return data


def run_missing(tables: list[str], seeds: int, out: Path, file: Path):
    results = add_results(file, "runs", {})     # what cannot be written is told before work
    make_folder(out)
    for seed, table in itertools.product(range(seeds), tables):
        for run in TABLES[table].values():
            run = run._replace(seed=seed)
            if run.name not in results["runs"]:
                print(f"\n{run.name}", flush=True)
                accuracy = score(run, train(run, out))
                results = add_results(file, "runs", {run.name: {"accuracy": accuracy}})
    if "paths" in tables:
        untimed = {", ".join(place): run for place, run in TABLES["paths"].items()
                   if ", ".join(place) not in results["prefill_ms"]}
        add_results(file, "prefill_ms", time_prefills(untimed))


# ---- tables ----

def accuracies(results: dict, run: Run, seeds: int) -> list:
    names = [run._replace(seed=seed).name for seed in range(seeds)]
    return [results["runs"][name]["accuracy"] for name in names if name in results["runs"]]


def draw(table: str, results: dict, seeds: int) -> list[dict[str, str]]:
    """Its rows; accuracy as mean and half the range."""
    rows = {}
    for (row, column), run in TABLES[table].items():
        found = accuracies(results, run, seeds)
        accuracy = f"{statistics.mean(found):.1f}" if found else "not run"
        if len(found) > 1:
            accuracy += f" ± {(max(found) - min(found)) / 2:.1f}"
        cells = rows.setdefault(row, {table: row})
        cells[f"{column}: accuracy"] = accuracy
        if table == "paths":
            share = operations(run) / operations(TABLES["paths"]["llava", column])
            ms = results["prefill_ms"].get(f"{row}, {column}")
            cells[f"{column}: operations : llava"] = f"{share:.2f}"
            cells[f"{column}: prefill, ms"] = f"{ms:.1f}" if ms else "not run"
    return list(rows.values())


def plot(results: dict, seeds: int, file: Path):
    """Accuracy against operations: a line a visual path, a dot a number of visual tokens."""
    series = {}
    for (row, _), run in TABLES["paths"].items():
        found = accuracies(results, run, seeds)
        if found:
            point = operations(run) / 1e6, statistics.mean(found)
            series.setdefault(row, []).append(point)
    if series:
        line_chart(file, series, "64 and 256 visual tokens", log_x=True, y_label="accuracy, %",
                   x_label="10^6 operations of the language model in a prefill")


def main(argv: list | None = None):
    parser = Parser(__doc__, "python -m nanoeemllm.toy.tables")
    add = parser.add_argument
    add("table", choices=(*TABLES, "all"))
    add("--out", type=Path, default=Path("out/tables"), metavar="DIR", help="(out/tables)")
    add("--results", type=Path, default=ASSETS / "tables.json", metavar="FILE")
    add("--seeds", type=positive(int), default=3, help="(3)")
    add("--draw", action="store_true", help="print what there is, train nothing")
    args = parser.parse_args(argv)
    tables = [*TABLES] if args.table == "all" else [args.table]
    try:
        if not args.draw:
            run_missing(tables, args.seeds, args.out, args.results)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
    results = read_results(args.results)
    for table in tables:
        print()
        print_table(draw(table, results, args.seeds))
    if "paths" in tables:
        plot(results, args.seeds, args.results.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
