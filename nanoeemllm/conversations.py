"""Conversations on disk: LLaVA's JSON, a list or one object a line, indexed once and read as it is needed.

    [{"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
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

from nanoeemllm.config import UserError
from nanoeemllm.prompt import IMAGE_TEXT

CHUNK = 16 << 20      # bytes read at once from a JSON list


class ConversationFile:
    """LLaVA's JSON, a list or one object a line; element i is the conversation with its pictures' whole paths.

    Opening reads the file once, object by object, and keeps only where each lies (16 bytes a conversation). What can
    be seen without decoding pictures is checked on the way: what cannot be used is left out and told in `problems`,
    [(line or id, reason), ...]. Raises UserError for a file that is no such JSON or has nothing usable.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None, progress: bool = True):
        self.path, self.images = Path(path), None if images is None else Path(images)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; --data names LLaVA's JSON")
        if images is not None and not self.images.is_dir():
            raise UserError(f"{images}: no such folder; --images names the folder that the pictures are in")
        self.problems: list[tuple[str, str]] = []
        self._bounds, self._number = array("q"), array("q")   # first and last byte; place in the file, from 1
        with open(self.path, "rb") as file, tqdm(desc=f"indexing {self.path.name}", unit="B", unit_scale=True,
                                                 total=self.path.stat().st_size,
                                                 disable=None if progress else True) as bar:
            for number, (start, end, where, entry) in enumerate(_entries(file), start=1):
                problem = entry if isinstance(entry, str) else find_problem(entry, self.images)
                if problem:
                    self.problems.append((where, problem))
                else:
                    self._bounds.extend((start, end))
                    self._number.append(number)
                bar.update(end - bar.n)
        if not self._number:
            why = " ({}: {})".format(*self.problems[0]) if self.problems else ""
            raise UserError(f"{path}: not one conversation that can be used{why}")

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, i: int) -> dict:
        start, end = self._bounds[2 * i:2 * i + 2]
        with open(self.path, "rb") as file:      # opened anew: worker processes must not share a place in the file
            file.seek(start)
            entry = json.loads(file.read(end - start))
        return entry | {"id": str(entry.get("id", f"{self.path.name}:{self._number[i]}")),
                        "image": [str(self.images / name) for name in pictures_of(entry)]}


def _entries(file) -> Iterator[tuple[int, int, str, object]]:
    """(first byte, last byte, line or id, the object or, as a string, why there is none)."""
    head = file.read(1024)
    start = len(head) - len(head.lstrip(b"\xef\xbb\xbf \t\r\n"))
    file.seek(start)
    if head[start:start + 1] == b"[":
        return _list_entries(file)
    if head[start:start + 1] == b"{":
        return _line_entries(file)
    raise UserError(f"{file.name}: neither a JSON list of conversations nor one JSON object a line")


def _line_entries(file) -> Iterator[tuple[int, int, str, object]]:
    start = file.tell()
    for number, line in enumerate(file, start=1):
        end = start + len(line)
        if line.strip():
            try:
                yield start, end, f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == 1:
                    raise UserError(f"{file.name}: neither a JSON list of conversations nor one JSON object a line "
                                    f"({error})") from None
                yield start, end, f"line {number}", f"not valid JSON: {error}"
        start = end


def _list_entries(file) -> Iterator[tuple[int, int, str, object]]:
    """Decoded as Latin-1, a character is a byte: offsets are right and nothing is cut in a chunk's last character.

    The strings are then mojibake, which is enough to find objects, and an object found wanting is read again rightly.
    """
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    base, text, number, at = file.tell() + 1, file.read(CHUNK).decode("latin-1")[1:], 0, 0
    while True:
        at = between.match(text, at).end()
        if text.startswith("]", at):
            return
        try:
            entry, end = decode(text, at)
        except (ValueError, RecursionError) as error:            # broken, or cut by the end of the chunk
            more = file.read(CHUNK)
            if not more or len(text) - at > CHUNK:
                raise UserError(f"{file.name}: conversation {number + 1}, at byte {base + at}, is not valid JSON "
                                f"({error}); is the file whole?") from None
            text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
            continue
        number += 1
        if not isinstance(entry, dict) or not str(entry.get("image", "")).isascii():
            try:
                entry = json.loads(text[at:end].encode("latin-1"))
            except ValueError as error:
                entry = f"not valid JSON: {error}"
        where = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"entry {number}"
        yield base + at, base + end, where, entry
        at = end


def pictures_of(entry: dict) -> list:
    """Names of its pictures: "image" is absent, null, one name, or a list."""
    image = entry.get("image")
    return image if isinstance(image, list) else [image] if image else []


def find_problem(entry, images: Path | None) -> str | None:
    """Why a conversation cannot be learned from, as far as that can be seen without decoding its pictures."""
    if not isinstance(entry, dict):
        return "not an object"
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        return 'no "conversations"'
    if not all(isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
               for turn in turns):
        return 'a turn without "from" or "value"'
    talk = turns[1:] if turns[0]["from"] in ("system", "gpt") else turns     # as encode_conversation has it
    if talk is not turns and IMAGE_TEXT in turns[0]["value"]:
        return f"{IMAGE_TEXT} before the first question"
    if [turn["from"] for turn in talk] != ["human", "gpt"] * (len(talk) // 2) or not talk:
        return 'roles out of order: "human" and "gpt" must take turns, human first, gpt last'
    if not all(turn["value"].strip() for turn in talk[1::2]):
        return "an empty answer"
    if any(IMAGE_TEXT in turn["value"] for turn in talk[1::2]):
        return f"{IMAGE_TEXT} in an answer"
    names = pictures_of(entry)
    placed = sum(turn["value"].count(IMAGE_TEXT) for turn in talk)
    if placed != len(names):
        return f'{placed} {IMAGE_TEXT} in the text but {len(names)} in "image"'
    return next((problem for name in names if (problem := _find_picture_problem(name, images))), None)


def _find_picture_problem(name, images: Path | None) -> str | None:
    if not isinstance(name, str):
        return 'an "image" that is no path'
    if images is None:
        return "a picture, but no folder of pictures was named: give --images"
    # By its name alone: links that the owner of the folder has put into it may lead where they like.
    if os.path.isabs(name) or (".." in name and os.path.normpath(name).split(os.sep)[0] == ".."):
        return f"the picture {name!r} is outside of the image folder"
    return None if os.path.isfile(os.path.join(images, name)) else f"the picture {name!r} does not exist"


def describe_problems(source: ConversationFile, shown: int = 10) -> list[str]:
    """Lines for the user: how many conversations are unusable and the first of them. Empty if none is."""
    if not source.problems:
        return []
    total, count = len(source) + len(source.problems), len(source.problems)
    lines = [f"{source.path}: {count:,} of {total:,} conversations cannot be used and are left out:"]
    lines += [f"  {where}: {reason}" for where, reason in source.problems[:shown]]
    return lines + [f"  ... and {count - shown:,} more"] * (count > shown)
