"""What a stage trains on: its samples, how they are encoded, and how steps share them."""

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path

import numpy as np

from nanoeemllm.border.files import quoted
from nanoeemllm.config import PRESETS, ModelConfig, UserError
from nanoeemllm.data import (Loader, Mixture, Plan, Sample, count_tokens, encode_sample,
                             open_mixture)
from nanoeemllm.paths import from_args
from nanoeemllm.toy import ToyDataset, WorldConfig
from nanoeemllm.toy.backbones import tiny_config
from nanoeemllm.training.config import PAPER, TINY, TrainConfig
from nanoeemllm.data.cost import sample_cost
from nanoeemllm.training.distributed import ProcessGroup
from nanoeemllm.training.forecast import SampleSize
from nanoeemllm.weights.folder import read_config
from nanoeemllm.weights.tokenizer import Tokenizer

MICRO_BATCH_TOKENS = 8192    # a 7B model's activations of them take about 40 GB, not checkpointed


def start_config(start: Path, args: argparse.Namespace, world: WorldConfig) -> ModelConfig:
    """Of the model that a stage starts from, with the visual path that the flags ask for."""
    if args.preset:
        config = PRESETS[args.preset]
    elif (start / "config.json").exists():
        config = read_config(start)
    else:
        config = tiny_config(world)
    return dataclasses.replace(config, visual_path=from_args(args, config))


def stage_config(stage: str, args: argparse.Namespace, samples: int | None = None) -> TrainConfig:
    """The tiny world's settings, or the paper's for so many samples, changed by the flags."""
    default = TINY[stage] if samples is None else PAPER[stage]
    batch_size = args.batch_size or default.batch_size
    steps = args.steps or default.steps
    if not steps:
        steps = max(1, round((args.epochs or 1) * max(1, samples // batch_size)))
    return dataclasses.replace(default, seed=args.seed, steps=steps, batch_size=batch_size,
                               learning_rate=args.lr or default.learning_rate)


def open_files(names: list[str], args: argparse.Namespace, group: ProcessGroup) -> Mixture:
    """Tells what is wrong with the files before the first step."""
    mixture = open_mixture(names, args.images, group.is_first)
    for source in mixture.sources:
        if group.is_first and source.problems:
            print(*source.describe_problems(), sep="\n", file=sys.stderr)
        if len(source.problems) > args.max_bad * (len(source) + len(source.problems)):
            raise UserError(f"{quoted(source.path)}: more than {args.max_bad:.2%} cannot be used: "
                            "mend them, or allow more with --max-bad")
    return mixture


class StageData:
    """Raises UserError where data, tokenizer, model and processes do not fit each other."""

    def __init__(self, train: TrainConfig, settings: dict, args: argparse.Namespace,
                 config: ModelConfig, tokenizer: Tokenizer, group: ProcessGroup, mixture: Mixture,
                 held_out: Mixture | None):
        self.config, self.settings = train, settings        # settings: of the data, for run.json
        batch_size, samples = train.batch_size, len(mixture)
        for name, data in (("--data", mixture), ("--val-data", held_out)):
            size = min(len(data), batch_size) if data else group.size
            if size < group.size:
                raise UserError(f"{name}: steps of {size} samples cannot be dealt to {group.size} "
                                "processes: give more, or a larger --batch-size")
        if args.data and not args.batch_size and 10 * batch_size > samples and group.is_first:
            print(f"the paper's batch of {batch_size} is more than a tenth of {samples:,} samples: "
                  f"with --batch-size {min(32, max(4, samples // 50))} an epoch has more steps",
                  file=sys.stderr)
        template = "plain" if train.stage == "pretrain" else config.chat_template
        tokenizer.end_id(template)       # raises for a template that is not known or does not fit
        if tokenizer.vocab_size > config.llama.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} words and the language "
                            f"model {config.llama.vocab_size}: they do not belong together")
        self.encoding = (tokenizer, template, config.vision,
                         args.max_length or config.llama.max_position_embeddings)
        self.sample_cost = sample_cost(config)

        budget, workers = args.micro_batch_tokens, args.workers
        if args.data:
            budget = budget or MICRO_BATCH_TOKENS
            workers = min(4, os.cpu_count() or 1) if workers is None else workers
        how = (batch_size, train.seed, self.cost if budget else None, budget, workers or 0)
        self.plan = Plan(mixture, *how)
        self.held_out = Plan(held_out, *how) if held_out else None

    def cost(self, conversation: dict) -> float:
        return self.sample_cost(*count_tokens(conversation, *self.encoding))

    def encode(self, conversation: dict) -> Sample:
        return encode_sample(conversation, *self.encoding)

    def loader(self, plan: Plan, group: ProcessGroup, first: int, stop: int) -> Loader:
        return Loader(plan, self.encode, first, stop, group.rank, group.size,
                      group.device.type == "cuda")


def open_data(stage: str, args: argparse.Namespace, world: WorldConfig, config: ModelConfig,
              tokenizer: Tokenizer, group: ProcessGroup) -> StageData:
    """--data and --val-data, or the tiny world's, drawn when needed: no picture comes twice."""
    if args.data:
        mixture = open_files(args.data, args, group)
        held_out = open_files(args.val_data, args, group) if args.val_data else None
        train_config = stage_config(stage, args, len(mixture))
        settings = {"data": args.data, "conversations": mixture.sizes,
                    "max_length": args.max_length}
    else:
        train_config = stage_config(stage, args)
        kind = "caption" if stage == "pretrain" else "conversation"
        batch_size = train_config.batch_size
        epoch = min(train_config.steps * batch_size, 2 ** 20)
        mixture = Mixture([ToyDataset(world, "train", kind, epoch)], endless=True)
        held_out = Mixture([ToyDataset(world, "held-out", kind, 8 * batch_size)])
        settings = {"world": dataclasses.asdict(world),
                    "by_cost": args.micro_batch_tokens is not None}
    return StageData(train_config, settings, args, config, tokenizer, group, mixture, held_out)


# ---- --dry-run ----

def assumed_size(text: str) -> tuple[int, SampleSize]:
    """--assume SAMPLES,TEXT,VISUAL -> number and size of samples that are not there yet."""
    if not re.fullmatch(r"[1-9]\d{0,11},[1-9]\d{0,5},\d{1,6}", text, re.ASCII):
        raise UserError(f"--assume {text}: give three whole numbers, as in 558000,60,4900")
    samples, words, visual = map(int, text.split(","))
    return samples, SampleSize(words, words // 2, visual)


def average_size(data: StageData, most: int = 64) -> SampleSize:
    """Of a few samples of the first epoch."""
    mixture, sizes, reason = data.plan.data, [], None
    for index in mixture.order(data.config.seed, 0)[:most]:
        try:
            sample = data.encode(mixture[int(index)])
        except UserError as error:       # training leaves such a sample out, too
            reason = error
            continue
        visual = sum(len(patches) for patches, _ in sample.images)
        sizes.append((len(sample.ids) - len(sample.images), sum(sample.loss_mask), visual))
    if not sizes:
        raise UserError(f"none of the first samples can be used; the last: {reason}")
    return SampleSize(*np.mean(sizes, axis=0).tolist())
