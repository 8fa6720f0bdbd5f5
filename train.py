"""Trains EE-MLLM, stage by stage, as the paper does.

    python train.py                        the tiny world, everything: backbones, pretrain, finetune, then a few answers
    python train.py --stage pretrain       only the projector learns, from captions
    python train.py --stage finetune       projector and language model learn, from conversations

The same on your data, LLaVA's JSON and a folder of pictures, on one GPU or many:

    python train.py --stage pretrain --init weights/eemllm-7b --data blip_laion_cc_sbu_558k.json --images LLaVA-Pretrain
    torchrun --nproc_per_node=8 train.py --stage finetune --init out/pretrain --data llava_v1_5_mix665k.json --images data

Each stage leaves a model folder, out/backbone, out/pretrain, out/finetune, and beside it what the run saw
(out/pretrain-run: run.json, metrics.jsonl, loss.png, checkpoints). Stop it when you like: --resume goes on, on another
number of processes too. --dry-run tells beforehand what a stage needs and costs, --show-batch what it learns from.
"""

import argparse
import dataclasses
import errno
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoeemllm import ModelConfig, UserError, load
from nanoeemllm.backbone import make_backbones, tiny_config, tiny_tokenizer
from nanoeemllm.checkpoint import read_json
from nanoeemllm.command_line import Parser, add_visual_path_flags, positive, run_command, visual_path_from
from nanoeemllm.config import PRESETS
from nanoeemllm.conversations import describe_problems
from nanoeemllm.data import Loader, Mixture, Plan, count_tokens, encode_sample, open_mixture, token_cost
from nanoeemllm.distributed import Group, join, save_model, spread
from nanoeemllm.preview import Measure, forecast, show_batch
from nanoeemllm.prompt import Tokenizer
from nanoeemllm.run import Run
from nanoeemllm.toy import ToyDataset, WorldConfig
from nanoeemllm.training import OnOneProcess, Stopped, TrainConfig, freeze_for, train

