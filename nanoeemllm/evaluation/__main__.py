"""Benchmarks: a file of questions in, a score out.

    python -m nanoeemllm.evaluation --weights DIR --tsv MMBench_DEV_EN_V11.tsv
    torchrun --nproc_per_node=8 -m nanoeemllm.evaluation ...       its rows split over 8 processes

Answers are written to WEIGHTS/eval/NAME as they come. The same command continues an interrupted
run, on any number of processes, and ends with a table and results.json. Rows that cannot be asked
are named and left out of the score.
"""

import argparse
import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from nanoeemllm.border.command import Parser, positive, processes, run_command
from nanoeemllm.border.files import quoted, write_aside
from nanoeemllm.config import ModelConfig, UserError, VisualPath
from nanoeemllm.evaluation.benchmark import TSV, detect, read_answers, write_answers
from nanoeemllm.evaluation.load import add_model_flags, load_model
from nanoeemllm.evaluation.metrics import GROUPS, METRICS, summarize
from nanoeemllm.evaluation.questions import answers, prepare_all, table
from nanoeemllm.paths import from_args
from nanoeemllm.weights.folder import read_config


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m nanoeemllm.evaluation")
    add = parser.add_argument
    add("--tsv", type=Path, required=True, metavar="FILE", help="benchmark file")
    add("--metric", choices=METRICS, help="how answers are scored (found from the file)")
    add("--images", type=Path, metavar="DIR", help="the folder of image_path (the file's own)")
    add("--out", type=Path, metavar="DIR", help="answers and results (WEIGHTS/eval/NAME)")
    add("--limit", type=positive(int), metavar="N", help="the first N rows alone")
    add("--max-new-tokens", type=positive(int), default=128, help="longest answer (128)")
    add("--batch-tokens", type=positive(int), default=16384,
        help="tokens asked together: text, visual and new (16384)")
    add("--calibrate", action="store_true",
        help="no scores: choose what the visual path prunes, and write it to --weights")
    add_model_flags(parser, required=True, help="model folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse(argv)
    config = read_config(args.weights)
    path = from_args(args, config)
    rank, world, _ = processes()
    tsv = TSV(args.tsv, args.limit, args.images)
    if not len(tsv):
        raise UserError(f"{quoted(args.tsv)} has no rows under its first line")
    metric = args.metric or detect(args.tsv.stem, tsv.columns)
    if args.calibrate:
        return calibrate(args, config, path, tsv, metric)
    settings = {"weights": str(args.weights.resolve()), "tsv": str(args.tsv.resolve()),
                "weights_written": (args.weights / "config.json").stat().st_mtime,
                "tsv_written": args.tsv.stat().st_mtime, "metric": metric, "visual_path": str(path),
                "max_new_tokens": args.max_new_tokens, "dtype": args.dtype or "as stored"}
    name = args.tsv.stem + (f"-{args.visual_path}" if args.visual_path else "")
    folder = args.out or args.weights / "eval" / name
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))

    done = read_answers(folder, settings)
    # what was bad may be mended by now
    todo = [i for i in range(len(tsv)) if "bad" in done.get(i + 1, {"bad": ""})]
    if done and rank == 0:
        print(f"{len(tsv) - len(todo)} of {len(tsv)} rows are answered in {folder} already")
    todo = [i for i in todo if i % world == rank]
    if todo:
        records = answers(load_model(args, path), map(tsv.__getitem__, todo), metric,
                          args.max_new_tokens, args.batch_tokens)
        records = write_answers(folder / f"predictions-{rank}.jsonl", settings, records)
        for _ in tqdm(records, f"{args.tsv.stem} ({metric})", len(todo), disable=rank > 0 or None):
            pass
    if world > 1:
        dist.barrier()                                # until all have answered
        dist.destroy_process_group()
    if rank == 0:
        done = read_answers(folder, settings)
        records = [done[i + 1] for i in range(len(tsv))]
        report(args.tsv.name, records, settings, folder / "results.json")


def calibrate(args, config: ModelConfig, path: VisualPath, tsv: TSV, metric: str):
    """Has the visual path choose what it prunes on these rows, and writes that to the model."""
    own = config.visual_path.name
    model = load_model(args, config.path_named(path.calibrated_as or own))

    def prompts() -> Iterator[tuple[list[int], list]]:
        rows = tqdm(map(tsv.__getitem__, range(len(tsv))), "calibration", len(tsv), disable=None)
        for question in prepare_all(model, rows, metric, 0):
            if isinstance(question, dict):
                print(f"row {question['row']} is left out: {question['bad']}")
            else:
                yield question.ids, question.images

    path, lines = path.calibrate(model, prompts())
    others = {other.name: other for other in (*config.other_paths, path) if other.name != own}
    config = dataclasses.replace(config, other_paths=tuple(others.values()),
                                 visual_path=path if path.name == own else config.visual_path)
    file = args.weights / "config.json"
    write_aside(file, json.dumps(config.to_dict(), indent=2).encode())
    print(*lines, f"written to {file}", sep="\n")


def report(name: str, records: list[dict], settings: dict, file: Path):
    """Prints the table, and what was left out of it or could not be read; writes results.json."""
    result = summarize(settings["metric"], records)
    bad = [record for record in records if "bad" in record]
    if len(bad) == len(records):
        raise UserError(f"none of {len(records)} rows of {name} could be asked; the first: "
                        f"{bad[0]['bad']}")
    lines = {"overall": result["overall"]}
    for column in GROUPS:
        lines |= {f"{column}: {group}": line for group, line in result.get(column, {}).items()}
    print(f"\n{name}: {settings['metric']} over {result['rows']} of {len(records)} rows\n")
    print(table(lines))
    unread = [record | {"bad": repr(record["prediction"][:60])} for record in records
              if record.get("read", "") is None]
    for what, some in (("rows could not be asked and are not in the score", bad),
                       ("answers could not be read and score 0", unread)):
        if some:
            print(f"\n{len(some)} {what}:")
        for record in some[:10]:
            print(f"  row {record['row']} (index {record['index']}): {record['bad']}")
    results = result | {"settings": settings, "bad_rows": bad}
    write_aside(file, json.dumps(results, indent=1, ensure_ascii=False).encode(errors="replace"))
    print(f"\n{file}")


if __name__ == "__main__":
    run_command(main, goes_on=True)              # results are written, whoever reads the output
