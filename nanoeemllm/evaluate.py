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
import contextlib
import base64
import dataclasses
import datetime
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from nanoeemllm.benchmark import TSV, Predictions, as_list, detect
from nanoeemllm.checkpoint import load, read_json
from nanoeemllm.command_line import add_visual_path_flags, run_command, visual_path_from
from nanoeemllm.config import ModelConfig, UserError, VisualPathConfig
from nanoeemllm.data import patch_grid
from nanoeemllm.image import load_image
from nanoeemllm.metrics import CHOICE, GROUPS, METRICS, YES_NO, grade, options_of, summarize
from nanoeemllm.prompt import IMAGE_TEXT, encode_prompt

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
WORD = "Answer the question using a single word or phrase."


class BadRow(Exception):
    """Why a row cannot be asked."""


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
    image = row.get("image")
    if image and not isinstance(image, str):
        return image if isinstance(image, list) else [image]
    try:
        if image:
            return [load_image(io.BytesIO(base64.b64decode("".join(part.split()), validate=True)))
                    for part in as_list(image)]
        return [load_image(path) for path in row.get("image_path") or []]
    except (UserError, ValueError) as error:                        # ValueError: not base64
        raise BadRow(str(error)) from None


def check_row(row: dict, metric: str):
    """Raises BadRow for what can be seen without the picture."""
    if "bad" in row:
        raise BadRow(row["bad"])
    if not row["question"].strip():
        raise BadRow("no question")
    answer, options = row["answer"].strip(), options_of(row)
    if not answer:
        raise BadRow("no answer")
    if metric in CHOICE and options and answer not in options:
        raise BadRow(f"the answer {answer!r} is none of the options {', '.join(options)}")
    if metric in YES_NO and answer.lower() not in ("yes", "no"):
        raise BadRow(f"the answer {answer!r} is neither yes nor no")
    if metric == "circular" and not row["index"].strip().isdecimal():
        raise BadRow(f"the index {row['index']!r} is no whole number, which circular evaluation counts by")
    if metric == "hallusion" and row["index"].count("_") < 3:
        raise BadRow(f"the index {row['index']!r} does not end in _set_figure_question")


# ---- asking ----

class Asked(NamedTuple):
    row: dict
    ids: list[int]
    images: list[Image.Image]
    tokens: int                 # text, visual and new ones: what it costs


