"""Files of weights. Reading maps them into memory and copies nothing; writing holds one tensor at a
time."""

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanoeemllm.border.files import open_regular, quoted, read_json
from nanoeemllm.config import UserError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Lazy(NamedTuple):
    """A tensor that is made only when it is written."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


# ---- reading ----

def read_weights(folder: Path, device: str = "cpu", unlisted: bool = False) -> dict[str, Tensor]:
    """Every tensor of model*.safetensors or pytorch_model*.bin that the index lists, or without an
    index all; unlisted: all that the files hold, in any case."""
    for file, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index, held = folder / (file + ".index.json"), {}
        if index.exists():
            listed = read_index(index)
        elif (folder / file).exists():
            listed = {}
        else:
            continue
        for part in dict.fromkeys(listed.values()) or [file]:
            held |= read(folder / part, device)
        for name in listed:
            if name not in held:
                raise UserError(f"{quoted(index)} lists {name}, which no file holds")
        names = sorted(listed, key=listed.get)               # file by file
        return {name: held[name] for name in (held if unlisted else names or held)}
    raise UserError(f"{quoted(folder)} has no weights: neither model.safetensors nor "
                    "pytorch_model.bin, nor an index of either")


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> its file. Raises UserError for an index that leaves its folder."""
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{quoted(path)}: weight_map must say in which file each tensor is")
    for file in listed.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]*\w", file):
            raise UserError(f"{quoted(path)}: {file!r} is not the name of a file in this folder")
    return listed


def read_safetensors(path: Path, device: str) -> dict[str, Tensor]:
    open_regular(path).close()                   # the library would wait for a FIFO's writer
    try:
        with safe_open(path, "pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{quoted(path)} is damaged or cut off ({error}); download it again"
                        ) from None


def read_bin(path: Path, device: str) -> dict[str, Tensor]:
    """A file of the form before PyTorch 1.6, which is no zip archive, is copied into memory."""
    with open_regular(path) as file:
        mapped = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # of what is refused below
            held = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        if all(map(_is_plain, held.values())):
            return {str(name): x for name, x in held.items()}
        why = "holds something else than a table of plain tensors"
    except pickle.UnpicklingError:
        why = ("is refused: it is damaged or holds more than tensors, and a pickle that does can "
               "run any code. Download it again, or get the safetensors")
    except UnicodeEncodeError:
        why = "has a name that is not UTF-8: rename it"
    except Exception:                            # a damaged file of the old form raises anything
        why = "is damaged or cut off; download it again"
    raise UserError(f"{quoted(path)} {why}")


def _is_plain(x) -> bool:
    """A tensor with its numbers, each in its place: not a sparse, nested or meta one."""
    return (isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
            and not x.is_meta)


def check_tensors(where, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]):
    """Raises one UserError that names what is missing, unexpected, of another shape, or not
    of floating-point numbers."""
    right = {name: tuple(x.shape) for name, x in expected.items()}
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    problems = {
        "missing": [name for name in right if name not in shapes],
        "unexpected": [name for name in shapes if name not in right],
        "of another shape": [f"{name} is {shapes[name]}, not {right[name]}" for name in right
                             if shapes.get(name, right[name]) != right[name]],
        "of another type": [f"{name} is {x.dtype}" for name, x in found.items()
                            if not x.dtype.is_floating_point]}
    lines = []
    for what, names in problems.items():
        if names:
            more = ", ..." if len(names) > 10 else ""
            lines.append(f"{len(names)} {what}: {', '.join(names[:10])}{more}")
    if lines:
        raise UserError(f"{quoted(where)}: the tensors do not fit the configuration. "
                        + "; ".join(lines))


# ---- writing ----

def write_weights(folder: Path, tensors: Mapping[str, Tensor | Lazy], progress: bool):
    """Shards and their index, as transformers names them."""
    shards, size, weight_map = [{}], 0, {}
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    with tqdm(total=len(tensors), unit="tensor", disable=None if progress else True) as bar:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / file, shard, bar)
            weight_map |= dict.fromkeys(shard, file)
    total = sum(x.nbytes for x in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, tensors: dict[str, Tensor | Lazy], bar: tqdm):
    """The safetensors format: header size (8 bytes), JSON header padded to 8 bytes, the numbers.
    The library's own writer would hold all of them."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        start, end = end, end + x.nbytes
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            x = x.load() if isinstance(x, Lazy) else x
            file.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.update()


def write_json(path: Path, data: dict):
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
