"""Operations of a prefill under every visual path.

    python -m nanoeemllm.bench operations --preset eemllm-7b-980

Counted by running the model on the `meta` device (data/cost.py). Attention is counted twice: as the
papers do, whole rectangles of queries and keys; and by the pairs that see each other, which is what
kernels compute. The last layer's visual tokens are carried no further under any path; the papers'
formulas carry them. README.md has what the papers state.
"""

import dataclasses

from nanoeemllm.border.command import Parser
from nanoeemllm.config import PRESETS, ModelConfig, VisualPath
from nanoeemllm.data import cost
from nanoeemllm.paths import PATHS, add_flags, from_args, make

CASES = [(text, images) for text in (64, 256)
         for images in ([576], [2304], [4900], [4900, 4900])]


def paths_of(args, config: ModelConfig) -> dict[str, VisualPath]:
    """Every registered path as published, or as it was calibrated for these weights. With
    --visual-path that one, as the flags change it, beside llava."""
    published = [path.published(config.llama) for path in PATHS.values()]
    known = [path for path in published if path is not None]
    paths = {path.name: path for path in (*known, *config.other_paths, config.visual_path)}
    if args.visual_path:
        base = paths.get(args.visual_path) or make(args.visual_path)
        config = dataclasses.replace(config, visual_path=base)
    chosen = from_args(args, config)
    paths = {"llava": paths["llava"]} if args.visual_path else paths
    paths[chosen.name] = chosen
    for path in paths.values():
        path.check(config.llama)
    return paths


def count(config: ModelConfig, paths: dict[str, VisualPath], cases: list,
          rectangles: bool) -> dict[str, list[tuple[float, float]]]:
    """Name -> for every case (text tokens, [visual tokens of each image]) the operations of a
    prefill: (the language model's, the encoder's and projector's)."""
    counts = {}
    for name, path in paths.items():
        with_path = dataclasses.replace(config, visual_path=path)
        counts[name] = [cost.operations(with_path, [case], rectangles=rectangles) for case in cases]
    return counts


def table(counts: dict[str, list[float]], cases: list) -> list[str]:
    """Lines: 10^12 operations, and relative to llava."""
    visual = [f"{len(images)} x {images[0]:,}" if len(images) > 1 else f"{images[0]:,}"
              for _, images in cases]
    lines = ["| visual tokens | " + " | ".join(visual) + " |",
             "| text tokens   | " + " | ".join(str(text) for text, _ in cases) + " |",
             "|---" * (len(cases) + 1) + "|"]
    for name, row in counts.items():
        cells = [f"{n / 1e12:,.1f} ({n / base:.0%})" for n, base in zip(row, counts["llava"])]
        lines.append(f"| {name:<13} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str]):
    parser = Parser(__doc__, "python -m nanoeemllm.bench operations")
    presets = [name for name in PRESETS if PRESETS[name].vision]
    parser.add_argument("--preset", choices=presets, default="eemllm-7b-980")
    add_flags(parser)
    args = parser.parse_args(argv)
    config = PRESETS[args.preset]
    paths = paths_of(args, config)
    as_papers, visible = (count(config, paths, CASES, rectangles) for rectangles in (True, False))
    for counts, parts, what in ((as_papers, 1, "the language model, as the papers count"),
                                (as_papers, 2, "with encoder and projector"),
                                (visible, 1, "the language model, pairs that see each other")):
        print(f"\n{args.preset}, prefill, {what}: 10^12 operations, and relative to llava")
        totals = {name: [sum(case[:parts]) for case in row] for name, row in counts.items()}
        print(*table(totals, CASES), sep="\n")
