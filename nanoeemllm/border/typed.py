"""What comes from outside as JSON, read by type: every number has a range, every key is known, and
all is checked before anything is allocated or looped over."""

import dataclasses
import math
from types import UnionType
from typing import get_args, get_origin

from nanoeemllm.config import ModelConfig, UserError, VisualPath
from nanoeemllm.paths import PATHS, lookup

MOST = 2 ** 20       # of a whole number, where nothing else is said


def read_config(data: dict, where: str = "config") -> ModelConfig:
    """A model folder's config.json. Raises UserError that names the key, for an unknown key or a
    value that does not fit."""
    return read_typed(ModelConfig, split_paths(data), where)


def split_paths(data: dict) -> dict:
    """Folders of the first edition hold the settings of all paths in one object. Those of other
    paths than the model's own (yopo's calibrated heads) are still meant: they are other_paths."""
    path = data.get("visual_path")
    if "other_paths" in data or not isinstance(path, dict):
        return data
    fields = {name: {f.name for f in dataclasses.fields(kind)} for name, kind in PATHS.items()}
    own, others = fields.get(str(path.get("name")), set()), []
    for name, settings in fields.items():
        given = {key: path[key] for key in path if key in settings - own}
        if given:
            others.append({"name": name, **given})
            path = {key: path[key] for key in path if key not in given}
    return {**data, "visual_path": path, "other_paths": others}


def read_typed(kind, value, where: str, least=None, most=MOST):
    """A JSON value as `kind`, checked to the bottom: a dataclass from an object, a tuple from a
    list, a number from its range. Raises UserError that names the place."""
    if isinstance(kind, type) and issubclass(kind, VisualPath):
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise UserError(f"{where} must be an object with a name")
        kind, value = lookup(value["name"]), {key: value[key] for key in value if key != "name"}
    if get_origin(kind) is UnionType:                                    # X | None
        return None if value is None else read_typed(get_args(kind)[0], value, where, least, most)
    if dataclasses.is_dataclass(kind):
        return read_object(kind, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) > most:
            raise UserError(f"{where} must be a list, not {value!r:.80}")
        inner = get_args(kind)[0]
        return tuple(read_typed(inner, item, f"{where}[{i}]", 0 if least is None else least, most)
                     for i, item in enumerate(value))
    if kind in (str, bool):
        if type(value) is not kind:
            raise UserError(f"{where} must be a {kind.__name__}, not {value!r:.80}")
        return value
    if type(value) not in (int, kind) or isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a {'whole ' * (kind is int)}number, not {value!r:.80}")
    least = (1 if kind is int else 2 ** -100) if least is None else least
    if not least <= value <= (most if kind is int else 2 ** 100):
        raise UserError(f"{where} is {value!s:.80}; it must be from {least:g} to {most}")
    return kind(value)


def read_object(kind, value, where: str):
    """A JSON object as a dataclass; unknown keys are refused."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, not {type(value).__name__}")
    known, found = {f.name: f for f in dataclasses.fields(kind)}, {}
    for key, item in value.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
        limits = known[key].metadata
        found[key] = read_typed(known[key].type, item, f"{where}.{key}", limits.get("least"),
                                limits.get("most", MOST))
    for name, f in known.items():
        if f.default is f.default_factory is dataclasses.MISSING and name not in found:
            raise UserError(f"{where}: {name} is missing")
    return kind(**found)
