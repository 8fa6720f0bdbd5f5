"""Files that come from outside, and files that must be whole whatever happens.

Reading: a file is looked at before it is opened, so that a FIFO or a device hangs nothing. Writing:
beside its place, flushed to the disk, then renamed, so that at every moment a name holds what it
held before or what it is to hold, whole.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from nanoeemllm.config import UserError


def quoted(path) -> str:
    """A file's name for a message: in quotes, on one line, where it is not a plain word."""
    text = str(path)
    return text if text.isprintable() and text and " " not in text else repr(text)


def open_regular(path) -> BinaryIO:
    """Opens a regular file for reading. Raises UserError for anything else, without opening it."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            # Should it have become a FIFO since, O_NONBLOCK does not wait for a writer.
            return open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))
        why = "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file"
    except FileNotFoundError:
        why = "no such file"
    except (OSError, ValueError) as error:           # ValueError: a zero byte in the name
        why = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"{quoted(path)}: {why}")


def read_json(path) -> dict:
    """The object in a JSON file. NaN and numbers beyond a float's range are refused."""
    with open_regular(path) as file:
        try:
            data = json.loads(file.read(), parse_constant=_finite, parse_float=_finite)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{quoted(path)} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{quoted(path)} must hold a JSON object, not {type(data).__name__}")
    return data


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def within(folder, name: str) -> str:
    """The path of folder/name. Raises UserError for a name that leads out of the folder, being
    absolute or by its "..". Links that the folder's owner has made may lead anywhere."""
    path = os.path.join(folder, name)
    with contextlib.suppress(ValueError):            # a zero byte: there is no such file
        leaves = os.path.isabs(name)
        if ".." in name:                             # follows a link first, as the system does
            root, real = os.path.realpath(folder), os.path.realpath(path)
            leaves = leaves or os.path.commonpath([root, real]) != root
        if leaves:
            raise UserError(f"{name!r} is outside of the image folder {quoted(folder)}")
    return path


# ---- writing ----

def make_folder(folder: Path):
    """And those above it. Raises UserError where the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {quoted(folder)}: {error.strerror}") from error


def write_aside(path: Path, data: bytes):
    """Writes a file or leaves the one before. Raises UserError where it cannot be written, and in
    place of a folder or a device."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is there and is not a regular file")
        aside.write_bytes(data)
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"cannot write {quoted(path)}: {error.strerror}") from error


def flush(path: Path):
    """Onto the disk: a file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replace_folder(folder):
    """Gives an empty folder to write into. When all went well it takes folder's place, and at no
    moment is there neither. Raises UserError where the system refuses."""
    folder = Path(os.path.realpath(folder))
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    lock = None
    try:
        finish_replacement(folder)
        aside.mkdir(parents=True)
        lock = _lock(aside)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            flush(path)
        if not folder.exists():
            aside.rename(folder)
        elif not _exchange(aside, folder):           # then finish_replacement knows what to do
            folder.rename(aside.with_name(f".{folder.name}.old-{os.getpid()}"))
            aside.rename(folder)
        flush(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write {quoted(folder)}: {error.strerror or error}") from error
    finally:
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):
            finish_replacement(folder)


def finish_replacement(folder: Path):
    """Ends what a process that is gone left half done beside the folder; removes its leftovers."""
    folder = Path(os.path.realpath(folder))
    old = _abandoned(folder, "old")
    if old and not folder.exists():                  # killed between the two renames
        old.pop().rename(folder)
    for path in old + _abandoned(folder, "writing"):
        shutil.rmtree(path, ignore_errors=True)


def _abandoned(folder: Path, what: str) -> list[Path]:
    """Folders `.NAME.writing-PID` or `.NAME.old-PID` that no living process holds."""
    found = []
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.{what}-[0-9]*"):
        with contextlib.suppress(OSError):
            os.close(_lock(path))
            found.append(path)
    return found


def _lock(folder: Path) -> int:
    """Held until it is closed or the process ends, however it ends. Raises OSError if another has
    it. (A process's number would not do: in a container the next process may have the same.)"""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux: renameat2). Returns whether the system could."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, swap = -100, 2                           # AT_FDCWD, RENAME_EXCHANGE
    if rename is None:
        return False
    return rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap) == 0
