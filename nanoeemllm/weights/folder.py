"""Model folders: `config.json`, `model-*.safetensors` (at most 5 GB each), index, `tokenizer.json`.

    load(folder)                              a model, its tensors mapped from the files, not copied
    save(tensors, config, tokenizer, folder)  streams: holds one tensor at a time
"""

import dataclasses
import functools
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanoeemllm.border import typed
from nanoeemllm.border.files import open_regular, quoted, read_json, replace_folder
from nanoeemllm.config import ModelConfig, UserError, VisualPath
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import is_new_weight
from nanoeemllm.weights.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Lazy(NamedTuple):
    """A tensor that is read only when it is written. dtype None: one that we do not use."""
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], Tensor]


def load(folder, device=None, dtype: torch.dtype | None = None,
         visual_path: str | VisualPath | None = None, new_parts: bool = False) -> EEMLLM:
    """device: the GPU if there is one; dtype: as stored; visual_path: as configured. new_parts: to
    train another visual path, its own weights start at random and the old path's are left out.

    Raises UserError for files that are missing, broken, or hold other tensors than config.json
    asks for.
    """
    folder = Path(folder)
    config = read_config(folder)
    trained = config.visual_path
    if isinstance(visual_path, str):
        visual_path = config.path_named(visual_path)
    if visual_path is not None:
        config = dataclasses.replace(config, visual_path=visual_path)
    tokenizer = read_tokenizer(folder, config)
    with torch.device("meta"):
        model = EEMLLM(config, tokenizer)
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    state = {}
    for path, names in shards(folder, "model.safetensors").items():
        with open_safetensors(path, device) as file:
            listed(path, names, file.keys())
            state.update((name, file.get_tensor(name)) for name in file.keys())
    odd = [f"{name} is {x.dtype}" for name, x in state.items() if x.dtype not in DTYPES.values()]
    if odd:
        raise UserError(f"{quoted(folder)}: {odd[0]}; weights must be {', '.join(DTYPES)}")
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if new_parts:
        old = {name for name in state if is_new_weight(name) and name not in expected}
        state = {name: x for name, x in state.items() if name not in old}
        new = {name: shape for name, shape in expected.items()
               if is_new_weight(name) and name not in state}
        stored = next((x.dtype for x in state.values()), None)
        state |= {name: x.to(device, stored) for name, x in random_weights(new).items()}
    elif config.visual_path != trained and any(map(is_new_weight, expected.keys() ^ state.keys())):
        raise UserError(f"{quoted(folder)} was trained as {trained.name}; "
                        f"{config.visual_path.name} as asked for has other weights of its own: "
                        f"train them with train.py --stage pretrain --init {quoted(folder)} "
                        "and the same visual path")
    check_tensors(folder, expected, {name: tuple(x.shape) for name, x in state.items()})
    model.load_state_dict({name: state.pop(name).to(dtype=dtype) for name in list(state)},
                          assign=True)
    return model


def read_config(folder: Path) -> ModelConfig:
    path = Path(folder) / "config.json"
    return typed.read_config(read_json(path), quoted(path))


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    return Tokenizer(Path(folder) / "tokenizer.json", config.eos_token_ids, config.bos_token_ids)


