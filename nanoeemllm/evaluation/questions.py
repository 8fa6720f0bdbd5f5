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
from nanoeemllm.evaluation.metrics import CHOICE, GROUPS, YES_NO, grade, options_of, summarize
from nanoeemllm.prompt import IMAGE_TEXT, encode_prompt

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
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
    options = options_of(row)
    if metric in CHOICE and options:
        text += "".join(f"\n{letter}. {option}" for letter, option in options.items())
        text += LETTER_CN if re.search(r"[\u4e00-\u9fff]", text) else LETTER
    elif metric in YES_NO:                            # MME's own ending gives way to LLaVA's
        text = re.sub(r"\s*Please answer yes or no\.\s*$", "", text) + WORD
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
    answer, index, options = row["answer"].strip(), row.get("index", ""), options_of(row)
    for is_bad, why in (
            (not row["question"].strip(), "no question"),
            (not "".join(as_list(answer)).strip(), "no answer"),
            (metric in CHOICE and options and answer not in options,
             f"the answer {answer!r} is none of the options {', '.join(options)}"),
            (metric in YES_NO and answer.lower() not in ("yes", "no"),
             f"the answer {answer!r} is neither yes nor no"),
            (metric == "circular" and not re.fullmatch(r"\s*\d{1,18}\s*", index),
             f"the index {index!r} is no whole number, which circular evaluation counts by"),
            (metric == "hallusion" and index.count("_") < 3,
             f"the index {index!r} does not end in _set_figure_question")):
        if is_bad:
            raise UserError(why)


def prepare(model, row: dict, metric: str, max_new_tokens: int) -> Question:
    """Raises UserError where the row cannot be asked."""
    check_row(row, metric)
    text, images = prompt_of(row, metric, images_of(row))
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
            batch_tokens: int = 16384) -> Iterator[dict]:
    """A record a row: what was asked, answered, read and scored; or "bad". Rows are asked together
    up to batch_tokens of Question.tokens."""
    batch = []
    for question in prepare_all(model, rows, metric, max_new_tokens):
        if isinstance(question, dict):
            yield question
            continue
        if batch and sum(q.tokens for q in [*batch, question]) > batch_tokens:
            yield from ask(model, batch, metric, max_new_tokens)
            batch = []
        batch.append(question)
    if batch:
        yield from ask(model, batch, metric, max_new_tokens)


def ask(model, batch: list[Question], metric: str, max_new_tokens: int) -> Iterator[dict]:
    try:
        outputs = model.generate_batch([question.ids for question in batch],
                                       [question.images for question in batch],
                                       max_new_tokens=max_new_tokens)
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"out of memory with {len(batch)} rows: lower --batch-tokens") from None
    for question, output in zip(batch, outputs):
        row, prediction = question.row, model.tokenizer.decode(output).strip()
        read, score = grade(metric, prediction, row)
        columns = ("row", "index", "question", "answer", "picture", *GROUPS)
        record = {key: row[key] for key in columns if row.get(key)}
        yield record | {"prediction": prediction, "read": read, "score": score,
                        "options": len(options_of(row))}


def evaluate_rows(model, rows: list[dict], metric: str = "exact") -> dict:
    """metrics.summarize of the answers to questions that are in memory.

    rows: {"image": PIL image or a list of them, "question", "answer"}, and any of GROUPS.
    """
    records = tqdm(answers(model, rows, metric), "questions", len(rows), disable=None, leave=False)
    return summarize(metric, list(records))


def table(lines: dict[str, dict[str, float]]) -> str:
    """label -> {column: number} as text, a line a label; absent numbers are left empty."""
    width = max(map(len, lines))
    columns = [[label.ljust(width) for label in ("", *lines)]]
    for name in dict.fromkeys(itertools.chain(*lines.values())):
        numbers = [line.get(name, "") for line in lines.values()]
        cells = [name, *(f"{x:.1f}" if isinstance(x, float) else str(x) for x in numbers)]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))
