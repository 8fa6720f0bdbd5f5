"""The papers' tables on the tiny world: trained, scored, printed as mean and spread over seeds.

    python -m nanoeemllm.toy.tables paths       visual paths: accuracy, operations, prefill time
    python -m nanoeemllm.toy.tables aligner     what the aligner needs, at two sizes of images
    python -m nanoeemllm.toy.tables composite   eemllm-f by its number of composite layers
    python -m nanoeemllm.toy.tables data        accuracy by the number of training pairs

What the results file lacks is trained (by train.py), scored and added to it, one run after another.
Stop it when you like: the same command goes on. --draw prints what there is and trains nothing.
"""

import contextlib
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

import nanoeemllm
from nanoeemllm import paths
from nanoeemllm.border.command import Parser, positive, run_command
from nanoeemllm.border.files import read_json, write_aside
from nanoeemllm.border.plot import line_chart
from nanoeemllm.config import PRESETS, UserError
from nanoeemllm.evaluation import evaluate_rows
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.toy.backbones import make_backbones, tiny_config, tiny_tokenizer
from nanoeemllm.toy.world import WorldConfig, exam
from nanoeemllm.training import cost
from nanoeemllm.training.initialize import initialize
from nanoeemllm.weights.folder import load

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
    def folder(self) -> str:
        name = f"{self.path}_{self.size}px_seed{self.seed}".replace("--", "").replace(" ", "_")
        return name if self.share == 1 else f"{name}_{self.share:g}"

    @property
    def name(self) -> str:
        """In the results file."""
        name = self.folder
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
ROWS_AND_COLUMNS = {
    "paths": (PATHS, {"64 visual tokens": {}, "256 visual tokens": {"size": 128}}),
    "aligner": (ALIGNERS, {"64 visual tokens, as trained": {},
                           "256, not trained": {"scored_size": 128}}),
    "composite": (COMPOSITE, {"64 visual tokens": {}}),
    "data": (SHARES, {name: PATHS[name] for name in ("eemllm", "flamingo")}),
}
# table -> (row, column) -> the run, of seed 0, that gives its accuracy
TABLES = {}
for _table, (_rows, _columns) in ROWS_AND_COLUMNS.items():
    _places = itertools.product(_rows, _columns)
    TABLES[_table] = {(r, c): Run(**_rows[r], **_columns[c]) for r, c in _places}


# ---- training and scoring ----

def train(run: Run, folder: Path) -> Path:
    """Both stages, by train.py, from backbones of the same image size. Returns the model folder.
    Stopped by Ctrl-C, it goes on from train.py's checkpoint the next time."""
    out, model = folder / run.folder, folder / f"backbone-{run.size}"
    with locked(folder):
        make_backbones(model, WorldConfig(run.size))
    with locked(out) as lock:
        for stage, steps in STEPS.items():
            steps = max(1, round(steps * run.share))
            flags = (f"--stage {stage} --resume --device cpu --seed {run.seed} --batch-size {BATCH} "
                     f"--picture-size {run.size} --steps {steps} --visual-path {run.path}")
            command = [sys.executable, SCRIPT, "--init", model, "--out", out, *flags.split()]
            # The child has the lock as well, in case that this process ends before it.
            child = subprocess.Popen(command, pass_fds=[lock])
            try:
                child.wait()
            except KeyboardInterrupt:           # the child gets it, too, and writes a checkpoint
                child.wait()
                raise
            model = out / stage
            if child.returncode or not (model / "config.json").exists():
                raise UserError(f"{run.folder}: train.py ended with exit code {child.returncode} "
                                "before the end of the stage; the same command goes on")
    return model


@contextlib.contextmanager
def locked(folder: Path):
    """One command at a time in this folder; another one waits here. Gives the file descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def score(run: Run, folder: Path) -> float:
    """Exact match on held-out scenes, in percent."""
    model = load(folder, "cpu", visual_path=visual_path_of(run)).eval()
    if run.scored_size:
        stretch(model, run.scored_size)
    rows = exam(WorldConfig(run.scored_size or run.size), "held-out", QUESTIONS)
    return evaluate_rows(model, rows)["overall"]["accuracy"]


def visual_path_of(run: Run):
    parser = Parser("")
    paths.add_flags(parser)
    flags = run.scored_path or run.path
    args = parser.parse_args(["--visual-path", *flags.split()])
    return paths.from_args(args, PRESETS["tiny"])


def stretch(model: EEMLLM, size: int):
    """Interpolates the position table for larger images, as is usual where none was trained."""
    table, side = model.vision.position_embedding, model.config.vision.grid_size
    vision = replace(model.config.vision, image_size=size, min_image_size=size)
    grid = table.weight.T.unflatten(1, (side, side))[None]                      # (1, C, side, side)
    grid = F.interpolate(grid, (vision.grid_size, vision.grid_size), mode="bicubic")
    table.weight = torch.nn.Parameter(grid[0].flatten(1).T.contiguous())
    model.vision.config, model.config = vision, replace(model.config, vision=vision)


# ---- costs ----

def first_question(run: Run):
    """(config, tokenizer, ids, image) of a prefill under the run's visual path"""
    world = WorldConfig(run.size)
    config = replace(tiny_config(world), visual_path=visual_path_of(run))
    tokenizer, row = tiny_tokenizer(config), exam(world, "held-out", 1)[0]
    ids = encode_prompt(tokenizer, "<image>\n" + row["question"], config.chat_template)
    return config, tokenizer, ids, row["image"]


