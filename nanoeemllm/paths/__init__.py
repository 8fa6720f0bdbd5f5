"""The visual paths: a file a system of the papers, and this registry.

A path's class holds its settings as fields; those with a `help` text are command-line flags. It
says which layer class stands at each index (config.VisualPath lists what else it may say). To add
one, write a file like these and `register` its class: nothing else knows a path or its settings.

    path      visual rows attend to                               then
    llava     everything before them, as text does                O, FFN
    eemllm    themselves: the aligner                             V, O, FFN, each can be left out
    eemllm-f  as eemllm in the layers chosen, else as llava; llava's weights, not trained
    naavit    nothing                                             FFN (SAISA's pilot on LLaVA-1.5)
    saisa     nothing: every layer projects the image's features to its own input
    yopo      their neighbours in the image and the text before it, in some heads    O, part of FFN
    flamingo  nothing: text attends to them in gated blocks added before every k-th layer
"""

import argparse
import dataclasses
import re
from collections.abc import Callable

from nanoeemllm.config import ModelConfig, UserError, VisualPath

PATHS: dict[str, type[VisualPath]] = {}


def register(path: type[VisualPath]) -> type[VisualPath]:
    """A class decorator."""
    PATHS[path.name] = path
    return path


def make(name: str, **settings) -> VisualPath:
    return lookup(name)(**settings)


def lookup(name: str) -> type[VisualPath]:
    if name not in PATHS:
        raise UserError(f"visual path {name!r:.80} is not known; known: {', '.join(PATHS)}")
    return PATHS[name]


def is_new_weight(name: str) -> bool:
    """Whether a weight, by its name, stands between the encoder and the language model: the
    projector, or a path's own. Stage 1 trains these."""
    own = [part for path in PATHS.values() for part in path.own_weights]
    return name.startswith("projector.") or any(part in name for part in own)


def is_trained(name: str, stage: str) -> bool:
    """Stage "pretrain" trains what is new, "finetune" that and the language model."""
    return is_new_weight(name) or stage == "finetune" and name.startswith("decoder.")


# ---- on the command line ----

def add_flags(parser):
    """--visual-path and every path's own flags; from_args reads them."""
    add = parser.add_argument_group("what happens to visual tokens (paths/)").add_argument
    add("--visual-path", choices=PATHS, help="default: the model's own")
    for name, f in flags():
        about = f.metadata
        add(flag_of(f), type=about.get("parse") or number(about["least"], about["most"]),
            metavar=about["metavar"], help=f"{name}: {about['help']}")


def flags() -> list[tuple[str, dataclasses.Field]]:
    """(path, field) of every setting that is a flag."""
    return [(name, f) for name, path in PATHS.items() for f in dataclasses.fields(path)
            if "help" in f.metadata]


def flag_of(f: dataclasses.Field) -> str:
    return "--" + f.name.replace("_", "-")


def from_args(args, base: ModelConfig) -> VisualPath:
    """The path that the flags ask for: base's, with what was given changed. Raises UserError for a
    setting of another path."""
    path = base.path_named(args.visual_path) if args.visual_path else base.visual_path
    given = {}
    for owner, f in flags():
        value = getattr(args, f.name)
        if value is not None and owner != path.name:
            raise UserError(f"{flag_of(f)} is a setting of {owner}, and the visual path is "
                            f"{path.name}: add --visual-path {owner}")
        given |= {} if value is None else {f.name: value}
    return path.with_settings(given)


def number(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers. (border/ has one, too, and builds on this package.)"""
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r:.80} is not from {least} to {most}")
        return int(text)
    return parse


def layer_numbers(text: str) -> tuple[int, ...]:
    """"0,2,5-7" -> (0, 2, 5, 6, 7)"""
    layers = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part, re.ASCII)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not numbers:
            raise argparse.ArgumentTypeError(f"{text!r:.80}: give layers as in 16-31 or 0,2,5-7")
        layers |= set(numbers)
    return tuple(sorted(layers))


# isort: off - the order is the table's
from nanoeemllm.paths import llava, eemllm, eemllm_f, naavit, saisa, yopo, flamingo  # noqa
