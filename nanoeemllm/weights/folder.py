"""Model folders: `config.json`, `model-*.safetensors` (at most 5 GB each), index, `tokenizer.json`.

    load(folder)                              a model, its tensors mapped from the files, not copied
    save(tensors, config, tokenizer, folder)  streams: holds one tensor at a time
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanoeemllm.border import typed
from nanoeemllm.border.files import quoted, read_json, replace_folder
from nanoeemllm.config import ModelConfig, UserError, VisualPath
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import is_new_weight
from nanoeemllm.weights.initialize import random_weights
from nanoeemllm.weights.tensors import (DTYPES, Lazy, check_tensors, read_weights, write_json,
                                        write_weights)
from nanoeemllm.weights.tokenizer import Tokenizer


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
    config = dataclasses.replace(config, visual_path=visual_path or trained)
    with torch.device("meta"):
        model = EEMLLM(config, read_tokenizer(folder, config))
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    state, expected = read_weights(folder, device), model.state_dict()
    for name, x in state.items():
        if x.dtype not in DTYPES:
            raise UserError(f"{quoted(folder)}: {name} is {x.dtype}; weights must be "
                            + ", ".join(DTYPES.values()))
    other = {name for name in expected.keys() ^ state.keys() if is_new_weight(name)}
    new = {name: x for name, x in expected.items() if name in other} if new_parts else {}
    if new_parts:
        state = {name: x for name, x in state.items() if name not in other}
    elif other and config.visual_path != trained:
        raise UserError(f"{quoted(folder)} was trained as {trained.name}; "
                        f"{config.visual_path.name} as asked for has other weights of its own: "
                        f"train them with train.py --stage pretrain --init {quoted(folder)} "
                        "and the same visual path")
    check_tensors(folder, {name: x for name, x in expected.items() if name not in new}, state)
    if new:
        words = state["decoder.embed_tokens.weight"]
        for name, x in random_weights(new, config, words).items():
            state[name] = x.to(device, words.dtype)
    model.load_state_dict({name: state.pop(name).to(dtype=dtype) for name in list(state)},
                          assign=True)
    return model


def read_config(folder: Path) -> ModelConfig:
    path = Path(folder) / "config.json"
    data = read_json(path)
    if isinstance(data, dict) and "model_type" in data:
        raise UserError(f"{quoted(path)} is a published model's: convert_weights.py makes a model "
                        "folder of it")
    return typed.read_config(data, quoted(path))


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    bos = config.bos_token_ids
    return Tokenizer(Path(folder) / "tokenizer.json", [config.eos_token_ids],
                     None if bos is None else [bos])


def save(tensors: Mapping[str, Tensor | Lazy], config: ModelConfig, tokenizer: Tokenizer, folder):
    """Writes a model folder, in place of an older one. Raises UserError where the disk is full, or
    where folder holds something that is no model."""
    check_replaceable(folder, force=True)
    with replace_folder(folder) as aside:
        write_weights(aside, tensors)
        (aside / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        write_json(aside / "config.json", config.to_dict())


def is_model(folder) -> bool:
    """Whether the folder is one of ours; a published config.json has no "llama" in it."""
    path = Path(folder) / "config.json"
    return path.is_file() and "llama" in read_json(path)


def check_replaceable(folder, force: bool):
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
