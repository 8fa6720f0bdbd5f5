"""What comes from outside as JSON, read by type: every number has a range, every key is known, and
all is checked before anything is allocated or looped over."""

import dataclasses
from types import UnionType
from typing import get_args, get_origin

from nanoeemllm.config import ModelConfig, UserError, VisualPath
from nanoeemllm.paths import lookup

# What we read -> the JSON it is written as.
JSON = {dict: ((dict,), "an object"), tuple: ((list, tuple), "a list"), str: ((str,), "a text"),
        bool: ((bool,), "true or false"), int: ((int,), "a whole number"),
        float: ((int, float), "a number")}
RANGE = {int: (1, 2 ** 20), float: (2 ** -100, 2 ** 100)}     # where a field says nothing else


def read_config(data: dict, where: str = "config") -> ModelConfig:
    """A model folder's config.json. Raises UserError that names the key, for an unknown key or a
    value that does not fit."""
    return read_typed(ModelConfig, data, where)


def read_typed(kind, value, where: str, least: float | None = None, most: float | None = None):
    """A JSON value as `kind`, checked to the bottom: a dataclass from an object, a tuple from a
    list, a number from its range. Raises UserError that names the place."""
    if get_origin(kind) is UnionType:                                    # X | None
        return None if value is None else read_typed(get_args(kind)[0], value, where, least, most)
    plain = dict if dataclasses.is_dataclass(kind) else get_origin(kind) or kind
    types, name = JSON[plain]
    if type(value) not in types:
        raise UserError(f"{where} must be {name}, not {value!r:.80}")
    if plain is dict:
        return read_object(kind, value, where)
    if plain is tuple:
        inner = get_args(kind)[0]
        return tuple(read_typed(inner, item, f"{where}[{i}]", least, most)
                     for i, item in enumerate(value))
    if plain in RANGE:
        low, high = RANGE[plain]
        low, high = low if least is None else least, high if most is None else most
        if not low <= value <= high:                                     # nor is NaN
            raise UserError(f"{where} is {value!r:.80}; it must be from {low:g} to {high:g}")
    return kind(value)


def read_object(kind, value: dict, where: str):
    if issubclass(kind, VisualPath):                                     # which one, it says itself
        kind = lookup(str(value.get("name")))
        value = {key: value[key] for key in value if key != "name"}
    known, found = {f.name: f for f in dataclasses.fields(kind)}, {}
    for key, item in value.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
        limits = known[key].metadata
        found[key] = read_typed(known[key].type, item, f"{where}.{key}", limits.get("least"),
                                limits.get("most"))
    missing = [name for name, f in known.items() if name not in found
               and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return kind(**found)
