"""Writes the tiny world to files.

    python -m nanoeemllm.toy --export DIR -n 2000        LLaVA's JSON and a folder of PNGs
    python -m nanoeemllm.toy --export-tsv FILE -n 500    a benchmark file with VLMEvalKit's columns
"""

import dataclasses
from pathlib import Path

from nanoeemllm.border.command import Parser, positive, run_command
from nanoeemllm.config import UserError
from nanoeemllm.toy.world import SPLITS, WorldConfig, export_llava, export_tsv


def main():
    parser = Parser(__doc__, "python -m nanoeemllm.toy")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--export", type=Path, metavar="DIR")
    where.add_argument("--export-tsv", type=Path, metavar="FILE")
    parser.add_argument("-n", type=positive(int), default=2000, help="pictures, or lines (2000)")
    parser.add_argument("--split", choices=SPLITS, help="train for --export, else held-out")
    knobs = dataclasses.fields(WorldConfig)
    for knob in knobs:
        parser.add_argument("--" + knob.name.replace("_", "-"), default=knob.default,
                            type=positive(int, or_zero=True), help=f"({knob.default})")
    args = parser.parse_args()
    world = WorldConfig(*(getattr(args, knob.name) for knob in knobs))
    try:
        if args.export:
            export_llava(world, args.export, args.n, args.split or "train")
        else:
            export_tsv(world, args.export_tsv, args.n, args.split or "held-out")
    except OSError as error:
        raise UserError(error) from None
    print(f"wrote {args.export or args.export_tsv}")


if __name__ == "__main__":
    run_command(main)
