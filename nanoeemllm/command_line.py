"""What all commands share: how they read flags and end, and the flags that choose a device and a visual path."""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable

import torch

from nanoeemllm.config import VISUAL_PATHS, UserError, VisualPathConfig


def run_command(main):
    """Runs a script's main(). A UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                  # who reads our output has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Parser(argparse.ArgumentParser):
    """argparse's, with a help text that keeps its lines, and one line for what is wrong."""

    def __init__(self, description: str, prog: str | None = None):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message} (--help tells more)")


def positive(number: type, or_zero: bool = False) -> Callable:
    """A type for argparse: an int or a float over 0, or not under it, up to 2^31."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = number(text)
            if 0 < value < 2 ** 31 or (or_zero and value == 0):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no {number.__name__} {'of 0 or more' if or_zero else 'over 0'}, up to 2^31")
    return parse


def device_from(name: str | None) -> str:
    """The device that --device names, or the first there is. Under torchrun every process has a GPU of its own. Raises
    UserError for a device that this machine lacks."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        if torch.device(device).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: this machine has none; leave it out, or give cpu") from None
    return device


# ---- the visual path ----

SETTINGS = {"eemllm": ("aligner",), "eemllm-f": ("composite_layers",),        # each path's own flags
            "yopo": ("window", "ffn_ratio", "last_visual_layer", "prune_heads"), "flamingo": ("every",)}


def add_visual_path_flags(parser):
    """The flags of every script that makes or loads a model; visual_path_from reads them."""
    add = parser.add_argument_group("what happens to visual tokens (visual_path.py)").add_argument
    add("--visual-path", choices=VISUAL_PATHS, help="default: the model's own")
    add("--aligner", metavar="LETTERS", help="eemllm: some of v, o, f, or '' for none (vof)")
    add("--composite-layers", type=_layers, metavar="LAYERS", help="eemllm-f: as in 16-31 or 0,2,5-7")
    add("--window", type=positive(int), metavar="W", help="yopo: neighbours W x W (5)")
    add("--ffn-ratio", type=positive(int), metavar="R", help="yopo: the first 1/R of the FFN's neurons (2)")
    add("--last-visual-layer", type=positive(int), metavar="L_CUT", help="yopo: no visual keys from this layer (half)")
    add("--prune-heads", type=positive(int, or_zero=True), metavar="N",
        help="yopo: heads pruned in each layer but the first two (0)")
    add("--every", type=positive(int), metavar="K", help="flamingo: a gated block every K layers (4)")


def settings_from(args, name: str) -> dict:
    """What the flags say of this path's own settings."""
    return {key: getattr(args, key) for key in SETTINGS.get(name, ()) if getattr(args, key) is not None}


def visual_path_from(args, base: VisualPathConfig | None = None) -> VisualPathConfig:
    """The path that the flags ask for: base (a loaded model's, or the default) with what was given changed. Raises
    UserError for a setting of another path."""
    base = base or VisualPathConfig()
    name = args.visual_path or base.name
    for other in SETTINGS:
        if other != name and settings_from(args, other):
            flag = next(iter(settings_from(args, other))).replace("_", "-")
            raise UserError(f"--{flag} is a setting of {other}, and the visual path is {name}: add --visual-path {other}")
    given = settings_from(args, name)
    if given.get("prune_heads") == 0:
        given["prune_heads"] = None
    if given.get("prune_heads", base.prune_heads) != base.prune_heads:
        given["kept_heads"] = ()                             # chosen for another number
    return dataclasses.replace(base, name=name, **given)


def _layers(text: str) -> tuple[int, ...]:
    """"0,2,5-7" -> (0, 2, 5, 6, 7)"""
    layers = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not re.fullmatch(r"\d+(-\d+)?", part, re.ASCII) or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"{text!r}: give layers as in 16-31 or 0,2,5-7")
        layers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))