def random_weights(shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """For parts that are yet to be trained, the same in every run: matrices of standard deviation
    0.02, biases and gates 0, norms 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            weights[name] = 0.02 * torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.full(shape, float("norm" in name))
    return weights


# ---- writing ----

def save(tensors: Mapping[str, Tensor | Lazy], config: ModelConfig, tokenizer: Tokenizer, folder,
         progress: bool = False) -> None:
    """Writes a model folder, in place of an older one. Raises UserError where the disk is full, or
    where folder holds something that is no model."""
    check_replaceable(folder, force=True)
    with replace_folder(folder) as aside:
        write_weights(aside, tensors, progress)
        (aside / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        write_json(aside / "config.json", config.to_dict())


def is_model(folder) -> bool:
    """Whether the folder is one of ours; a published config.json has no "llama" in it."""
    path = Path(folder) / "config.json"
    return path.is_file() and "llama" in read_json(path)


def check_replaceable(folder, force: bool) -> None:
    """Raises UserError unless folder is absent, empty, or, with force, a model folder."""
    folder = Path(folder)
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not is_model(folder):
        raise UserError(f"{quoted(folder)} is there already and is no model folder: choose another "
                        "place")
    if not force:
        raise UserError(f"{quoted(folder)} holds a model already: give --force to replace it, or "
                        "another --out")


def write_weights(folder: Path, tensors: Mapping[str, Tensor | Lazy], progress: bool) -> None:
    """Shards and their index, as transformers names them."""
    parts, size, weight_map = [{}], 0, {}
    for name, x in tensors.items():
        size += _bytes(x)
        if size > SHARD_BYTES and parts[-1]:
            parts.append({})
            size = _bytes(x)
        parts[-1][name] = x
    with tqdm(total=len(tensors), unit="tensor", disable=None if progress else True) as bar:
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            _write_shard(folder / file, part, bar)
            weight_map.update(dict.fromkeys(part, file))
    total = sum(map(_bytes, tensors.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, tensors: dict[str, Tensor | Lazy], bar: tqdm) -> None:
    """The safetensors format: header size (8 bytes), JSON header padded to 8 bytes, the numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, x in tensors.items():
        start, end = end, end + _bytes(x)
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            x = x.load() if isinstance(x, Lazy) else x
            file.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.update()


def _bytes(x: Tensor | Lazy) -> int:
    return x.dtype.itemsize * torch.Size(x.shape).numel()


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


# ---- reading, of our folders and of published ones ----

def shards(folder: Path, single: str) -> dict[Path, list[str]]:
    """file -> the tensors that the index `single`.index.json places in it; without an index, the
    one file `single` and no names. Raises UserError for an index that leaves the folder."""
    index = folder / (single + ".index.json")
    if not index.exists():
        return {folder / single: []}
    weight_map, files = read_json(index).get("weight_map"), {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{quoted(index)}: weight_map must say in which file each tensor is")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]*\w", file):
            raise UserError(f"{quoted(index)}: {file!r} is not the name of a file in this folder")
        files.setdefault(folder / file, []).append(name)
    return files


def open_safetensors(path: Path, device: str = "cpu"):
    open_regular(path).close()                   # the library would wait for a FIFO's writer
    try:
        return safe_open(path, "pt", device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{quoted(path)} is damaged or cut off ({error}); download it again"
                        ) from None


def read_safetensors(path: Path, names: list[str]) -> dict[str, Lazy]:
    """A file's tensors, unread."""
    def load(name: str) -> Tensor:
        with open_safetensors(path) as file:
            return file.get_tensor(name)

    tensors = {}
    with open_safetensors(path) as file:
        for name in listed(path, names, file.keys()):
            about = file.get_slice(name)
            tensors[name] = Lazy(tuple(about.get_shape()), DTYPES.get(about.get_dtype()),
                                 functools.partial(load, name))
    return tensors


def listed(path: Path, names: list[str], held: Iterable[str]) -> list[str]:
    """The tensors to read from a file: those that the index names, all of them there, or all."""
    absent = sorted(set(names) - set(held))
    if absent:
        raise UserError(f"{quoted(path)} lacks {len(absent)} tensors that the index places in it: "
                        + _first(absent))
    return names or list(held)


def check_tensors(where, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raises one UserError that names what is missing, unexpected, or of another shape."""
    wrong = [f"{name} is {found[name]}, not {expected[name]}"
             for name in sorted(expected.keys() & found.keys()) if found[name] != expected[name]]
    problems = [(sorted(expected.keys() - found.keys()), "missing"),
                (sorted(found.keys() - expected.keys()), "unexpected"), (wrong, "of another shape")]
    lines = [f"{len(names)} {what}: {_first(names)}" for names, what in problems if names]
    if lines:
        raise UserError(f"{quoted(where)}: the tensors do not fit the configuration. "
                        + "; ".join(lines))


def _first(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
