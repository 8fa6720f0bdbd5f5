"""Benchmarks: a file of questions in, a score out.

    python -m nanoeemllm.evaluate --weights DIR --tsv MMBench_DEV_EN_V11.tsv          TSV as VLMEvalKit passes it around
    torchrun --nproc_per_node=8 -m nanoeemllm.evaluate --weights DIR --tsv FILE       its rows split over 8 processes

A TSV has a row a question: index, image (base64, a list of them, or the index of the row that holds the picture) or
image_path, question, options A, B, ..., hint, answer, category, l2-category, split. What each benchmark's score means
is in metrics.py. Answers are written as they come, to DIR/eval/NAME/predictions-*.jsonl; the same command goes on
where it was stopped, on any number of processes, and ends with a table and results.json. Rows that cannot be asked
are named and left out of the score, which says over how many rows it is.

In Python, rows are dictionaries with the same keys, "image" a PIL picture, and `evaluate_rows` is the same scorer.
"""

import argparse
import base64
import dataclasses
import datetime
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from nanoeemllm.benchmark import TSV, as_list, detect, read_answers, write_answers
from nanoeemllm.calibrate import FIRST, choose_heads, measure
from nanoeemllm.checkpoint import load, read_json
from nanoeemllm.command_line import (Parser, add_visual_path_flags, device_from, positive, run_command,
                                     visual_path_from)
from nanoeemllm.config import ModelConfig, UserError, VisualPathConfig
from nanoeemllm.data import patch_grid
from nanoeemllm.image import load_image
from nanoeemllm.metrics import CHOICE, GROUPS, METRICS, YES_NO, grade, options_of, summarize
from nanoeemllm.prompt import IMAGE_TEXT, encode_prompt
from nanoeemllm.run import write_aside

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
WORD = "Answer the question using a single word or phrase."


# ---- a row's question ----

def prompt_of(row: dict, metric: str, pictures: list[Image.Image]) -> tuple[str, list[Image.Image]]:
    """The human's words as LLaVA-1.5's evaluation puts them, each <image> a picture, and the pictures in that order.

    A question may say where its pictures stand, as MMMU's do ("<image 1>"); the others stand before it.
    """
    text = row["question"]
    if row.get("hint"):
        text = row["hint"] + "\n" + text
    options = options_of(row) if metric in CHOICE else {}
    text += "".join(f"\n{letter}. {option}" for letter, option in options.items())
    if options:
        text += "\n" + (LETTER_CN if re.search(r"[\u4e00-\u9fff]", text) else LETTER)
    elif metric in YES_NO:                                          # MME's own ending gives way to LLaVA's
        text = re.sub(r"\s*Please answer yes or no\.\s*$", "", text) + "\n" + WORD
    elif metric in CHOICE + ("vqa", "anls", "relaxed"):
        text += "\n" + WORD
    placed = []

    def place(found):
        number = int(found[1] or len(placed) + 1) - 1
        if number in placed or not 0 <= number < len(pictures):
            return found[0].strip("<>")                             # a word about a picture, not the picture
        placed.append(number)
        return IMAGE_TEXT

    text = re.sub(r"<image(?: (\d{1,3}))?>", place, text)
    first = [number for number in range(len(pictures)) if number not in placed]
    return (IMAGE_TEXT + "\n") * len(first) + text, [pictures[number] for number in first + placed]


def pictures_of(row: dict) -> list[Image.Image]:
    """Raises UserError where one cannot be read."""
    image = row.get("image")
    if not image:
        paths = row.get("image_path") or []
        return [load_image(path) for path in ([paths] if isinstance(paths, str) else paths)]
    if not isinstance(image, str):
        return image if isinstance(image, list) else [image]
    try:
        files = [base64.b64decode("".join(part.split()), validate=True) for part in as_list(image)]
    except ValueError as error:
        raise UserError(f"the picture is not base64: {error}") from None
    return [load_image(io.BytesIO(file)) for file in files]


