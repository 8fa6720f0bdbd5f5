"""Writes the tiny world to files.

    python -m nanoeemllm.toy --export DIR -n 2000        LLaVA's JSON and a folder of PNGs
    python -m nanoeemllm.toy --export-tsv FILE -n 500    a benchmark file with VLMEvalKit's columns
"""

from pathlib import Path

from nanoeemllm.border.command import Parser, positive, run_command
from nanoeemllm.config import UserError
from nanoeemllm.toy.world import WorldConfig, export_llava, export_tsv


def main():
    parser = Parser(__doc__, "python -m nanoeemllm.toy")
    add = parser.add_argument
    add("--export", type=Path, metavar="DIR")
    add("--export-tsv", type=Path, metavar="FILE")
    add("-n", type=positive(int), default=2000, help="pictures, or lines (2000)")
    add("--picture-size", type=int, default=48, help="pixels a side (48)")
    add("--max-things", type=int, default=3, help="most things in a picture (3)")
    add("--seed", type=positive(int, or_zero=True), default=0, help="(0)")
    args = parser.parse_args()
    if not args.export and not args.export_tsv:
        parser.error("give --export DIR, --export-tsv FILE, or both")
    world = WorldConfig(args.picture_size, args.max_things, args.seed)
    try:
        if args.export:
            export_llava(world, args.export, args.n)
        if args.export_tsv:
            export_tsv(world, args.export_tsv, args.n)
    except OSError as error:
        raise UserError(error) from None
    print("wrote", *filter(None, (args.export, args.export_tsv)))


if __name__ == "__main__":
    run_command(main)
