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
from nanoeemllm.data import cost
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.weights.folder import load

# A table's rows -> what follows --visual-path; then, where it is another one, the visual path that
# reads the trained weights when they are scored.
PATHS = {
    "llava": ("llava",),
    "eemllm": ("eemllm",),
    "naavit": ("naavit",),
    "saisa": ("saisa",),
    "yopo": ("yopo --last-visual-layer 2",),
    "flamingo": ("flamingo --every 1",),
    "eemllm-f": ("llava", "eemllm-f --composite-layers 1,2"),
}
ALIGNERS = {
    "none": "eemllm --aligner=",
    "V O": "eemllm --aligner=vo",
    "V FFN": "eemllm --aligner=vf",
    "O FFN": "eemllm --aligner=of",
    "V O FFN": "eemllm",
}
COMPOSITE = {
    "0 of 3 layers": ("llava",),
    "1 of 3 layers": ("llava", "eemllm-f --composite-layers 2"),
    "2 of 3 layers": ("llava", "eemllm-f --composite-layers 1,2"),
    "3 of 3 layers": ("llava", "eemllm-f --composite-layers 0,1,2"),
}
STEPS = {"pretrain": 300, "finetune": 800}
BATCH, QUESTIONS = 16, 700
SETTINGS = {"steps": [*STEPS.values()], "batch_size": BATCH, "questions": QUESTIONS}
ASSETS = Path(nanoeemllm.__file__).parent / "assets"
SCRIPT = ASSETS.parents[1] / "train.py"


class Run(NamedTuple):
    """A model that is trained, and how it is scored."""
    path: str
    scored_path: str = ""           # "": as trained
    size: int = 64                  # pixels a side
    scored_size: int = 0            # 0: as trained
    share: float = 1.0              # of the training steps; no pair is seen twice
    seed: int = 0

    @property
    def folder(self) -> str:
        path = self.path.replace("--", "").replace(" ", "_")
        share = f"_{self.share:g}" if self.share != 1 else ""
        return f"{path}_{self.size}px_seed{self.seed}{share}"

    @property
    def name(self) -> str:
        """In the results file."""
        path = self.scored_path.replace("--composite-layers ", "").replace(",", "-")
        size = f" at {self.scored_size}px" if self.scored_size else ""
        return self.folder + (f" as {path}" if path else "") + size


def _tables() -> dict[str, dict[tuple[str, str], Run]]:
    """table -> (row, column) -> the run, of seed 0, that gives its accuracy"""
    systems, aligner, composite, data = {}, {}, {}, {}
    for size, column in ((64, "64 visual tokens"), (128, "256 visual tokens")):
        for row, path in PATHS.items():
            systems[row, column] = Run(*path)._replace(size=size)
    for row, path in ALIGNERS.items():
        aligner[row, "64 visual tokens, as trained"] = Run(path)
        aligner[row, "256, not trained"] = Run(path, scored_size=128)
    for row, path in COMPOSITE.items():
        composite[row, "64 visual tokens"] = Run(*path)
    for share in (0.125, 0.25, 0.5, 1.0):
        for column in ("eemllm", "flamingo"):
            data[f"{share:g} of the pairs", column] = Run(*PATHS[column], share=share)
    return {"paths": systems, "aligner": aligner, "composite": composite, "data": data}


TABLES = _tables()


# ---- training and scoring ----

