"""What comes from outside as JSON, read by type: every number has a range, every key is known, and
all is checked before anything is allocated or looped over."""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import get_args, get_origin

from nanoeemllm.config import ModelConfig, UserError, VisualPath
from nanoeemllm.paths import PATHS, lookup

# What we read -> the JSON it is written as.
JSON = {dict: ((dict,), "an object"), tuple: ((list, tuple), "a list"), str: ((str,), "a text"),
        bool: ((bool,), "true or false"), int: ((int,), "a whole number"),
        float: ((int, float), "a number")}
RANGE = {int: {"least": 1, "most": 2 ** 20}, float: {"least": 2 ** -100, "most": 2 ** 100}}


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


def read_typed(kind, value, where: str, limits: Mapping[str, float] = {}):
    """A JSON value as `kind`, checked to the bottom: a dataclass from an object, a tuple from a
    list, a number from its range. limits: "least" and "most", where they differ from RANGE. Raises
    UserError that names the place."""
    if get_origin(kind) is UnionType:                                    # X | None
        return None if value is None else read_typed(get_args(kind)[0], value, where, limits)
    plain = dict if dataclasses.is_dataclass(kind) else get_origin(kind) or kind
    types, name = JSON[plain]
    if type(value) not in types:
        raise UserError(f"{where} must be {name}, not {value!r:.80}")
    if plain is dict:
        return read_object(kind, value, where)
    if plain is tuple:
        inner = get_args(kind)[0]
        return tuple(read_typed(inner, item, f"{where}[{i}]", limits)
                     for i, item in enumerate(value))
    if plain in RANGE:
        least, most = (limits.get(key, usual) for key, usual in RANGE[plain].items())
        if not least <= value <= most:                                   # nor is NaN
            raise UserError(f"{where} is {value!r:.80}; it must be from {least:g} to {most:g}")
    return kind(value)


def read_object(kind, value: dict, where: str):
    if issubclass(kind, VisualPath):                                     # which one, it says itself
        kind = lookup(str(value.get("name")))
        value = {key: value[key] for key in value if key != "name"}
    known, found = {f.name: f for f in dataclasses.fields(kind)}, {}
    for key, item in value.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
        field = known[key]
        found[key] = read_typed(field.type, item, f"{where}.{key}", field.metadata)
    missing = [name for name, f in known.items() if name not in found
               and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return kind(**found)
