"""Benchmark files: questions read from a TSV, answers kept as JSON lines.

    TSV                             rows of a file of any size, one in memory at a time
    detect                          which metric a benchmark is scored by
    read_answers, write_answers     answers on disk, so that an interrupted run goes on where it was
"""

import ast
import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from nanoeemllm.config import UserError

MAX_RECORD = 1 << 28          # bytes of one row; a longer one is a quote that nobody closed
REFERENCE = 64                # characters; a shorter "image" is the index of another row, as in VLMEvalKit's files


class TSV:
    """Row i as a dictionary of its cells, read from the file when it is asked for.

    One pass at the start notes where each row begins, and its index; nothing else stays in memory. A row that is
    broken has the key "bad", which says why.
    """

    def __init__(self, path: Path, limit: int | None = None, images: Path | None = None, quiet: bool = False):
        """limit: the first rows alone. images: folder that image_path is relative to, by default the file's own."""
        csv.field_size_limit(MAX_RECORD)
        self.path, self.images = path, images or path.parent
        self.offsets, self.numbers = [], {}                   # where rows begin; index -> the first row that has it
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        records = self._records(0)
        names = [name.strip() for name in next(records, (0, []))[1]]
        self.columns = ["" if name in ("row", "bad") else name for name in names]     # these two are ours
        missing = [name for name in ("index", "question", "answer") if name not in self.columns]
        if not {"image", "image_path"} & set(self.columns):
            missing.append("image (or image_path)")
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}; its first line holds "
                            f"{', '.join(self.columns)[:200] or 'nothing'}")
        column = self.columns.index("index")
        with tqdm(total=path.stat().st_size, desc="reading the index", unit="B", unit_scale=True, leave=False,
                  disable=quiet or None) as bar:
            for offset, cells in itertools.islice(records, limit):
                index = cells[column].strip() if len(cells) > column else ""
                self.numbers.setdefault(index, len(self.offsets))
                self.offsets.append(offset)
                bar.update(offset - bar.n)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        row = self._cells(i)
        if "bad" in row:
            return row
        first = self.numbers[row["index"].strip()]
        if first != i:
            return row | {"bad": f"index {row['index']} is that of row {first + 1} too"}
        image = row.get("image", "").strip()
        if 0 < len(image) <= REFERENCE:
            holder = self.numbers.get(image)
            row["image"] = self._cells(holder).get("image", "") if holder is not None else ""
            if len(row["image"]) <= REFERENCE:
                return row | {"bad": f"its picture is that of index {image}, which holds none"}
        if row.get("image_path"):
            row["image_path"] = [str(self.images / path) for path in as_list(row["image_path"])]
        return row

    def _cells(self, i: int) -> dict:
        cells = next(self._records(self.offsets[i]))[1]
        row = {"row": i + 1, **dict(zip(self.columns, cells))}
        if len(cells) != len(self.columns):
            return row | {"bad": f"{len(cells)} cells under {len(self.columns)} columns"}
        try:
            "".join(cell for name, cell in zip(self.columns, cells) if name != "image").encode()
        except UnicodeEncodeError:
            return row | {"bad": "not UTF-8"}
        return row

    def _records(self, offset: int) -> Iterator[tuple[int, list[str]]]:
        """(where it begins, cells) for every record from offset on; quoted cells may hold newlines and tabs."""
        def lines():
            while line := file.readline(MAX_RECORD + 1):
                if file.tell() - start > MAX_RECORD:
                    raise UserError(f"{self.path}: the row at byte {start} is over {MAX_RECORD >> 20} MB long: "
                                    "is a quote opened there that is never closed?")
                yield line.decode("utf-8", "surrogateescape")

        with open(self.path, "rb") as file:
            start = file.seek(offset)
            if not offset and file.read(3) != b"\xef\xbb\xbf":                         # a byte order mark
                file.seek(0)
            reader = csv.reader(lines(), delimiter="\t")
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error as error:                        # the reader goes on behind such a line
                    cells = [f"({error})"]
                if cells is None:
                    return
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


def detect(name: str, columns: list[str]) -> str:
    """The metric of a benchmark file: by its name, else by its columns."""
    known = {"mmbench|ccbench|circular": "circular", "(?<![a-z])mme(?![a-z])": "mme", "hallusion": "hallusion",
             "pope": "pope", "textvqa": "vqa", "docvqa|infovqa|infographic": "anls", "chartqa(?!pro)": "relaxed",
             r"ocrbench(?!_?v\d)": "ocrbench"}
    for pattern, metric in known.items():
        if re.search(pattern, name.lower()):
            return metric
    return "multiple-choice" if {"A", "B"} <= set(columns) else "exact"


def read_answers(folder: Path, settings: dict) -> dict[int, dict]:
    """row -> record, of all processes; an answer rather than why there was none before. Raises UserError for answers that
    were made under other settings."""
    records = {}
    for path in sorted(folder.glob("predictions-*.jsonl")):
        try:
            lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]        # the last may be torn off
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): remove it, its rows will be asked again") from None
        before = lines[0] if lines else settings
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise UserError(f"{path} was made with " + ", ".join(f"{key} {before.get(key)!r}" for key in changed)
                            + ", not " + ", ".join(repr(settings[key]) for key in changed)
                            + ": remove it, or give another folder with --out")
        for record in lines[1:]:
            if "bad" in records.get(record["row"], {"bad": ""}):
                records[record["row"]] = record
    return records


def write_answers(path: Path, settings: dict, records: Iterable[dict]) -> Iterator[dict]:
    """Adds records to a process's file, a line of JSON each behind one of settings, and passes them on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)                                    # the end was being written when the run ended
            if not whole:
                file.write(json.dumps(settings).encode() + b"\n")
            for record in records:
                line = json.dumps(record, ensure_ascii=False) + "\n"
                file.write(line.encode(errors="replace"))           # an index that is not UTF-8
                file.flush()
                yield record
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
