"""The flags of train.py."""

import argparse
import re
from pathlib import Path

from nanoeemllm.border.command import Parser, positive
from nanoeemllm.config import PRESETS
from nanoeemllm.paths import add_flags
from nanoeemllm.training.config import MICRO_BATCH_TOKENS

SIZE = 2**20


def parse_flags(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description)
    add = parser.add_argument
    add("--stage", choices=("all", "backbone", "pretrain", "finetune"), default="all")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="for the stages' folders")
    add("--init", type=Path, metavar="DIR", help="model folder to start from (the stage before's)")
    add_flags(parser)
    add("--steps", type=positive(int), help="optimizer steps of the stage (one epoch)")
    add("--batch-size", type=positive(int, most=SIZE), help="samples a step, over all processes")
    add("--lr", type=positive(float, most=1000), help="highest learning rate")
    add("--seed", type=positive(int, or_zero=True, most=2**31 - 1), default=0)
    add("--checkpoint-every", type=positive(int), default=500, metavar="STEPS",
        help="(500)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--force", action="store_true", help="train anew what --out holds already")
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more work")
    add("--compile", action="store_true", help="compile the decoder's layers with torch.compile")
    add("--show-batch", action="store_true", help="print the first packed batch as text, and end")

    data = parser.add_argument_group("your data").add_argument
    data("--data", action="append", metavar="FILE[:WEIGHT]",
         help="LLaVA's JSON; several files are mixed by weight")
    data("--images", metavar="DIR", help="the folder that the pictures' names are relative to")
    data("--val-data", action="append", metavar="FILE",
         help="held-out conversations; all of them are measured at every checkpoint")
    data("--epochs", type=positive(float, most=10000), help="instead of --steps (1)")
    data("--max-length", type=positive(int, most=SIZE),
         help="tokens a sample; turns beyond are cut off (the model's context)")
    data("--micro-batch-tokens", type=positive(int), metavar="N",
         help=f"a micro-batch's, visual ones counted by what they cost ({MICRO_BATCH_TOKENS})")
    data("--workers", type=positive(int, or_zero=True, most=256), metavar="N",
         help="processes that prepare batches, for each that trains (4, or the cores there are)")
    data("--max-bad", type=positive(float, or_zero=True, most=1), default=0.01, metavar="PART",
         help="samples that may be unusable (0.01)")

    dry = parser.add_argument_group("--dry-run").add_argument
    dry("--dry-run", action="store_true", help="print what the stage needs and costs, and end")
    dry("--gpus", type=positive(int, most=SIZE), default=8, help="(8)")
    dry("--mfu", type=positive(float, most=1), default=0.5, metavar="PART",
        help="of the GPUs' peak that is reached (0.5)")
    dry("--preset", choices=PRESETS, help="a model that is not there yet; needs --assume")
    dry("--assume", type=sample_sizes, metavar="SAMPLES,TEXT,VISUAL",
        help="data that is not there yet: how many samples, and tokens of each")

    world = parser.add_argument_group("the tiny world").add_argument
    world("--picture-size", type=positive(int, most=16384), default=48, help="pixels a side (48)")

    args = parser.parse_args(argv)
    look = args.dry_run or args.show_batch
    for wrong, why in (
            ((args.data or args.init) and args.stage not in ("pretrain", "finetune"),
             "--data and --init are for one stage: add --stage pretrain or --stage finetune"),
            ((args.val_data or args.images or args.epochs) and not (args.data or args.assume),
             "--val-data, --images and --epochs are for --data: name LLaVA's JSON"),
            (args.epochs and args.steps, "--epochs and --steps say the same: give one of them"),
            (look and args.stage == "backbone",
             "--dry-run and --show-batch are for pretrain and finetune"),
            ((args.preset or args.assume) and not (args.dry_run and args.assume),
             "--preset and --assume are for --dry-run, and --preset needs --assume")):
        if wrong:
            parser.error(why)
    return args


def sample_sizes(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d{0,11},[1-9]\d{0,5},\d{1,6}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r:.80}: give three whole numbers, as in "
                                         "558000,60,4900")
    return tuple(map(int, text.split(",")))
