"""Rows of a benchmark -> questions -> answers -> records with a score."""

import base64
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from nanoeemllm.config import UserError
from nanoeemllm.data.images import load_image
from nanoeemllm.data.packing import patch_grid
from nanoeemllm.evaluation.benchmark import as_list
from nanoeemllm.evaluation.metrics import GROUPS, YES_NO, grade, options_of, summarize
from nanoeemllm.prompt import IMAGE_TEXT, encode_prompt

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
INDEX = {"circular": ("a whole number", r"\s*\d{1,18}\s*"),
         "hallusion": ("..._set_figure_question", ".*_.*_.*_.*")}
WORD = "\nAnswer the question using a single word or phrase."


class Question(NamedTuple):
    row: dict
    ids: list[int]
    images: list[Image.Image]
    tokens: int                    # text, visual and new ones: what it costs


def prompt_of(row: dict, metric: str, images: list) -> tuple[str, list]:
    """The human's words as LLaVA-1.5's evaluation puts them, each <image> an image, and the images
    in that order. A question may say where its images stand, as MMMU's do ("<image 1>"); the others
    stand before it."""
    text = row["question"]
    if row.get("hint"):
        text = row["hint"] + "\n" + text
    if metric in YES_NO:                              # MME's own ending gives way to LLaVA's
        text = re.sub(r"\s*Please answer yes or no\.\s*$", "", text) + WORD
    elif options := options_of(metric, row):
        text += "".join(f"\n{letter}. {option}" for letter, option in options.items())
        text += LETTER_CN if re.search(r"[\u4e00-\u9fff]", text) else LETTER
    elif metric not in ("exact", "ocrbench"):
        text += WORD
    placed = []

    def place(found):
        number = int(found[1] or len(placed) + 1) - 1
        if number in placed or not 0 <= number < len(images):
            return found[0].strip("<>")               # a word about an image, not the image
        placed.append(number)
        return IMAGE_TEXT

    text = re.sub(r"<image(?: (\d{1,3}))?>", place, text)
    first = [number for number in range(len(images)) if number not in placed]
    return (IMAGE_TEXT + "\n") * len(first) + text, [images[number] for number in first + placed]


def images_of(row: dict) -> list[Image.Image]:
    """Raises UserError where there is none, or one cannot be read."""
    images = row.get("image") or list(map(load_image, row.get("image_path") or []))
    if not images:
        raise UserError("no picture")
    if isinstance(images, str):
        try:
            files = [io.BytesIO(base64.b64decode(text)) for text in as_list(images)]
        except ValueError as error:
            raise UserError(f"the picture is not base64: {error}") from None
        images = list(map(load_image, files))
    return images if isinstance(images, list) else [images]


def check_row(row: dict, metric: str):
    """Raises UserError for what can be seen without the image."""
    if "bad" in row:
        raise UserError(row["bad"])
    answer, index, options = row["answer"], row.get("index", ""), options_of(metric, row)
    form, pattern = INDEX.get(metric, ("", ".*"))
    for is_bad, why in (
            (not row["question"].strip(), "no question"),
            (not "".join(as_list(answer)).strip(), "no answer"),
            (options and answer.strip().lower() not in map(str.lower, options),
             f"the answer {answer!r} is none of the options {', '.join(options)}"),
            (not re.fullmatch(pattern, index, re.DOTALL),
             f"the index {index!r} is not {form}, by which {metric} counts")):
        if is_bad:
            raise UserError(why)


def prepare(model, row: dict, metric: str, max_new_tokens: int) -> Question:
    """Raises UserError where the row cannot be asked."""
    check_row(row, metric)
    text, images = prompt_of(row, metric, images_of(row))
    if model.config.vision is None:
        raise UserError("this model has no image encoder: give another model")
    ids = encode_prompt(model.tokenizer, text, model.config.chat_template)
    grids = [patch_grid(image, model.config.vision) for image in images]
    tokens = len(ids) - len(images) + sum(h * w for h, w in grids) + max_new_tokens
    context = model.config.llama.max_position_embeddings
    if tokens > context:
        raise UserError(f"{tokens} tokens, {max_new_tokens} new ones among them, do not fit the "
                        f"model's context of {context}")
    row = row | {"answer": as_list(row["answer"])}
    if metric == "mme":                               # counts the two questions about a picture
        row["picture"] = hashlib.md5(images[0].tobytes()).hexdigest()
    return Question(row, ids, images, tokens)


def prepare_all(model, rows: Iterable[dict], metric: str,
                max_new_tokens: int) -> Iterator[Question | dict]:
    """A Question a row, or a record that says why it cannot be asked ("bad")."""
    for number, row in enumerate(rows):
        row = {"row": number + 1, "index": str(number)} | row
        try:
            yield prepare(model, row, metric, max_new_tokens)
        except UserError as error:
            yield {"row": row["row"], "index": row["index"], "bad": str(error)}


def answers(model, rows: Iterable[dict], metric: str, max_new_tokens: int = 128,
            batch_tokens: int = 16384, **options) -> Iterator[dict]:
    """A record a row: what was asked, answered, read and scored; or "bad". Rows are asked together
    up to batch_tokens of Question.tokens. options: more of model.generate_batch."""
    batch, options = [], {"max_new_tokens": max_new_tokens, **options}
    for question in prepare_all(model, rows, metric, max_new_tokens):
        if isinstance(question, dict):
            yield question
            continue
        if batch and sum(q.tokens for q in [*batch, question]) > batch_tokens:
            yield from ask(model, batch, metric, options)
            batch = []
        batch.append(question)
    if batch:
        yield from ask(model, batch, metric, options)


def ask(model, batch: list[Question], metric: str, options: dict) -> Iterator[dict]:
    rows, ids, images, _ = zip(*batch)
    try:
        outputs = model.generate_batch(ids, images, **options)
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"out of memory with {len(batch)} rows: lower --batch-tokens") from None
    for row, output in zip(rows, outputs):
        prediction = model.tokenizer.decode(output).strip()
        read, score = grade(metric, prediction, row)
        columns = ("row", "index", "question", "answer", "picture", *GROUPS)
        record = {key: row[key] for key in columns if row.get(key)}
        yield record | {"prediction": prediction, "read": read, "score": score,
                        "options": len(options_of("circular", row))}


def evaluate_rows(model, rows: list[dict], metric: str = "exact") -> dict:
    """metrics.summarize of the answers to questions that are in memory.

    rows: {"image": PIL image or a list of them, "question", "answer"}, and any of GROUPS.
    """
    records = tqdm(answers(model, rows, metric), "questions", len(rows), disable=None, leave=False)
    return summarize(metric, list(records))


def table(lines: dict[str, dict[str, float]]) -> str:
    """label -> {column: number} as text, a line a label; absent numbers are left empty."""
    names = dict.fromkeys(itertools.chain(*lines.values()))
    rows = [["", *names]]
    for label, line in lines.items():
        numbers = [line.get(name, "") for name in names]
        rows.append([label, *(f"{x:.1f}" if isinstance(x, float) else str(x) for x in numbers)])
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip()
                     for row in rows)
