"""Benchmark files: questions read from a TSV, answers kept as lines of JSON.

    TSV                            rows of a file of any size, one in memory at a time
    detect                         the metric that a benchmark is scored by
    read_answers, write_answers    answers on disk, so that an interrupted run can be continued
"""

import ast
import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanoeemllm.border.files import open_regular, quoted, within
from nanoeemllm.config import UserError
from nanoeemllm.evaluation.metrics import GROUPS, summarize

MAX_CELL = 1 << 28            # characters; a longer one is a quote that was never closed
REFERENCE = 64                # a shorter "image" is the index of another row, as VLMEvalKit has it

DETECT = {                    # a pattern of the file's name -> metric
    "mmbench|ccbench|circular": "circular", "(?<![a-z])mme(?![a-z])": "mme",
    "hallusion": "hallusion", "pope": "pope", "textvqa": "vqa",
    "docvqa|infovqa|infographic": "anls", "chartqa(?!pro)": "relaxed",
    r"ocrbench(?!_?v\d)": "ocrbench"}


def detect(name: str, columns: list[str]) -> str:
    """The metric of a benchmark file: by its name, else by its columns."""
    for pattern, metric in DETECT.items():
        if re.search(pattern, name.lower()):
            return metric
    return "multiple-choice" if {"A", "B"} <= set(columns) else "exact"


class TSV:
    """Row i as a dictionary of its cells, read from the file when it is asked for; of a broken row
    "bad" says why. One pass at the start notes where each row begins, and its index."""

    def __init__(self, path: Path, limit: int | None = None, images: Path | None = None):
        """limit: the first rows alone. images: the folder of image_path, by default the file's."""
        csv.field_size_limit(MAX_CELL)
        self.path, self.images = path, images or path.parent
        self.rows = []                                # where each begins, and its index
        self.first = {}                               # index -> the first row that has it
        records = self._records(0)
        _, self.columns = next(records, (0, []))
        missing = [name for name in ("index", "question", "answer") if name not in self.columns]
        if not {"image", "image_path"} & set(self.columns):
            missing.append("image (or image_path)")
        if missing:
            raise UserError(f"{quoted(path)}: no column {', '.join(missing)}; its first line holds "
                            f"{', '.join(self.columns)[:200] or 'nothing'}")
        for offset, cells in itertools.islice(records, limit):
            index = dict(zip(self.columns, cells)).get("index", "").strip()
            self.first.setdefault(index, len(self))
            self.rows.append((offset, index))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        _, index = self.rows[i]
        ours, first = {"row": i + 1, "index": index}, self.first[index]
        try:
            cells = self._cells(i)
            if first != i:
                raise UserError(f"index {index} is that of row {first + 1} too")
            image = cells.get("image", "").strip()
            if 0 < len(image) <= REFERENCE:
                holder = self._cells(self.first[image]) if image in self.first else {}
                cells["image"] = holder.get("image", "")
                if len(cells["image"]) <= REFERENCE:
                    raise UserError(f"its picture is that of index {image}, which holds none")
            if cells.get("image_path"):
                names = as_list(cells["image_path"])
                cells["image_path"] = [within(self.images, name) for name in names]
        except UserError as error:
            return ours | {"bad": str(error)}
        cells.pop("bad", None)                        # a column of that name is not ours
        return cells | ours

    def _cells(self, i: int) -> dict:
        _, cells = next(self._records(self.rows[i][0]))
        if len(cells) != len(self.columns):
            raise UserError(f"{len(cells)} cells under {len(self.columns)} columns")
        if re.search("[\udc80-\udcff]", "".join(cells)):
            raise UserError("not UTF-8")
        return dict(zip(self.columns, cells))

    def _records(self, offset: int) -> Iterator[tuple[int, list[str]]]:
        """(where it begins, cells) of every record from offset on. Quoted cells may hold newlines
        and tabs."""
        with open_regular(self.path) as file:
            file.seek(offset)
            lines = iter(lambda: file.readline(MAX_CELL), b"")
            # utf-8-sig: the first line may begin with a byte order mark
            reader = csv.reader((line.decode("utf-8-sig", "surrogateescape") for line in lines),
                                delimiter="\t")
            while True:
                start = file.tell()
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    if "limit" in str(error):
                        raise UserError(f"{quoted(self.path)}: a cell of the row at byte {start} "
                                        f"is over {MAX_CELL >> 20} MB long: is a quote opened "
                                        "there that is never closed?") from None
                    cells = [f"({error})"]            # a stray carriage return
                if cells is None:
                    return
                if cells:
                    yield start, cells


def as_list(text: str) -> list[str]:
    """"['a', 'b']" -> ["a", "b"]; any other text is itself."""
    if re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL):
        try:
            return [str(part) for part in ast.literal_eval(text.strip())]
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass
    return [text]


# ---- answers on disk ----

def read_answers(folder: Path, settings: dict) -> dict[int, dict]:
    """row -> record, of all processes; an answer rather than why there was none before. Raises
    UserError for damaged files, and for answers that were made under other settings."""
    records = {}
    for path in sorted(folder.glob("predictions-*.jsonl")):
        with open_regular(path) as file:
            *lines, _ = file.read().split(b"\n")     # what stands behind the last newline is torn
        try:
            before, *found = map(json.loads, lines or [json.dumps(settings)])
            changed = [f"{key} {before.get(key)!r}, not {value!r}"
                       for key, value in settings.items() if before.get(key) != value]
            for record in found:
                check_record(record, before.get("metric"))
                if "bad" in records.setdefault(record["row"], record):
                    records[record["row"]] = record
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"{quoted(path)} is damaged ({error}): remove it, its rows will be "
                            "asked again") from None
        if changed:
            raise UserError(f"{quoted(path)} was made with {', '.join(changed)}: remove it, or "
                            "give another folder with --out")
    return records


def check_record(record: dict, metric: str):
    """Raises what read_answers expects unless the record can be scored and shown."""
    answered = "bad" not in record
    texts = [record["index"], record["prediction" if answered else "bad"]]
    texts += [record.get(key, "") for key in ("picture", *GROUPS)]
    "".join(texts + record.get("answer", []))         # TypeError where one is no text
    if type(record["row"]) is not int or not 0 <= record.get("score", 0) <= 1:
        raise ValueError("its row or its score is no such number")
    if answered:
        summarize(metric, [record])


def write_answers(path: Path, settings: dict, records: Iterable[dict]) -> Iterator[dict]:
    """Adds records to a process's file, a line of JSON each behind one of settings, and passes
    them on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)                      # a line that was being written at the end
            if not whole:
                file.write(json.dumps(settings).encode() + b"\n")
            for record in records:
                line = json.dumps(record, ensure_ascii=False) + "\n"
                file.write(line.encode(errors="replace"))         # an index that is not UTF-8
                file.flush()
                yield record
    except OSError as error:
        raise UserError(f"cannot write {quoted(path)}: {error.strerror}") from None
