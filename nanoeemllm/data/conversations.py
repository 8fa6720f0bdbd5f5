"""Conversations on disk: LLaVA's JSON, a list or one object a line, indexed once, read when needed.

    [{"id": "7", "image": "coco/7.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                        {"from": "gpt", "value": "A cat."}]}, ...]

"image" may be absent (text alone) or a list, one name for each <image> in the text.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from nanoeemllm.border.files import open_regular, quoted, within
from nanoeemllm.config import UserError
from nanoeemllm.prompt import IMAGE_TEXT

CHUNK = 16 << 20      # bytes read at once from a JSON list


class ConversationFile:
    """Element i is conversation i, with whole paths of its images.

    Opening reads the file once, object by object, and keeps only where each lies (16 bytes each).
    What can be checked without decoding images is checked here: conversations that cannot be used
    are left out and listed in `problems`, [(line or id, reason), ...]. Raises UserError for a file
    that is no such JSON or has nothing usable.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None, progress: bool = True):
        self.path, self.images = Path(path), None if images is None else Path(images)
        if images is not None and not self.images.is_dir():
            raise UserError(f"{quoted(images)}: no such folder; --images names that of pictures")
        self.problems: list[tuple[str, str]] = []
        self._index = array("q")         # of each: first byte, last byte, number in the file
        with open_regular(path) as file, tqdm(
                desc=f"indexing {self.path.name}", total=os.fstat(file.fileno()).st_size, unit="B",
                unit_scale=True, disable=None if progress else True) as bar:
            for number, (start, end, where, entry) in enumerate(_entries(file), start=1):
                problem = find_problem(entry, self.images)
                if problem:
                    self.problems.append((where, problem))
                else:
                    self._index.extend((start, end, number))
                bar.update(end - bar.n)
        if not self._index:
            why = " ({}: {})".format(*self.problems[0]) if self.problems else ""
            raise UserError(f"{quoted(path)}: not one conversation that can be used{why}")

    def __len__(self) -> int:
        return len(self._index) // 3

    def __getitem__(self, i: int) -> dict:
        start, end, number = self._index[3 * i:3 * i + 3]
        with open(self.path, "rb") as file:      # anew: processes must not share a file position
            file.seek(start)
            entry = json.loads(file.read(end - start))
        return entry | {"id": str(entry.get("id", f"{self.path.name}:{number}")),
                        "image": [str(self.images / name) for name in image_names(entry)]}


def _entries(file) -> Iterator[tuple[int, int, str, object]]:
    """(first byte, last byte, line or id, the object, or the error that it is not JSON)"""
    head = file.read(1024)
    start = len(head) - len(head.lstrip(b"\xef\xbb\xbf \t\r\n"))
    file.seek(start)
    if head[start:start + 1] == b"[":
        return _list_entries(file)
    if not isinstance(_parse(file.readline()), dict):
        raise UserError(f"{quoted(file.name)}: neither a JSON list of conversations nor one JSON "
                        "object a line")
    file.seek(start)
    return _line_entries(file)


def _line_entries(file) -> Iterator[tuple[int, int, str, object]]:
    for number, line in enumerate(iter(file.readline, b""), start=1):
        if line.strip():
            yield file.tell() - len(line), file.tell(), f"line {number}", _parse(line)


def _parse(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _list_entries(file) -> Iterator[tuple[int, int, str, object]]:
    """Decoded as Latin-1, a character is a byte: offsets are right, and no chunk ends in the middle
    of a character. An object with other characters is read again as UTF-8."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    base, number, at = file.tell() + 1, 0, 0
    text = file.read(CHUNK).decode("latin-1")[1:]
    while True:
        at = between.match(text, at).end()
        if text.startswith("]", at):
            return
        try:
            entry, end = decode(text, at)
        except (ValueError, RecursionError) as error:            # broken, or the chunk ends in it
            more = file.read(CHUNK)
            if not more or len(text) - at > CHUNK:
                raise UserError(
                    f"{quoted(file.name)}: conversation {number + 1}, at byte {base + at}, is not "
                    f"valid JSON ({error}); is the file whole?") from None
            text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
            continue
        number += 1
        if not text[at:end].isascii():
            entry = _parse(text[at:end].encode("latin-1"))
        has_id = isinstance(entry, dict) and "id" in entry
        yield base + at, base + end, f"id {entry['id']}" if has_id else f"entry {number}", entry
        at = end


def image_names(entry: dict) -> list:
    """"image" is absent, null, one name, or a list."""
    image = entry.get("image")
    return image if isinstance(image, list) else [image] if image else []


def find_problem(entry, images: Path | None) -> str | None:
    """Why a conversation cannot be trained on, as far as its text and its files' names tell."""
    if isinstance(entry, Exception):
        return f"not valid JSON: {entry}"
    try:
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
        speakers, texts = zip(*turns)
        readable = {*map(type, speakers + texts)} == {str}
    except (TypeError, KeyError, ValueError):                # ValueError: there are no turns
        readable = False
    if not readable:
        return 'no "conversations", a list of turns with "from" and "value"'
    if speakers[0] in ("system", "gpt"):                     # as encode_conversation
        if IMAGE_TEXT in texts[0]:
            return f"{IMAGE_TEXT} before the first question"
        speakers, texts = speakers[1:], texts[1:]
    answers = texts[1::2]
    if not answers or speakers != ("human", "gpt") * len(answers):
        return 'roles out of order: "human" and "gpt" must take turns, human first, gpt last'
    if not all(map(str.strip, answers)):
        return "an empty answer"
    if any(IMAGE_TEXT in answer for answer in answers):
        return f"{IMAGE_TEXT} in an answer"
    names = image_names(entry)
    placed = sum(text.count(IMAGE_TEXT) for text in texts)
    if placed != len(names):
        return f'{placed} {IMAGE_TEXT} in the text but {len(names)} in "image"'
    for name in names:
        if not isinstance(name, str):
            return 'an "image" that is no path'
        if images is None:
            return "a picture, but no folder of pictures was named: give --images"
        try:
            if not os.path.isfile(within(images, name)):
                return f"the picture {name!r} does not exist"
        except UserError as error:
            return f"the picture {error}"
    return None