def train(run: Run, folder: Path) -> Path:
    """Both stages, by train.py, from backbones of the same image size. Returns the model folder.

    Raises KeyboardInterrupt when it was stopped; the next time it goes on from its checkpoint.
    """
    out, model = folder / run.folder, folder / f"backbone-{run.size}"
    with locked(folder):
        make_backbones(model, WorldConfig(run.size))
    with locked(out) as lock:
        for stage, steps in STEPS.items():
            command = f"--stage {stage} --resume --device cpu --seed {run.seed}"
            command += f" --picture-size {run.size} --batch-size {BATCH}"
            command += f" --steps {max(1, round(steps * run.share))} --visual-path {run.path}"
            command = [sys.executable, SCRIPT, "--init", model, "--out", out, *command.split()]
            # The child has the lock as well, in case that this process is killed before it.
            child, stopped = subprocess.Popen(command, pass_fds=[lock]), False
            while child.poll() is None:
                try:
                    child.wait()
                except KeyboardInterrupt:       # the child gets it, too, and writes a checkpoint
                    stopped = True
            model = out / stage
            if stopped or child.returncode == 0 and not (model / "config.json").exists():
                raise KeyboardInterrupt
            if child.returncode:
                raise UserError(f"{run.folder}: train.py ended with exit code {child.returncode}")
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
    models, times = {}, {place: [] for place in runs}
    for place, run in runs.items():
        config, tokenizer, ids, image = first_question(run)
        model = EEMLLM(config, tokenizer)
        initialize(model)
        models[place] = model, ids, image
    for _ in range(turns + 2):
        for place, (model, ids, image) in models.items():
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
        good = all(type(x) in (int, float) and 0 <= x < 1e9 for x in numbers)       # NaN is not
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{file}: each of runs must have an accuracy and each of prefill_ms be a "
                        "time, as numbers: mend it, or give another --results")
    return data


def add_results(file: Path, part: str = "runs", found: dict = {}) -> dict:
    """Adds to what other commands may have added meanwhile; returns all there is."""
    with locked(file.parent):
        data = read_results(file)
        data[part] |= found
        write_aside(file, json.dumps(data, indent=1).encode())
    return data


# ---- tables ----

def accuracies(results: dict, run: Run, seeds: int) -> list[float]:
    names = [run._replace(seed=seed).name for seed in range(seeds)]
    return [results["runs"][name]["accuracy"] for name in names if name in results["runs"]]


def draw(table: str, results: dict, seeds: int) -> list[str]:
    """Lines of Markdown; accuracy as mean and half the range."""
    runs = TABLES[table]
    costs = " | operations : llava | prefill, ms" if table == "paths" else ""
    columns = dict.fromkeys(column for _, column in runs)
    header = "| | " + " | ".join(f"{column}: accuracy{costs}" for column in columns) + " |"
    lines = {row: f"| {row} |" for row, _ in runs}
    for (row, column), run in runs.items():
        found = accuracies(results, run, seeds)
        cell = f" {statistics.mean(found):.1f}" if found else " not run"
        if len(found) > 1:
            cell += f" ± {(max(found) - min(found)) / 2:.1f}"
        if costs:
            ms = results["prefill_ms"].get(f"{row}, {column}")
            cell += f" | {operations(run) / operations(runs['llava', column]):.2f} | "
            cell += f"{ms:.1f}" if ms else "not run"
        lines[row] += cell + " |"
    return [header, "|---" * (header.count("|") - 1) + "|", *lines.values()]


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
    tables = TABLES if args.table == "all" else (args.table,)
    results = read_results(args.results)
    if not args.draw:
        try:
            run_missing(tables, args)
        except KeyboardInterrupt:
            print("stopped; the same command goes on")
        results = read_results(args.results)
    for table in tables:
        print(f"\n{table}\n", *draw(table, results, args.seeds), sep="\n")
    if "paths" in tables:
        plot(results, args.seeds, args.results.with_suffix(".png"))


def run_missing(tables, args):
    results = add_results(args.results)         # refuses a file that cannot be written before work
    for seed in range(args.seeds):
        for run in [run for table in tables for run in TABLES[table].values()]:
            run = run._replace(seed=seed)
            if run.name not in results["runs"]:
                print(f"\n{run.name}", flush=True)
                found = {run.name: {"accuracy": score(run, train(run, args.out))}}
                results = add_results(args.results, "runs", found)
    if "paths" in tables:
        missing = {}
        for place, run in TABLES["paths"].items():
            if ", ".join(place) not in results["prefill_ms"]:
                missing[", ".join(place)] = run
        add_results(args.results, "prefill_ms", time_prefills(missing))


if __name__ == "__main__":
    run_command(main)