def check_row(row: dict, metric: str):
    """Raises UserError for what can be seen without the picture."""
    if "bad" in row:
        raise UserError(row["bad"])
    if not row["question"].strip():
        raise UserError("no question")
    answer, options = row["answer"].strip(), options_of(row)
    if not any(part.strip() for part in as_list(answer)):
        raise UserError("no answer")
    if metric in CHOICE and options and answer not in options:
        raise UserError(f"the answer {answer!r} is none of the options {', '.join(options)}")
    if metric in YES_NO and answer.lower() not in ("yes", "no"):
        raise UserError(f"the answer {answer!r} is neither yes nor no")
    if metric == "circular" and not row["index"].strip().isdecimal():
        raise UserError(f"the index {row['index']!r} is no whole number, which circular evaluation counts by")
    if metric == "hallusion" and row["index"].count("_") < 3:
        raise UserError(f"the index {row['index']!r} does not end in _set_figure_question")


# ---- asking ----

class Asked(NamedTuple):
    row: dict
    ids: list[int]
    images: list[Image.Image]
    tokens: int                 # text, visual and new ones: what it costs


def prepare(model, row: dict, metric: str, max_new_tokens: int) -> Asked:
    """Raises UserError where the row cannot be asked."""
    check_row(row, metric)
    images = pictures_of(row)
    if not images:
        raise UserError("no picture")
    text, images = prompt_of(row, metric, images)
    ids = encode_prompt(model.tokenizer, text, model.config.chat_template)
    grids = [patch_grid(image, model.config.vision) for image in images]
    tokens = len(ids) - len(images) + sum(h * w for h, w in grids) + max_new_tokens
    if tokens > model.config.llama.max_position_embeddings:
        raise UserError(f"{tokens} tokens, {max_new_tokens} new ones among them, do not fit the model's context of "
                        f"{model.config.llama.max_position_embeddings}")
    row = row | {"answer": as_list(row["answer"])}
    if metric == "mme":
        row["picture"] = str(row.get("image_path") or hashlib.md5(images[0].tobytes()).hexdigest())
    return Asked(row, ids, images, tokens)


def answers(model, rows: Iterable[dict], metric: str, max_new_tokens: int = 128,
            batch_tokens: int = 16384) -> Iterator[dict]:
    """A record a row: what was asked, said, read and scored; or "bad", why it could not be asked.

    Rows are asked together up to batch_tokens: text, visual and new ones, which is what they cost; nothing is padded.
    """
    batch = []
    for number, row in enumerate(rows, 1):
        row = {"row": number} | row | {"index": str(row.get("index", number - 1))}
        try:
            asked = prepare(model, row, metric, max_new_tokens)
        except UserError as error:
            yield {"row": row["row"], "index": row.get("index", ""), "bad": str(error)}
            continue
        if batch and sum(a.tokens for a in batch) + asked.tokens > batch_tokens:
            yield from _ask(model, batch, metric, max_new_tokens)
            batch = []
        batch.append(asked)
    if batch:
        yield from _ask(model, batch, metric, max_new_tokens)


def _ask(model, batch: list[Asked], metric: str, max_new_tokens: int) -> Iterator[dict]:
    try:
        said = model.generate_batch([a.ids for a in batch], [a.images for a in batch], max_new_tokens=max_new_tokens)
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"out of memory with {len(batch)} rows of {sum(a.tokens for a in batch)} tokens: lower "
                        "--batch-tokens") from None
    for (row, *_), ids in zip(batch, said):
        prediction = model.tokenizer.decode(ids).strip()
        read, score = grade(metric, prediction, row)
        kept = {key: row[key] for key in ("row", "index", "question", "answer", "picture", *GROUPS) if row.get(key)}
        if metric in YES_NO + CHOICE:
            kept |= {"read": read, "options": len(options_of(row))}
        yield kept | {"prediction": prediction, "score": score}