TINY = {  # the tiny world's settings
    "pretrain": TrainConfig("pretrain", steps=300, batch_size=16, learning_rate=2e-3, betas=(0.9, 0.98)),
    "finetune": TrainConfig("finetune", steps=1800, batch_size=16, learning_rate=1e-3, weight_decay=0.01, betas=(0.9, 0.98)),
}
PAPER = {  # LLaVA's and the paper's; an epoch of the data is so many steps
    "pretrain": TrainConfig("pretrain", steps=0, batch_size=256, learning_rate=1e-3),
    "finetune": TrainConfig("finetune", steps=0, batch_size=128, learning_rate=2e-5),
}
MICRO_BATCH_TOKENS = 8192    # a 7B model's activations of them take about 40 GB without --checkpoint-activations


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--stage", choices=("all", "backbone", "pretrain", "finetune"), default="all")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where the stages' folders go (out)")
    add("--init", type=Path, metavar="DIR", help="model folder to start from (the stage before's)")
    add_visual_path_flags(parser)
    add("--steps", type=positive(int), help="optimizer steps of the stage")
    add("--batch-size", type=positive(int), help="samples a step, over all processes")
    add("--lr", type=positive(float), help="highest learning rate")
    add("--seed", type=positive(int, or_zero=True), default=0)
    add("--checkpoint-every", type=positive(int), default=500, metavar="STEPS", help="(500)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--force", action="store_true", help="train anew what --out holds already")
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more work")
    add("--compile", action="store_true", help="compile the decoder's layers with torch.compile")
    add("--show-batch", action="store_true", help="print the first packed batch as text, and end")

    data = parser.add_argument_group("your data").add_argument
    data("--data", action="append", metavar="FILE[:WEIGHT]", help="LLaVA's JSON; several files are mixed by weight")
    data("--images", metavar="DIR", help="the folder that the pictures' names are relative to")
    data("--val-data", action="append", metavar="FILE", help="held-out conversations, measured at every checkpoint")
    data("--epochs", type=positive(float), help="instead of --steps (1)")
    data("--max-length", type=positive(int), help="tokens a sample; turns beyond are cut off (the model's context)")
    data("--micro-batch-tokens", type=positive(int), metavar="N",
         help=f"a micro-batch's, visual ones counted by what they cost ({MICRO_BATCH_TOKENS})")
    data("--workers", type=positive(int, or_zero=True), metavar="N",
         help="processes that prepare batches, for each process that trains (4, or the cores there are)")
    data("--max-bad", type=positive(float, or_zero=True), default=0.01, metavar="PART",
         help="samples that may be unusable (0.01)")

    dry = parser.add_argument_group("--dry-run").add_argument
    dry("--dry-run", action="store_true", help="print what the stage needs and costs, and end")
    dry("--gpus", type=positive(int), default=8, help="(8)")
    dry("--mfu", type=positive(float), default=0.5, help="part of the GPUs' peak that is reached (0.5)")
    dry("--preset", choices=PRESETS, help="a model that is not there yet; needs --assume")
    dry("--assume", metavar="SAMPLES,TEXT,VISUAL", help="data that is not there yet: how many, and tokens of each")

    world = parser.add_argument_group("the tiny world").add_argument
    world("--picture-size", type=int, default=48, help="pixels a side (48)")
    world("--max-things", type=int, default=3, help="most things in a picture (3)")
    world("--hardness", type=int, default=0, help="1: more jitter, and questions about relations (0)")
    args = parser.parse_args(argv)
    if args.data and args.stage not in ("pretrain", "finetune"):
        parser.error("--data is for one stage: add --stage pretrain or --stage finetune")
    if args.init and args.stage == "all":
        parser.error("--init is for one stage: add --stage pretrain or --stage finetune")
    if (args.val_data or args.images or args.epochs) and not (args.data or args.assume):
        parser.error("--val-data, --images and --epochs are for --data: name LLaVA's JSON")
    if args.epochs and args.steps:
        parser.error("--epochs and --steps say the same: give one of them")
    if args.stage == "backbone" and (args.dry_run or args.show_batch):
        parser.error("--dry-run and --show-batch are for pretrain and finetune")
    if args.mfu > 1:
        parser.error("--mfu is a part, 0.5 for a half")
    if (args.preset or args.assume) and not args.dry_run:
        parser.error("--preset and --assume are for --dry-run: add it, or leave them out")
    if args.preset and not args.assume:
        parser.error("--preset has no tokenizer: add --assume SAMPLES,TEXT,VISUAL")
    return args


def main(args: argparse.Namespace):
    world = WorldConfig(args.picture_size, args.max_things, args.hardness, args.seed)
    stages = ("backbone", "pretrain", "finetune") if args.stage == "all" else (args.stage,)
    with join(args.device) as group:
        try:
            for stage in stages:
                if stage != "backbone":
                    run_stage(stage, args, world, group)
                elif not (args.dry_run or args.show_batch):
                    group.first_alone(lambda: make_backbones(args.out / "backbone", world, force=args.force))
        except Stopped as stopped:
            if group.is_first:
                print(stopped)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"{error.filename or args.out}: {error.strerror or error}") from error
            raise UserError(f"the disk is full ({error.filename or args.out}): the last checkpoint stands; make room and "
                            "run the same command with --resume") from error
        except UserError as error:
            if group.is_first or isinstance(error, OnOneProcess):
                raise
            time.sleep(5)                                # the first process tells it, and all are ended,
            raise UserError(f"process {group.rank}: {error}") from None           # unless this one is alone with it
    if "finetune" in stages and group.is_first and not (args.data or args.dry_run or args.show_batch):
        from nanoeemllm import toy_report
        model = load(args.out / "finetune", device=args.device)
        toy_report.show(model, world, toy_report.score(model, world))


