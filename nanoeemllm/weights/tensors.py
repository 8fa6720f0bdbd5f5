"""Files of weights. Reading maps them into memory and copies nothing; writing holds one tensor at a
time."""

import json
import math
import os
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

def read_weights(folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor of model*.safetensors or pytorch_model*.bin, mapped from the files."""
    for file, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index = folder / (file + ".index.json")
        if index.exists():
            return read_shards(index, read, device)
        if (folder / file).exists():
            return read(folder / file, device)
    raise UserError(f"{quoted(folder)} has no weights: neither model.safetensors nor "
                    "pytorch_model.bin, nor an index of either")


def read_shards(index: Path, read: Callable, device: str) -> dict[str, Tensor]:
    """The files that an index names. They must lie beside it and hold what it lists, no more and
    no less."""
    listed, held = read_json(index).get("weight_map"), {}
    if not isinstance(listed, dict):
        raise UserError(f"{quoted(index)}: weight_map must say in which file each tensor is")
    for file in sorted({str(file) for file in listed.values()}):
        if not re.fullmatch(r"[\w.-]*\w", file):
            raise UserError(f"{quoted(index)}: {file!r} is not the name of a file in this folder")
        held |= read(index.with_name(file), device)
    wrong = sorted(listed.keys() ^ held.keys())
    if wrong:
        raise UserError(f"{quoted(index)} and its files do not hold the same tensors: "
                        + ", ".join(wrong[:10]))
    return held


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
    except Exception:                            # a damaged file of the old form raises anything
        pass
    raise UserError(f"{quoted(path)} is refused: it is damaged, cut off, or holds more than "
                    "tensors, and a pickle that does can run any code. Download it again, or get "
                    "the safetensors")


def _is_plain(x) -> bool:
    """A tensor with its numbers, each in its place: not a sparse, nested or meta one."""
    return (isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
            and not x.is_meta)


def check_tensors(where, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]):
    """Raises one UserError that names what is missing, unexpected, of another shape, or not of
    floating-point numbers."""
    right, held = ({name: tuple(x.shape) for name, x in side.items()} for side in (expected, found))
    wrong = {
        "missing": [name for name in right if name not in held],
        "unexpected": [name for name in held if name not in right],
        "of another shape": [f"{name} is {held[name]}, not {shape}" for name, shape in right.items()
                             if held.get(name, shape) != shape],
        "of another type": [f"{name} is {x.dtype}" for name, x in found.items()
                            if not x.dtype.is_floating_point]}
    lines = [f"{len(names)} {what}: {', '.join(names[:10])}"
             for what, names in wrong.items() if names]
    if lines:
        raise UserError(f"{quoted(where)}: the tensors do not fit the configuration. "
                        + "; ".join(lines))


# ---- writing ----

def write_weights(folder: Path, tensors: Mapping[str, Tensor | Lazy]):
    """Shards and their index, as transformers names them. A file of the safetensors format is the
    header's size (8 bytes), a JSON header padded to 8 bytes, and the numbers; the library's own
    writer would hold all of a file's tensors."""
    headers, end = [], 0
    for name, x in tensors.items():
        start, end = end, end + x.nbytes
        if not headers or end > SHARD_BYTES:
            headers.append({})
            start, end = 0, x.nbytes
        headers[-1][name] = {"dtype": DTYPES[x.dtype], "shape": x.shape,
                             "data_offsets": [start, end]}
    weight_map, bar = {}, tqdm(total=len(tensors), unit="tensor", leave=False, disable=None)
    for number, header in enumerate(headers, 1):
        file = f"model-{number:05d}-of-{len(headers):05d}.safetensors"
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in header:
                x = tensors[name]
                x = x.load() if isinstance(x, Lazy) else x.detach()
                out.write(x.cpu().contiguous().view(-1).view(torch.uint8).numpy())
                bar.update()
                weight_map[name] = file
    bar.close()
    size = sum(x.nbytes for x in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_json(path: Path, data: dict):
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


def optional_json(path: Path) -> dict:
    return read_json(path) if os.path.lexists(path) else {}      # a link to nowhere is told