def evaluate_rows(model, rows: list[dict], metric: str = "exact") -> dict:
    """Scores of questions that are in memory: metrics.summarize of the answers.

    rows: {"image": PIL picture or a list of them, "question", "answer", and if you like "category", "l2-category"}.
    """
    asked = tqdm(answers(model, rows, metric), "questions", len(rows), disable=None, leave=False)
    return summarize(metric, list(asked))


def table(lines: dict[str, dict[str, float]]) -> str:
    """label -> {column: number} as text, a line a label; numbers that are not there are left empty."""
    def text(number):
        return "" if number is None else str(number) if isinstance(number, int) else f"{number:.1f}"

    columns = list(dict.fromkeys(name for numbers in lines.values() for name in numbers))
    cells = [["", *columns]] + [[label, *(text(numbers.get(name)) for name in columns)]
                                for label, numbers in lines.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([label.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]).rstrip()
                     for label, *rest in cells)


# ---- the command ----

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m nanoeemllm.evaluate")
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="DIR", help="model folder")
    add("--tsv", type=Path, required=True, metavar="FILE", help="benchmark file")
    add("--metric", choices=METRICS, help="how answers are scored (found from the file's name and columns)")
    add("--images", type=Path, metavar="DIR", help="folder that image_path is relative to (the file's own)")
    add("--out", type=Path, metavar="DIR", help="where answers and results go (WEIGHTS/eval/NAME)")
    add("--limit", type=positive(int), metavar="N", help="the first N rows alone")
    add("--max-new-tokens", type=positive(int), default=128, help="longest answer (128)")
    add("--batch-tokens", type=positive(int), default=16384, help="tokens asked together, text, visual and new (16384)")
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16 on a GPU, else as the weights are)")
    add_visual_path_flags(parser)
    add("--calibrate-heads", action="store_true", help="no scores: choose the heads that yopo prunes (calibrate.py)")
    args = parser.parse_args(argv)
    args.device = device_from(args.device)
    if args.dtype is None and args.device.startswith("cuda"):
        args.dtype = "bfloat16"
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config = ModelConfig.from_dict(read_json(args.weights / "config.json"))
    if config.vision is None:
        raise UserError(f"{args.weights} has no image encoder: give --weights a model that sees")
    path = config.visual_path
    path = visual_path_from(args, dataclasses.replace(path, name="yopo") if args.calibrate_heads else path)
    tsv = TSV(args.tsv, args.limit, args.images, quiet=rank > 0)
    if not len(tsv):
        raise UserError(f"{args.tsv} has no rows under its first line")
    metric = args.metric or detect(args.tsv.stem, tsv.columns)
    if args.calibrate_heads:
        path = dataclasses.replace(path, name=config.visual_path.name)             # the model stays what it is
        return calibrate_heads(args, tsv, metric, path)
    settings = {
        "weights": str(args.weights.resolve()), "written": (args.weights / "config.json").stat().st_mtime,
        "tsv": str(args.tsv.resolve()), "tsv_bytes": args.tsv.stat().st_size, "tsv_written": args.tsv.stat().st_mtime, "metric": metric,
        "visual_path": describe(path), "max_new_tokens": args.max_new_tokens, "dtype": args.dtype or "as stored"}
    name = args.tsv.stem + (f"-{args.visual_path}" if args.visual_path else "")
    folder = args.out or args.weights / "eval" / name

    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    done = read_answers(folder, settings)
    if world > 1:
        dist.barrier()                                              # all have read before one writes
    todo = [i for i in range(len(tsv)) if "bad" in done.get(i + 1, {"bad": ""})]      # what was bad may be mended now
    if done and rank == 0:
        print(f"{len(tsv) - len(todo)} of {len(tsv)} rows are answered in {folder} already")
    todo = todo[rank::world]
    if todo:
        model = open_model(args, path)
        asked = answers(model, (tsv[i] for i in todo), metric, args.max_new_tokens, args.batch_tokens)
        with tqdm(total=len(todo), desc=f"{args.tsv.stem} ({metric})", disable=rank > 0 or None) as bar:
            right, scored = 0.0, 0
            for record in write_answers(folder / f"predictions-{rank}.jsonl", settings, asked):
                right, scored = right + record.get("score", 0), scored + ("bad" not in record)
                bar.set_postfix_str(f"{100 * right / max(scored, 1):.1f} right", refresh=False)
                bar.update()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        done = read_answers(folder, settings)
        report(args.tsv.name, [done[i + 1] for i in range(len(tsv))], settings, folder / "results.json")


