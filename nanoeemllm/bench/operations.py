"""Operations of a prefill under every visual path.

    python -m nanoeemllm.bench operations --preset eemllm-7b-980

Counted by running the model on the `meta` device (data/cost.py). Attention is counted twice: as the
papers do, whole rectangles of queries and keys; and by the pairs that see each other, which is what
kernels compute. The last layer's visual tokens are carried no further under any path; the papers'
formulas carry them. README.md has what the papers state.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator

from tqdm import tqdm

from nanoeemllm.border.command import Parser, positive
from nanoeemllm.border.table import print_table
from nanoeemllm.config import PRESETS, ModelConfig, UserError, VisualPath
from nanoeemllm.data import cost
from nanoeemllm.paths import PATHS, add_flags, from_args

# (text tokens, [visual tokens of each image])
CASES = [(text, images) for text in (64, 256)
         for images in ([576], [2304], [4900], [4900, 4900])]


# ---- flags that commands share ----

def make_parser(command: str, about: str, preset: str) -> Parser:
    """With --preset, its default, and the flags of visual paths."""
    parser = Parser(about, f"python -m nanoeemllm.bench {command}")
    presets = [name for name in PRESETS if PRESETS[name].vision]
    parser.add_argument("--preset", choices=presets, default=preset, help=f"({preset})")
    add_flags(parser)
    return parser


def add_case_flags(parser: Parser, systems: tuple[str, ...], visual: list[int]):
    """What is compared, on which samples; the defaults of both."""
    add = parser.add_argument
    add("--systems", "--paths", nargs="+", metavar="PATH",
        help=f"visual paths, or all ({' '.join(systems)})")
    add("--visual", nargs="+", type=square, default=visual,
        help=f"visual tokens of an image ({' '.join(map(str, visual))})")
    add("--text", type=positive(int), default=64, help="text tokens of a sample (64)")


def square(text: str) -> int:
    number = positive(int, most=2 ** 20)(text)
    side = math.isqrt(number)
    if side ** 2 != number:
        raise argparse.ArgumentTypeError(
            f"{number}: give the patches of a square picture, as in {side ** 2}")
    return number


def paths_of(args, config: ModelConfig) -> dict[str, VisualPath]:
    """Every registered path as published, or as it was calibrated for these weights. With
    --visual-path that one, as the flags change it, beside llava."""
    published = [path.published(config.llama) for path in PATHS.values()]
    known = [path for path in published if path is not None]
    paths = {path.name: path for path in (*known, *config.other_paths, config.visual_path)}
    if args.visual_path in paths:
        config = dataclasses.replace(config, visual_path=paths[args.visual_path])
    chosen = from_args(args, config)
    if args.visual_path:
        paths = {"llava": paths["llava"]}
    return paths | {chosen.name: chosen}


def choose(args, known: dict[str, VisualPath], default: tuple[str, ...]) -> dict[str, VisualPath]:
    """Those that --systems names; without it the default ones, or --visual-path beside llava."""
    names = args.systems or (["llava", args.visual_path] if args.visual_path else default)
    names = known if names == ["all"] else names
    for name in names:
        if name not in known:
            raise UserError(f"--systems {name}: known are {', '.join(known)}, or all")
    return {name: known[name] for name in names}


# ---- the command ----

def count(config: ModelConfig, paths: dict[str, VisualPath], cases: list,
          rectangles: bool) -> dict[str, list[tuple[float, float, float]]]:
    """Name -> for every case the language model's, the projector's and the encoder's operations."""
    counts = {}
    for name, path in tqdm(paths.items(), desc="counting", leave=False, disable=None):
        with_path = dataclasses.replace(config, visual_path=path)
        counts[name] = [cost.operations(with_path, [case], rectangles=rectangles) for case in cases]
    return counts


def relative(counts: dict[str, list[tuple]], cases: list, parts: int) -> Iterator[dict[str, str]]:
    """Rows of the table: the first parts' 10^12 operations, and relative to llava."""
    for name in counts:
        row = {"tokens": name}
        for (text, images), found, llava in zip(cases, counts[name], counts["llava"]):
            total = sum(found[:parts])
            case = f"{' + '.join(f'{n:,}' for n in images)} visual, {text} text"
            row[case] = f"{total / 1e12:,.1f} ({total / sum(llava[:parts]):.0%})"
        yield row


def main(command: str, argv: list[str]):
    args = make_parser(command, __doc__, "eemllm-7b-980").parse_args(argv)
    config = PRESETS[args.preset]
    paths, long = paths_of(args, config), CASES[4:]
    as_papers = count(config, paths, CASES, rectangles=True)
    visible = count(config, paths, long, rectangles=False)
    for counts, parts, cases, what in (
            (as_papers, 1, CASES, "the language model, as the papers count"),
            (as_papers, 3, CASES, "with encoder and projector"),
            (visible, 1, long, "the language model, pairs that see each other")):
        print(f"\n{args.preset}, prefill, {what}: 10^12 operations, and relative to llava")
        print_table(relative(counts, cases, parts))