def run_stage(stage: str, args: argparse.Namespace, world: WorldConfig, group: Group):
    """Trains one stage from the model folder of the one before, and leaves its own."""
    start = args.init or args.out / {"pretrain": "backbone", "finetune": "pretrain"}[stage]
    look = args.dry_run or args.show_batch
    if args.dry_run and args.assume:
        return print(*dry_run(stage, args, folder_config(start, args, world), None), sep="\n")
    if not (start / "config.json").exists() and not (look and not args.init and not args.data):
        if stage == "finetune" or args.init or args.data:
            raise UserError(f"{start} holds no model: " + ("name one with --init" if stage == "pretrain" else
                            "run `python train.py --stage pretrain` first, or name one with --init"))
        group.first_alone(lambda: make_backbones(start, world))

    config = folder_config(start, args, world)
    if stage == "pretrain" and config.vision is None:
        raise UserError(f"{start} has no image encoder, so stage 1 has nothing to train: give --init a model that sees")
    tokenizer = Tokenizer(start / "tokenizer.json") if (start / "config.json").exists() else tiny_tokenizer(config)
    data = open_data(stage, args, world, config, tokenizer, group)
    if args.dry_run:
        return print(*dry_run(stage, args, config, data), sep="\n")
    if args.show_batch:
        return print(*show_batch(next(iter(data.loader(data.plan, group, 0, 1))).batch, tokenizer), sep="\n")

    told = {"init": str(start), "visual_path": dataclasses.asdict(config.visual_path), **data.told,
            **dataclasses.asdict(data.config)}
    model = load(start, device="cpu", visual_path=config.visual_path, new_parts=stage == "pretrain")
    run = Run(args.out / f"{stage}-run", told, group, args.resume, args.force)
    if run.is_finished:
        if group.is_first:
            print(f"{stage}: finished already, {args.out / stage}")
        return
    freeze_for(model, stage)
    model.decoder.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for layer in model.decoder.layers:
            layer.compile(dynamic=True)
    stored = spread(model, group)
    late = train(model, lambda first: data.loader(data.plan, group, first, data.config.steps), data.config, run, group,
          data.held_out and (lambda: data.loader(data.held_out, group, 0, data.held_out.steps_per_epoch)),
          args.checkpoint_every, args.max_bad)
    save_model(model, stored, group, args.out / stage)
    run.finish()
    if late:
        raise Stopped(f"{stage} is finished and saved: run the same command with --resume for what comes after it")


def folder_config(start: Path, args: argparse.Namespace, world: WorldConfig) -> ModelConfig:
    """Of the model that a stage starts from, with the visual path that was asked for."""
    if args.preset:
        config = PRESETS[args.preset]
    elif (start / "config.json").exists():
        config = ModelConfig.from_dict(read_json(start / "config.json"))
    else:
        config = tiny_config(world)
    return dataclasses.replace(config, visual_path=visual_path_from(args, config.visual_path))


# ---- what is learned from ----

class Data(NamedTuple):
    """A stage's samples, and how they are dealt."""
    config: TrainConfig
    plan: Plan
    encode: Callable
    told: dict                  # settings of the data, for run.json
    held_out: Plan | None

    def loader(self, plan: Plan, group: Group, first: int, stop: int) -> Loader:
        return Loader(plan, self.encode, first, stop, group.rank, group.size, group.device.type == "cuda")


