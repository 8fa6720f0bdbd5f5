"""What comes from outside as JSON, read by type: every number has a range, every key is known, and
all is checked before anything is allocated or looped over."""

import dataclasses
import math
from types import UnionType
from typing import get_args, get_origin

from nanoeemllm.config import ModelConfig, UserError, VisualPath
from nanoeemllm.paths import PATHS, lookup, make


def read_config(data: dict, where: str = "config") -> ModelConfig:
    """A model folder's config.json. Raises UserError that names the key, for an unknown key or a
    value that does not fit."""
    config = read_typed(ModelConfig, data, where)
    return dataclasses.replace(config, other_paths=config.other_paths + old_settings(data, config))


def old_settings(data: dict, config: ModelConfig) -> tuple[VisualPath, ...]:
    """Folders of the first edition wrote the settings of all paths into one object: what was chosen
    there for other paths than the model's own (yopo's calibrated heads) is still meant."""
    found = []
    for path in PATHS.values():
        fields = [f.name for f in dataclasses.fields(path)]
        settings = {key: value for key, value in data.get("visual_path", {}).items() if key in fields}
        if settings and path is not type(config.visual_path):
            other = read_object(path, settings, path.name)
            found += [other] if other != make(path.name) else []
    return tuple(found)


def read_path(value, where: str) -> VisualPath:
    """{"name": ..., settings}. Settings of other paths are passed over (see old_settings)."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UserError(f"{where} must be an object with a name")
    known = {f.name for path in PATHS.values() for f in dataclasses.fields(path)}
    settings = {key: item for key, item in value.items() if key != "name"}
    return read_object(lookup(value["name"]), settings, where, skip=tuple(known))


def read_typed(kind, value, where: str, least=None, most=2 ** 20):
    """A JSON value as `kind`, checked to the bottom: a dataclass from an object, a tuple from a
    list, a number from its range. Raises UserError that names the place."""
    if isinstance(kind, type) and issubclass(kind, VisualPath):
        return read_path(value, where)
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
    if type(value) not in (int, kind) or not math.isfinite(value):
        raise UserError(f"{where} must be a {'whole ' * (kind is int)}number, not {value!r:.80}")
    least = (1 if kind is int else 2 ** -100) if least is None else least
    if not least <= value <= (most if kind is int else 2 ** 100):
        raise UserError(f"{where} is {value}; it must be from {least:g} to {most}")
    return kind(value)


def read_object(kind, value, where: str, skip: tuple[str, ...] = ()):
    """A JSON object as a dataclass; keys in `skip` are passed over, unknown ones refused."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, not {type(value).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    found = {}
    for key, item in value.items():
        if key in known:
            limits = {name: known[key].metadata[name] for name in ("least", "most")
                      if name in known[key].metadata}
            found[key] = read_typed(known[key].type, item, f"{where}.{key}", **limits)
        elif key not in skip:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
    for name, f in known.items():
        if f.default is f.default_factory is dataclasses.MISSING and name not in found:
            raise UserError(f"{where}: {name} is missing")
    return kind(**found)
