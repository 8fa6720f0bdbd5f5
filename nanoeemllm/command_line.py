"""What all commands share: how they end, and the flags that choose a visual path."""

import dataclasses
import re
import sys

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


def add_visual_path_flags(parser):
    """The flags of every script that makes or loads a model; visual_path_from reads them."""
    add = parser.add_argument_group("what happens to visual tokens (visual_path.py)").add_argument
    add("--visual-path", choices=VISUAL_PATHS, help="default: the model's own")
    add("--aligner", metavar="LETTERS", help="eemllm: some of v, o, f, or '' for none (vof)")
    add("--composite-layers", metavar="LAYERS", help="eemllm-f: as in 16-31 or 0,2,5-7")
    add("--window", type=int, metavar="W", help="yopo: neighbours W x W (5)")
    add("--ffn-ratio", type=int, metavar="R", help="yopo: the first 1/R of the FFN's neurons (2)")
    add("--last-visual-layer", type=int, metavar="L_CUT", help="yopo: no visual keys from this layer on (half of them)")
    add("--prune-heads", type=int, metavar="N", help="yopo: heads pruned in each layer but the first two (0)")
    add("--every", type=int, metavar="K", help="flamingo: a gated block every K layers (4)")


def visual_path_from(args, base: VisualPathConfig | None = None) -> VisualPathConfig:
    """The path that the flags ask for: base (a loaded model's, or the default) with what was given changed."""
    given = {"name": args.visual_path, "aligner": args.aligner, "window": args.window, "ffn_ratio": args.ffn_ratio,
             "last_visual_layer": args.last_visual_layer, "prune_heads": args.prune_heads, "every": args.every,
             "composite_layers": args.composite_layers and _layers(args.composite_layers)}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if type(value) is int and value < (key != "prune_heads"):
            raise UserError(f"--{key.replace('_', '-')} must be a positive whole number, not {value}")
    if "prune_heads" in given:
        given |= {"prune_heads": given["prune_heads"] or None, "kept_heads": ()}    # chosen for another number
    return dataclasses.replace(base or VisualPathConfig(), **given)


def _layers(text: str) -> tuple[int, ...]:
    """"0,2,5-7" -> (0, 2, 5, 6, 7)"""
    layers = set()
    for part in text.split(","):
        if not re.fullmatch(r"\d+(-\d+)?", part):
            raise UserError(f"--composite-layers {text!r}: give layers as in 16-31 or 0,2,5-7")
        first, _, last = part.partition("-")
        layers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))