def open_data(stage: str, args: argparse.Namespace, world: WorldConfig, config: ModelConfig, tokenizer: Tokenizer,
              group: Group) -> Data:
    """--data and --val-data, or the tiny world's, drawn on the fly, in which no picture is seen twice."""
    if args.data:
        mixture = open_files(args.data, args, group)
        held_out = open_files(args.val_data, args, group) if args.val_data else None
        settings = stage_config(stage, args, len(mixture))
        told = {"data": args.data, "conversations": mixture.sizes, "max_length": args.max_length}
    else:
        settings, kind = stage_config(stage, args), "caption" if stage == "pretrain" else "conversation"
        mixture = Mixture([ToyDataset(world, "train", kind, settings.steps * settings.batch_size)])
        held_out = Mixture([ToyDataset(world, "held-out", kind, 8 * settings.batch_size)])
        told = {"world": dataclasses.asdict(world), "by_cost": args.micro_batch_tokens is not None}

    for name, data in (("--data", mixture), ("--val-data", held_out)):
        if data and min(len(data), settings.batch_size) < group.size:
            raise UserError(f"{name}: steps of {min(len(data), settings.batch_size)} samples cannot be dealt to {group.size} "
                            "processes: give more samples, or a larger --batch-size")
    template = "plain" if stage == "pretrain" else config.chat_template
    tokenizer.end_id(template)                           # raises for a template that is not known or does not fit
    if tokenizer.vocab_size > config.llama.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} words and the language model {config.llama.vocab_size}: they "
                        "do not belong together")
    how = (tokenizer, template, config.vision, args.max_length or config.llama.max_position_embeddings)
    cost_of = token_cost(config)
    budget = args.micro_batch_tokens or (MICRO_BATCH_TOKENS if args.data else None)
    usual = min(4, os.cpu_count() or 1) if args.data else 0
    workers = usual if args.workers is None else args.workers

    def deal(mixture: Mixture) -> Plan:
        cost = (lambda conversation: cost_of(*count_tokens(conversation, *how))) if budget else None
        return Plan(mixture, settings.batch_size, settings.seed, cost, budget, workers)

    return Data(settings, deal(mixture), lambda conversation: encode_sample(conversation, *how), told,
                deal(held_out) if held_out else None)


def open_files(names: list[str], args: argparse.Namespace, group: Group) -> Mixture:
    """Tells what is wrong with the files before the first step."""
    mixture = open_mixture(names, args.images, group.is_first)
    for source in mixture.sources:
        if group.is_first and source.problems:
            print(*describe_problems(source), sep="\n", file=sys.stderr)
        if len(source.problems) > args.max_bad * (len(source) + len(source.problems)):
            raise UserError(f"{source.path}: more than {args.max_bad:.2%} cannot be used: mend them, or allow more with "
                            "--max-bad")
    return mixture


def stage_config(stage: str, args: argparse.Namespace, samples: int | None = None) -> TrainConfig:
    """The tiny world's settings, or the paper's for so many samples, changed by what the command line says."""
    given = {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.lr}
    if samples is not None:
        steps_per_epoch = max(1, samples // (args.batch_size or PAPER[stage].batch_size))
        given["steps"] = args.steps or max(1, round((args.epochs or 1) * steps_per_epoch))
    default = TINY[stage] if samples is None else PAPER[stage]
    return dataclasses.replace(default, seed=args.seed, **{key: x for key, x in given.items() if x is not None})


def dry_run(stage: str, args: argparse.Namespace, config: ModelConfig, data: Data | None) -> list[str]:
    if data is None:
        if not re.fullmatch(r"[1-9]\d{0,11},[1-9]\d{0,6},\d{1,7}", args.assume, re.ASCII):
            raise UserError(f"--assume {args.assume}: give three whole numbers, as in 558000,60,4900")
        samples, text, visual = map(int, args.assume.split(","))
        settings = stage_config(stage, args, samples)
        measures = [Measure(text, text // 2, [(1, visual)] if visual else [])]
    else:
        settings, mixture = data.config, data.plan.data
        chosen = np.random.default_rng(args.seed).permutation(mixture.order(args.seed, 0))[:64]
        encoded = []
        for index in chosen:
            try:
                encoded.append(data.encode(mixture[int(index)]))
            except UserError as error:                   # the run leaves such a sample out, too
                reason = error
        if not encoded:
            raise UserError(f"none of {len(chosen)} samples can be used; the last: {reason}")
        measures = [Measure(len(s.ids) - len(s.images), sum(s.learned), [grid for _, grid in s.images]) for s in encoded]
    return forecast(config, settings, measures, settings.steps * settings.batch_size, args.gpus, args.mfu,
                    args.micro_batch_tokens or MICRO_BATCH_TOKENS, args.checkpoint_activations)


if __name__ == "__main__":
    run_command(lambda: main(parse()))
