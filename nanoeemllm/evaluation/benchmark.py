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

from tqdm import tqdm

from nanoeemllm.border.files import open_regular, quoted, within
from nanoeemllm.config import UserError
from nanoeemllm.evaluation.metrics import GROUPS, summarize

MAX_RECORD = 1 << 28          # bytes of a row; a longer one is a quote that was never closed
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
    """Row i as a dictionary of its cells, read from the file when it is asked for. One pass at the
    start notes where each row begins, and its index. A broken row has the key "bad": why."""

    def __init__(self, path: Path, limit: int | None = None, images: Path | None = None,
                 quiet: bool = False):
        """limit: the first rows alone. images: the folder of image_path, by default the file's."""
        csv.field_size_limit(MAX_RECORD)
        self.path, self.images = path, images or path.parent
        self.offsets, self.first = [], {}             # first: index -> the first row that has it
        records = self._records(0)
        _, names = next(records, (0, []))
        names = [name.strip() for name in names]
        self.columns = ["" if name in ("row", "bad") else name for name in names]    # our own keys
        has_image = "image" in names or "image_path" in names
        missing = [name for name in ("index", "question", "answer") if name not in names]
        missing += [] if has_image else ["image (or image_path)"]
        if missing:
            raise UserError(f"{quoted(path)}: no column {', '.join(missing)}; its first line holds "
                            f"{', '.join(names)[:200] or 'nothing'}")
        column = names.index("index")
        records = itertools.islice(records, limit)
        for offset, cells in tqdm(records, "reading", leave=False, disable=quiet or None):
            index = cells[column].strip() if len(cells) > column else ""
            self.first.setdefault(index, len(self))
            self.offsets.append(offset)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        row = self._cells(i)
        try:
            return row if "bad" in row else self._with_image(i, row)
        except UserError as error:
            return row | {"bad": str(error)}

    def _with_image(self, i: int, row: dict) -> dict:
        first = self.first[row["index"].strip()]
        if first != i:
            raise UserError(f"index {row['index']} is that of row {first + 1} too")
        image = row.get("image", "").strip()
        if 0 < len(image) <= REFERENCE:
            holder = self._cells(self.first[image]) if image in self.first else {}
            row["image"] = holder.get("image", "")
            if len(row["image"]) <= REFERENCE:
                raise UserError(f"its picture is that of index {image}, which holds none")
        if row.get("image_path"):
            row["image_path"] = [within(self.images, name) for name in as_list(row["image_path"])]
        return row

    def _cells(self, i: int) -> dict:
        _, cells = next(self._records(self.offsets[i]))
        row = {"row": i + 1, **dict(zip(self.columns, cells))}
        if len(cells) != len(self.columns):
            return row | {"bad": f"{len(cells)} cells under {len(self.columns)} columns"}
        text = "".join(row[name] for name in self.columns if name != "image")
        return row | {"bad": "not UTF-8"} if re.search("[\udc80-\udcff]", text) else row

    def _records(self, offset: int) -> Iterator[tuple[int, list[str]]]:
        """(where it begins, cells) of every record from offset on. Quoted cells may hold newlines
        and tabs."""
        with open_regular(self.path) as file:
            start = file.seek(offset)
            if not offset and file.read(3) != b"\xef\xbb\xbf":                  # byte order mark
                file.seek(0)

            def lines():
                while line := file.readline(MAX_RECORD + 1):
                    if file.tell() - start > MAX_RECORD:
                        raise UserError(f"{quoted(self.path)}: the row at byte {start} is over "
                                        f"{MAX_RECORD >> 20} MB long: is a quote opened there that "
                                        "is never closed?")
                    yield line.decode("utf-8", "surrogateescape")

            reader = csv.reader(lines(), delimiter="\t")
            cells = []
            while cells is not None:
                try:
                    cells = next(reader, None)
                except csv.Error as error:            # of this line alone
                    cells = [f"({error})"]
                if cells:
                    yield start, cells
                start = file.tell()


def as_list(text: str) -> list[str]:
    """"['a', 'b']" -> ["a", "b"]; any other text is itself."""
    if text.strip().startswith("[") and text.strip().endswith("]"):
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
            lines = file.read().split(b"\n")[:-1]             # what stands behind the last is torn
        try:
            before, *found = [json.loads(line) for line in lines] or [settings]
            changed = [key for key in settings if before.get(key) != settings[key]]
            for record in found:
                _check(record, before.get("metric"))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"{quoted(path)} is damaged ({error}): remove it, its rows will be "
                            "asked again") from None
        if changed:
            what = ", ".join(f"{key} {before.get(key)!r}, not {settings[key]!r}" for key in changed)
            raise UserError(f"{quoted(path)} was made with {what}: remove it, or give another "
                            "folder with --out")
        for record in found:
            if "bad" in records.get(record["row"], {"bad": ""}):
                records[record["row"]] = record
    return records


def _check(record: dict, metric: str):
    """Raises what read_answers expects unless the record can be scored and shown."""
    text = [record["bad" if "bad" in record else "prediction"], record["index"]]
    text += [*record.get("answer", ()), *(record.get(key, "") for key in ("picture", *GROUPS))]
    if not all(isinstance(part, str) for part in text) or type(record["row"]) is not int:
        raise ValueError("a field of another type")
    if "bad" not in record:
        summarize(metric, [record])
        if not 0 <= record["score"] <= 1:
            raise ValueError(f"score {record['score']}")


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