def describe(path: VisualPathConfig) -> str:
    """"yopo window=7": the name, and what is not as by default."""
    usual = dataclasses.asdict(VisualPathConfig(path.name))
    return " ".join([path.name, *(f"{key}={value}" for key, value in vars(path).items() if value != usual[key])])


def open_model(args, path: VisualPathConfig):
    model = load(args.weights, args.device, args.dtype and getattr(torch, args.dtype), path).eval()
    if args.device == "cpu" and args.dtype is None and model.dtype == torch.float16:
        model.float()                                               # CPUs have no fast float16
    return model


def calibrate_heads(args, tsv: TSV, metric: str, path: VisualPathConfig):
    """Chooses the heads on these rows and writes them into the model folder."""
    if not path.prune_heads:
        raise UserError("--calibrate-heads: say how many heads a layer to prune on the average with --prune-heads N")
    model, refused = open_model(args, VisualPathConfig("llava")), []
    cut = path.visual_layers(model.config.llama)
    if cut <= FIRST:
        raise UserError(f"--calibrate-heads: layers under {FIRST} keep all heads, and from {cut} on none sees pictures, so "
                        "there is nothing to prune: give a higher --last-visual-layer")

    def prompts():
        for i in tqdm(range(len(tsv)), "calibration", disable=None):
            try:
                asked = prepare(model, tsv[i], metric, 0)
            except UserError as error:
                refused.append(str(error))
            else:
                yield asked.ids, asked.images

    try:
        ratios = measure(model, prompts())
    except UserError as error:
        raise UserError(f"{error}; the first row: {refused[0]}" if refused else str(error)) from None
    kept, threshold = choose_heads(ratios, path.prune_heads, cut)
    config = dataclasses.replace(model.config, visual_path=dataclasses.replace(path, kept_heads=kept))
    write_aside(args.weights / "config.json", json.dumps(config.to_dict(), indent=2).encode())
    for layer, heads in enumerate(kept):
        print(f"layer {layer}: {len(heads)} of {model.config.llama.num_attention_heads} heads kept, {list(heads)}")
    print(f"threshold {threshold:.4f}; written to {args.weights / 'config.json'}")


def report(name: str, records: list[dict], settings: dict, file: Path):
    """Prints the table, and what was left out of it or could not be read; writes results.json."""
    result = summarize(settings["metric"], records)
    bad = [record for record in records if "bad" in record]
    unread = [record for record in records if record.get("read", "") is None]
    if len(bad) == len(records):
        raise UserError(f"none of {len(records)} rows of {name} could be asked; the first: {bad[0]['bad']}")
    lines = {"overall": result["overall"]}
    for column in GROUPS:
        lines |= {f"{column}: {group}": numbers for group, numbers in result.get(column, {}).items()}
    print(f"\n{name}: {settings['metric']} over {result['rows']} of {len(records)} rows\n\n{table(lines)}")
    if bad:
        print(f"\n{len(bad)} rows could not be asked and are not in the score:")
        _print_first([f"row {r['row']} (index {r['index']}): {r['bad']}" for r in bad])
    if unread:
        print(f"\n{len(unread)} answers could not be read and score 0:")
        _print_first([f"row {r['row']} (index {r.get('index', '')}): {r['prediction'][:60]!r}" for r in unread])
    try:
        results = result | {"settings": settings, "bad_rows": bad}
        write_aside(file, json.dumps(results, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    print(f"\n{file}")


def _print_first(lines: list[str], most: int = 10):
    for line in lines[:most]:
        print("  " + line)
    if len(lines) > most:
        print(f"  ... and {len(lines) - most} more, see the predictions")


if __name__ == "__main__":
    run_command(main)
