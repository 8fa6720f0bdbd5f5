"""Operations of a prefill under every visual path.

    python -m nanoeemllm.bench operations --preset eemllm-7b-980

Counted by running the model on the `meta` device (data/cost.py). Attention is counted twice: as the
papers do, whole rectangles of queries and keys; and by the pairs that see each other, which is what
kernels compute. The last layer's visual tokens are carried no further under any path; the papers'
formulas carry them. README.md has what the papers state.
"""

import dataclasses

from tqdm import tqdm

from nanoeemllm.border.command import Parser
from nanoeemllm.config import PRESETS, ModelConfig, VisualPath
from nanoeemllm.data import cost
from nanoeemllm.paths import PATHS, add_flags, from_args

# (text tokens, [visual tokens of each image])
CASES = [(text, images) for text in (64, 256)
         for images in ([576], [2304], [4900], [4900, 4900])]


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


def count(config: ModelConfig, paths: dict[str, VisualPath], cases: list,
          rectangles: bool) -> dict[str, list[tuple[float, float, float]]]:
    """Name -> for every case the language model's, the projector's and the encoder's operations."""
    counts = {}
    for name, path in tqdm(paths.items(), desc="counting", leave=False, disable=None):
        with_path = dataclasses.replace(config, visual_path=path)
        counts[name] = [cost.operations(with_path, [case], rectangles=rectangles) for case in cases]
    return counts


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def relative(counts: dict[str, list[float]], cases: list) -> str:
    """The table: 10^12 operations, and relative to llava."""
    head = [f"{' + '.join(f'{n:,}' for n in images)} visual, {text} text" for text, images in cases]
    rows = []
    for name, row in counts.items():
        cells = [f"{n / 1e12:,.1f} ({n / base:.0%})" for n, base in zip(row, counts["llava"])]
        rows.append([name, *cells])
    return table(["tokens", *head], rows)


def main(argv: list[str]):
    parser = Parser(__doc__, "python -m nanoeemllm.bench operations")
    presets = [name for name in PRESETS if PRESETS[name].vision]
    parser.add_argument("--preset", choices=presets, default="eemllm-7b-980")
    add_flags(parser)
    args = parser.parse_args(argv)
    config = PRESETS[args.preset]
    paths, long = paths_of(args, config), CASES[4:]
    as_papers = count(config, paths, CASES, rectangles=True)
    visible = count(config, paths, long, rectangles=False)
    for counts, parts, cases, what in (
            (as_papers, 1, CASES, "the language model, as the papers count"),
            (as_papers, 3, CASES, "with encoder and projector"),
            (visible, 1, long, "the language model, pairs that see each other")):
        print(f"\n{args.preset}, prefill, {what}: 10^12 operations, and relative to llava")
        totals = {name: [sum(case[:parts]) for case in row] for name, row in counts.items()}
        print(relative(totals, cases))
