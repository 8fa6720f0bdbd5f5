"""How every command reads its flags and ends.

Exit code 0: done, or the reader of the output has left (| head). 2: the user can mend it, one line
on stderr says how. 130: Ctrl-C. Any other exception is a defect and shows its traceback.
"""

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable

import torch

from nanoeemllm.config import UserError

# What the machine refuses: a full disk, a folder without rights, a name too long.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
           errno.ENAMETOOLONG, errno.ENOTDIR, errno.EIO}


def run_command(main: Callable[[], None], goes_on: bool = False):
    """Runs a command's main() and ends the process. goes_on: it runs to its end even where the
    reader of its output has left, as a training run must; others end then."""
    _open_output(goes_on)
    code, message = 0, None
    try:
        try:
            os.getcwd()
        except OSError as error:
            raise UserError("the working directory was deleted: change to another one") from error
        main()
        sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        pass
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        message = f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    if message is not None:
        code = 2
        with contextlib.suppress(OSError):
            print(f"error: {printable(message[:4000])}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)              # or Python would try once more, and complain
    sys.exit(code)


def printable(text: str) -> str:
    """The text on one line: control characters are written as Python does, as in \\n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Lasting(io.FileIO):
    """A stream that goes nowhere once its reader has left."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _to_nowhere(self)
            return len(data)


def _open_output(goes_on: bool):
    """Makes stdout and stderr fit to be written to: what was closed goes nowhere, and what the
    terminal's encoding lacks is printed as a question mark."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:                   # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", errors="replace"))
        elif goes_on and stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Lasting(number, "w", closefd=False))
            lasting = io.TextIOWrapper(raw, stream.encoding, "replace", line_buffering=True)
            setattr(sys, name, lasting)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _to_nowhere(stream):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# ---- flags ----

class Parser(argparse.ArgumentParser):
    """argparse's, with a help text that keeps its lines, and one line for what is wrong."""

    def __init__(self, description: str, prog: str | None = None):
        super().__init__(prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message} (--help tells more)")


def positive(number: type, or_zero: bool = False, most: float = 10**8) -> Callable:
    """A type for argparse: an int or a float over 0 (or_zero: not under it), up to `most`."""
    def parse(text: str):
        try:
            value = number(text)
        except ValueError:
            value = -1
        if 0 < value <= most or (or_zero and value == 0):
            return value
        least = "of 0 or more" if or_zero else "over 0"
        kind = number.__name__
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind} {least}, up to {most:,}")
    return parse


def from_environment(name: str, default: int) -> int:
    """A number that torchrun has set, from 0 to 1,000,000."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 6):
        raise UserError(f"the environment's {name} is {text!r}, not a whole number from 0: "
                        "start several processes with torchrun, or unset it")
    return int(text)


def processes() -> tuple[int, int, int]:
    """This process's rank, how many there are, and how many of them here, as torchrun says."""
    rank, size = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    here = from_environment("LOCAL_WORLD_SIZE", 1)
    told = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not (rank < size and here > 0) or (size > 1 and not told):
        raise UserError(f"the environment says process {rank} of {size}, and not where the others "
                        "are: start several with torchrun, or unset RANK and WORLD_SIZE")
    return rank, size, here


def device_from(name: str | None) -> str:
    """The device that --device names, or the first there is. Under torchrun every process has a GPU
    of its own. Raises UserError for a device that this machine lacks."""
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    device = f"cuda:{from_environment('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        if torch.device(device).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):           # PyTorch asserts that it was built for it
        raise UserError(f"--device {name}: there is none here; leave it out, or give cpu") from None
    return device