def prepare(model, row: dict, metric: str, max_new_tokens: int) -> Asked:
    """Raises BadRow."""
    check_row(row, metric)
    images = pictures_of(row)
    if not images:
        raise BadRow("no picture")
    text, images = prompt_of(row, metric, images)
    ids = encode_prompt(model.tokenizer, text, model.config.chat_template)
    grids = [patch_grid(image, model.config.vision) for image in images]
    tokens = len(ids) - len(images) + sum(h * w for h, w in grids) + max_new_tokens
    if tokens > model.config.llama.max_position_embeddings:
        raise BadRow(f"{tokens} tokens, {max_new_tokens} new ones among them, do not fit the model's context of "
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
    if model.config.vision is None:
        raise UserError("this model has no image encoder: give --weights a model that sees")
    batch, tokens = [], 0
    for number, row in enumerate(rows, 1):
        row = {"row": number, "index": str(number - 1)} | row
        try:
            asked = prepare(model, row, metric, max_new_tokens)
        except BadRow as error:
            yield {"row": row["row"], "index": row.get("index", ""), "bad": str(error)}
            continue
        if batch and tokens + asked.tokens > batch_tokens:
            yield from _ask(model, batch, metric, max_new_tokens)
            batch, tokens = [], 0
        batch.append(asked)
        tokens += asked.tokens
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


def evaluate_rows(model, rows: Iterable[dict], metric: str = "exact", max_new_tokens: int = 128,
                  batch_tokens: int = 16384) -> dict:
    """Scores of questions that are in memory: metrics.summarize of the answers.

    rows: {"image": PIL picture or a list of them, "question", "answer", and if you like "category", "l2-category"}.
    """
    asked = answers(model, rows, metric, max_new_tokens, batch_tokens)
    total = len(rows) if hasattr(rows, "__len__") else None
    return summarize(metric, list(tqdm(asked, "questions", total, disable=None, leave=False)))


# ---- controls ----

def shuffled(rows: list[dict]) -> list[dict]:
    """The same questions, each about the next picture: what a model knows without looking."""
    pictures = list({id(row["image"]): row["image"] for row in rows}.values())
    after = {id(picture): pictures[(i + 1) % len(pictures)] for i, picture in enumerate(pictures)}
    return [row | {"image": after[id(row["image"])]} for row in rows]


def majority(rows: list[dict], metric: str = "exact") -> dict:
    """Scores of always saying what is most often right in the row's category."""
    right = {c: Counter(r["answer"] for r in rows if r.get("category") == c) for c in {r.get("category") for r in rows}}
    records = []
    for row in rows:
        prediction = right[row.get("category")].most_common(1)[0][0]
        read, score = grade(metric, prediction, row | {"answer": [row["answer"]]})
        records.append(row | {"read": read, "score": score})
    return summarize(metric, records)


# ---- tables ----

def table(result: dict) -> str:
    """One result: a line overall and a line a group, all its numbers."""
    lines = [("overall", result["overall"])]
    for column in GROUPS:
        lines += [(f"{column}: {name}", numbers) for name, numbers in result.get(column, {}).items()]
    names = list(dict.fromkeys(name for _, numbers in lines for name in numbers))
    return _aligned([["", *names]] + [[label, *(_number(numbers.get(n)) for n in names)] for label, numbers in lines])


def compare(results: dict[str, dict]) -> str:
    """Several results over the same rows, side by side: the first number of each."""
    first = next(iter(results.values()))
    value = lambda numbers: _number(next(iter(numbers.values()), None))
    lines = [["", *results], ["overall", *(value(r["overall"]) for r in results.values())]]
    for column in GROUPS:
        lines += [[name, *(value(r.get(column, {}).get(name, {})) for r in results.values())]
                  for name in first.get(column, {})]
    return _aligned(lines)


def _number(value) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]).rstrip()
                     for line in lines)