@functools.cache
def operations(run: Run) -> float:
    """Of the language model, in a prefill of one question; attention's as the papers count it."""
    config, _, ids, _ = first_question(run)
    sample = (len(ids) - 1, [config.vision.grid_size ** 2])   # less the image
    return cost.operations(config, [sample], rectangles=True)[0]


@torch.inference_mode()
def time_prefills(runs: dict[str, Run], turns: int = 50) -> dict[str, float]:
    """Milliseconds from an image and a question to the first token's logits, with random weights:
    the median of `turns`. Runs take turns, so that other work on the machine slows all alike."""
    prompts, times = {}, {place: [] for place in runs}
    for place, run in runs.items():
        config, tokenizer, ids, image = first_question(run)
        model = EEMLLM(config, tokenizer)
        initialize(model)
        prompts[place] = model, ids, image
    for _ in range(turns + 2):
        for place, (model, ids, image) in prompts.items():
            start = time.perf_counter()
            model.logits(ids, [image])
            times[place].append(1000 * (time.perf_counter() - start))
    return {place: round(statistics.median(found[2:]), 2) for place, found in times.items()}


# ---- results ----

def read_results(file: Path) -> dict:
    """{"settings", "runs": {name: {"accuracy"}}, "prefill_ms": {"row, column": milliseconds}}"""
    if not file.exists():
        return {"settings": SETTINGS, "runs": {}, "prefill_ms": {}}
    data = read_json(file)
    if data.get("settings") != SETTINGS:
        raise UserError(f"{file} holds results of {data.get('settings')}, not {SETTINGS}: "
                        "give another --results")
    try:
        numbers = [run["accuracy"] for run in data["runs"].values()]
        numbers += data["prefill_ms"].values()
    except (KeyError, TypeError, AttributeError):
        numbers = [None]
    if not all(type(x) in (int, float) and 0 <= x < 1e9 for x in numbers):
        raise UserError(f"{file}: each of runs must have an accuracy and each of prefill_ms be a "
                        "time, as numbers: mend it, or give another --results")
    return data


def add_results(file: Path, part: str, found: dict) -> dict:
    """Adds to what other commands may have added meanwhile; returns all there is."""
    with locked(file.parent):
        data = read_results(file)
        data[part] |= found
        write_aside(file, json.dumps(data, indent=1).encode())
    return data


def run_missing(tables: list[str], seeds: int, out: Path, file: Path):
    results = add_results(file, "runs", {})     # refuses a file that cannot be written before work
    for seed, table in itertools.product(range(seeds), tables):
        for run in TABLES[table].values():
            run = run._replace(seed=seed)
            if run.name not in results["runs"]:
                print(f"\n{run.name}", flush=True)
                accuracy = score(run, train(run, out))
                results = add_results(file, "runs", {run.name: {"accuracy": accuracy}})
    if "paths" in tables:
        untimed = {", ".join(place): run for place, run in TABLES["paths"].items()}
        for place in results["prefill_ms"]:
            untimed.pop(place, None)
        add_results(file, "prefill_ms", time_prefills(untimed))


# ---- tables ----

def accuracies(results: dict, run: Run, seeds: int) -> list[float]:
    names = [run._replace(seed=seed).name for seed in range(seeds)]
    return [results["runs"][name]["accuracy"] for name in names if name in results["runs"]]


def draw(table: str, results: dict, seeds: int) -> list[str]:
    """Lines of Markdown; accuracy as mean and half the range."""
    header, rows = {"": ""}, {}
    for (row, column), run in TABLES[table].items():
        found = accuracies(results, run, seeds)
        cell = f"{statistics.mean(found):.1f}" if found else "not run"
        if len(found) > 1:
            cell += f" ± {(max(found) - min(found)) / 2:.1f}"
        header[column] = f"{column}: accuracy"
        if table == "paths":
            header[column] += " | operations : llava | prefill, ms"
            share = operations(run) / operations(TABLES["paths"]["llava", column])
            ms = results["prefill_ms"].get(f"{row}, {column}")
            cell += f" | {share:.2f} | " + (f"{ms:.1f}" if ms else "not run")
        rows.setdefault(row, [row]).append(cell)
    first = " | ".join(header.values())
    rule = " | ".join(["---"] * len(first.split(" | ")))
    return [f"| {line} |" for line in (first, rule, *map(" | ".join, rows.values()))]


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


def main(argv: list[str] | None = None):
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
        print(f"\n{table}\n", *draw(table, results, args.seeds), sep="\n")
    if "paths" in tables:
        plot(results, args.seeds, args.results.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
