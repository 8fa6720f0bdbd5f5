"""Model folders: `config.json`, `model-*.safetensors` (at most 5 GB each) with their index, `tokenizer.json`.

    load(folder)                              -> a model, its tensors mapped from the files, not copied
    save(tensors, config, tokenizer, folder)  streams: holds one tensor at a time

A folder is written beside its place, flushed to the disk and renamed, so it is whole or absent.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoeemllm.config import ModelConfig, UserError, VisualPathConfig
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import Tokenizer
from nanoeemllm.visual_path import learns_in_pretrain

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Lazy(NamedTuple):
    """A tensor that is read only when it is written."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def load(folder, device=None, dtype: torch.dtype | None = None, visual_path: str | VisualPathConfig | None = None,
         new_parts: bool = False) -> EEMLLM:
    """device: the GPU if there is one; dtype: as stored; visual_path: as configured. new_parts: to
    train another visual path, its own weights begin at random and the old path's are left out.

    Raises UserError for files that are missing, broken, or hold other tensors than config.json asks for.
    """
    folder = Path(folder)
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    trained = config.visual_path
    if visual_path is not None:
        if isinstance(visual_path, str):
            visual_path = dataclasses.replace(config.visual_path, name=visual_path)
        config = dataclasses.replace(config, visual_path=visual_path)
    with torch.device("meta"):
        model = EEMLLM(config, Tokenizer(folder / "tokenizer.json"))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    state = {}
    for path, names in shards(folder, "model.safetensors").items():
        with open_safetensors(path, str(device)) as file:
            state.update((name, file.get_tensor(name)) for name in listed(path, names, file.keys()))
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if new_parts:
        # what a visual path has of its own is what stage 1 trains
        new = {name: shape for name, shape in expected.items() if learns_in_pretrain(name) and name not in state}
        state = {name: x for name, x in state.items() if name in expected or not learns_in_pretrain(name)}
        state |= {name: x.to(device, next(iter(state.values())).dtype) for name, x in random_weights(new).items()}
    elif config.visual_path != trained and any(map(learns_in_pretrain, expected.keys() ^ state.keys())):
        raise UserError(f"{folder} was trained as {trained.name}; {config.visual_path.name} as asked for has other weights of "
                        f"its own: train them with train.py --stage pretrain --init {folder} and the same visual path")
    check_tensors(folder, expected, {name: tuple(x.shape) for name, x in state.items()})
    odd = next((f"{name} is {x.dtype}" for name, x in state.items() if x.dtype not in _DTYPE_NAMES), None)
    if odd:
        raise UserError(f"{folder}: {odd}; weights must be float32, bfloat16 or float16")
    model.load_state_dict({name: state.pop(name).to(dtype=dtype) for name in list(state)}, assign=True)
    return model


def random_weights(shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """For parts that are yet to be trained, the same in every run: spread 0.02, biases and gates 0, norms 1."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(shape, generator=generator) if len(shape) > 1
            else torch.ones(shape) if "norm" in name else torch.zeros(shape) for name, shape in shapes.items()}


def save(tensors: Mapping[str, Tensor | Lazy], config: ModelConfig, tokenizer: Tokenizer, folder) -> None:
    """Writes a model folder, in place of an older one. Raises UserError where the disk is full, or where
    folder holds something that is no model.
    """
    with written_aside(Path(folder).absolute()) as aside:
        parts, size, weight_map = [{}], 0, {}
        for name, x in tensors.items():
            size += _bytes(x)
            if size > SHARD_BYTES and parts[-1]:
                parts.append({})
                size = _bytes(x)
            parts[-1][name] = x
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            _write_shard(aside / file, part)
            weight_map.update(dict.fromkeys(part, file))
        _write(aside / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1).encode())
        _write(aside / "tokenizer.json", tokenizer.to_json().encode())
        _write(aside / "config.json", json.dumps(config.to_dict(), indent=2).encode())


@contextlib.contextmanager
def written_aside(folder: Path):
    """Gives an empty folder to write into; when all went well it takes folder's place."""
    check_replaceable(folder)
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def is_model(folder: Path) -> bool:
    """Whether the folder is one of ours; a published one has a config.json too, but no "llama" in it."""
    return (folder / "config.json").is_file() and "llama" in read_json(folder / "config.json")


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless folder is absent, empty, or a model folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not is_model(folder):
        raise UserError(f"{folder} is there already and is no model folder: choose another place")


def _write_shard(path: Path, tensors: dict[str, Tensor | Lazy]) -> None:
    """The safetensors format: header size (8 bytes), JSON header padded to 8 bytes, then the numbers."""
    header, end = {}, 0
    for name, x in tensors.items():
        start, end = end, end + _bytes(x)
        header[name] = {"dtype": _DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            x = x.load() if isinstance(x, Lazy) else x
            file.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    _flush(path)


def _bytes(x: Tensor | Lazy) -> int:
    return x.dtype.itemsize * torch.Size(x.shape).numel()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _flush(path)


def _flush(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object")
    return data


def shards(folder: Path, single: str) -> dict[Path, list[str]]:
    """file -> the tensors that the index `single`.index.json places in it; without an index, the one file `single`
    and no names. Raises UserError for an index that leaves the folder, and for a file that is not there.
    """
    index = folder / (single + ".index.json")
    if not index.is_file():
        return {folder / single: []}
    weight_map, files = read_json(index).get("weight_map"), {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must say in which file each tensor is")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]*\w", file):
            raise UserError(f"{index}: {file!r} is not the name of a file in this folder")
        files.setdefault(folder / file, []).append(name)
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {index.name} lists it; download it again")
    return files


def open_safetensors(path: Path, device: str = "cpu"):
    try:
        return safe_open(path, "pt", device=device)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); download it again") from None


def listed(path: Path, names: list[str], held) -> list[str]:
    """The tensors to read from a file: those that the index names, all of them there, or all that it holds."""
    absent = sorted(set(names) - set(held))
    if absent:
        raise UserError(f"{path} lacks {len(absent)} tensors that the index places in it: {_first(absent)}")
    return names or list(held)


def check_tensors(where, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raises one UserError that names what is missing, unexpected, or of another shape."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [f"{name} is {found[name]}, not {expected[name]}" for name in sorted(expected.keys() & found.keys())
             if found[name] != expected[name]]
    lines = [f"{len(names)} {what}: {_first(names)}" for what, names in
             (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)) if names]
    if lines:
        raise UserError(f"{where}: the tensors do not fit the configuration. " + "; ".join(lines))


def _first(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