# ---- the command ----

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="DIR", help="model folder")
    add("--tsv", type=Path, required=True, metavar="FILE", help="benchmark file")
    add("--metric", choices=METRICS, help="how answers are scored (found from the file's name and columns)")
    add("--images", type=Path, metavar="DIR", help="folder that image_path is relative to (the file's own)")
    add("--out", type=Path, metavar="DIR", help="where answers and results go (WEIGHTS/eval/NAME)")
    add("--limit", type=int, metavar="N", help="the first N rows alone")
    add("--max-new-tokens", type=int, default=128, help="longest answer (128)")
    add("--batch-tokens", type=int, default=16384, help="tokens asked together, text, visual and new (16384)")
    add("--device", help="cuda, mps or cpu (cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16 on a GPU, else as the weights are)")
    add_visual_path_flags(parser)
    add("--calibrate-heads", action="store_true", help="no scores: choose the heads that yopo prunes (calibrate.py)")
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more")
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    path = visual_path_from(args, ModelConfig.from_dict(read_json(args.weights / "config.json")).visual_path)
    tsv = TSV(args.tsv, args.limit, args.images, quiet=rank > 0)
    metric = args.metric or detect(args.tsv.stem, tsv.columns)
    if not len(tsv):
        raise UserError(f"{args.tsv} has no rows under its first line")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.calibrate_heads:
        calibrate_heads(args, tsv, metric, device, path)
        return
    settings = {
        "weights": str(args.weights.resolve()), "written": (args.weights / "config.json").stat().st_mtime,
        "tsv": str(args.tsv.resolve()), "tsv_bytes": args.tsv.stat().st_size, "metric": metric,
        "visual_path": describe(path), "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype or ("bfloat16" if device.startswith("cuda") else "as stored")}
    name = args.tsv.stem + (f"-{args.visual_path}" if args.visual_path else "")
    predictions = Predictions(args.out or args.weights / "eval" / name, settings)

    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    done = predictions.read()
    if world > 1:
        dist.barrier()                                              # all have read before one writes
    todo = [i for i in range(len(tsv)) if i + 1 not in done][rank::world]
    if done and rank == 0:
        print(f"{sum(row <= len(tsv) for row in done)} of {len(tsv)} rows are answered in {predictions.folder} already")
    if todo:
        model = open_model(args, device, path)
        asked = answers(model, (tsv[i] for i in todo), metric, args.max_new_tokens, args.batch_tokens)
        with tqdm(total=len(todo), desc=f"{args.tsv.stem} ({metric})", disable=None if rank == 0 else True) as bar:
            right, scored = 0.0, 0
            for record in predictions.write(rank, asked):
                right, scored = right + record.get("score", 0), scored + ("bad" not in record)
                bar.set_postfix_str(f"{100 * right / max(scored, 1):.1f} right", refresh=False)
                bar.update()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        report(args.tsv.name, [record for row, record in sorted(predictions.read().items()) if row <= len(tsv)],
               settings, predictions.folder / "results.json")


def calibrate_heads(args, tsv: TSV, metric: str, device: str, path: VisualPathConfig):
    """Chooses the heads on these rows and writes them into the model folder."""
    from nanoeemllm.calibrate import choose_heads, measure, write_heads      # it imports what trains models
    if not path.prune_heads:
        raise UserError("--calibrate-heads: say how many heads a layer to prune on the average with --prune-heads N")
    model = open_model(args, device, VisualPathConfig("llava"))

    def prompts():
        for i in range(len(tsv)):
            with contextlib.suppress(BadRow):
                asked = prepare(model, tsv[i], metric, 0)
                yield asked.ids, asked.images

    kept, threshold = choose_heads(measure(model, prompts(), len(tsv)), path.prune_heads)
    write_heads(args.weights, dataclasses.replace(path, kept_heads=kept))
    for layer, heads in enumerate(kept):
        print(f"layer {layer}: {len(heads)} of {model.config.llama.num_attention_heads} heads kept, {list(heads)}")
    print(f"threshold {threshold:.4f}; written to {args.weights / 'config.json'}")


def describe(path: VisualPathConfig) -> str:
    """"yopo window=7": the name, and what is not as by default."""
    values = [(f.name, getattr(path, f.name), f.default) for f in dataclasses.fields(path)[1:]]
    changed = [f"{name}={value}" for name, value, default in values if value != default]
    return " ".join([path.name, *changed])


def open_model(args, device: str, path):
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: this machine has none; leave it out, or give cpu") from None
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else None)
    model = load(args.weights, device, dtype and getattr(torch, dtype), path).eval()
    if device == "cpu" and args.dtype is None and model.dtype == torch.float16:
        model.float()                                               # CPUs have no fast float16
    return model


def report(name: str, records: list[dict], settings: dict, file: Path):
    """Prints the table, and what was left out of it or could not be read; writes results.json."""
    result = summarize(settings["metric"], records)
    bad = [record for record in records if "bad" in record]
    unread = [record for record in records if record.get("read", "") is None]
    if len(bad) == len(records):
        raise UserError(f"none of {len(records)} rows of {name} could be asked; the first: {bad[0]['bad']}")
    print(f"\n{name}: {settings['metric']} over {result['rows']} of {len(records)} rows\n\n{table(result)}")
    if bad:
        print(f"\n{len(bad)} rows could not be asked and are not in the score:")
        print(_first(f"row {r['row']} (index {r['index']}): {r['bad']}" for r in bad))
    if unread:
        print(f"\n{len(unread)} answers could not be read and score 0:")
        print(_first(f"row {r['row']} (index {r['index']}): {r['prediction'][:60]!r}" for r in unread))
    try:
        aside = file.with_suffix(".writing")
        aside.write_text(json.dumps(result | {"settings": settings, "bad_rows": bad}, indent=1, ensure_ascii=False))
        aside.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    print(f"\n{file}")


def _first(lines: Iterable[str], most: int = 10) -> str:
    lines = list(lines)
    more = [f"... and {len(lines) - most} more, see the predictions"] if len(lines) > most else []
    return "\n".join("  " + line for line in lines[:most] + more)


if __name__ == "__main__":
    run_command(main)
