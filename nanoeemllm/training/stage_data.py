"""What a stage trains on: its samples, how they are encoded, and how steps share them."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Iterator

import numpy as np

from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.data import (Loader, Mixture, Plan, Sample, count_tokens, encode_sample,
                             open_mixture)
from nanoeemllm.prompt import Tokenizer
from nanoeemllm.training.config import PAPER, TINY, TrainConfig
from nanoeemllm.training.cost import sample_cost
from nanoeemllm.training.distributed import ProcessGroup
from nanoeemllm.training.forecast import SampleSize, forecast

MICRO_BATCH_TOKENS = 8192    # a 7B model's activations of them take about 40 GB, not checkpointed


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
            raise UserError(f"{source.path}: more than {args.max_bad:.2%} cannot be used: mend them, or "
                            "allow more with --max-bad")
    return mixture


class StageData:
    """Raises UserError where data, tokenizer, model and processes do not fit each other."""

    def __init__(self, train: TrainConfig, settings: dict, args: argparse.Namespace,
                 config: ModelConfig, tokenizer: Tokenizer, group: ProcessGroup, mixture: Mixture,
                 held_out: Mixture | None):
        self.config, self.settings = train, settings        # settings: of the data, for run.json
        for name, data in (("--data", mixture), ("--val-data", held_out)):
            if data and min(len(data), train.batch_size) < group.size:
                raise UserError(f"{name}: steps of {min(len(data), train.batch_size)} samples cannot be "
                                f"dealt to {group.size} processes: give more, or a larger --batch-size")
        if args.data and not args.batch_size and 10 * train.batch_size > len(mixture) and group.is_first:
            print(f"the paper's batch of {train.batch_size} is more than a tenth of {len(mixture):,} "
                  f"samples: with --batch-size {min(32, max(4, len(mixture) // 50))} an epoch has more "
                  "steps", file=sys.stderr)
        template = "plain" if train.stage == "pretrain" else config.chat_template
        tokenizer.end_id(template)       # raises for a template that is not known or does not fit
        if tokenizer.vocab_size > config.llama.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} words and the language model "
                            f"{config.llama.vocab_size}: they do not belong together")
        self.encoding = (tokenizer, template, config.vision,
                         args.max_length or config.llama.max_position_embeddings)
        self.sample_cost = sample_cost(config)

        budget, workers = args.micro_batch_tokens, args.workers
        if args.data:
            budget = budget or MICRO_BATCH_TOKENS
            workers = min(4, os.cpu_count() or 1) if workers is None else workers
        how = (train.batch_size, train.seed, self.cost if budget else None, budget, workers or 0)
        self.plan = Plan(mixture, *how)
        self.held_out = Plan(held_out, *how) if held_out else None

    def cost(self, conversation: dict) -> float:
        return self.sample_cost(*count_tokens(conversation, *self.encoding))

    def encode(self, conversation: dict) -> Sample:
        return encode_sample(conversation, *self.encoding)

    def loader(self, plan: Plan, group: ProcessGroup, first: int, stop: int) -> Loader:
        return Loader(plan, self.encode, first, stop, group.rank, group.size,
                      group.device.type == "cuda")

    def steps(self, group: ProcessGroup, first: int) -> Loader:
        return self.loader(self.plan, group, first, self.config.steps)

    def held_out_steps(self, group: ProcessGroup) -> Loader:
        return self.loader(self.held_out, group, 0, self.held_out.steps_per_epoch)


# ---- --dry-run ----

def forecast_assumed(stage: str, args: argparse.Namespace, config: ModelConfig) -> Iterator[str]:
    """Of data that is not there yet: --assume SAMPLES,TEXT,VISUAL."""
    if not re.fullmatch(r"[1-9]\d{0,11},[1-9]\d{0,5},\d{1,6}", args.assume, re.ASCII):
        raise UserError(f"--assume {args.assume}: give three whole numbers, as in 558000,60,4900")
    samples, text, visual = map(int, args.assume.split(","))
    sizes = [SampleSize(text, text // 2, [visual] if visual else [])]
    return _forecast(stage_config(stage, args, samples), args, config, sizes)


def forecast_data(data: StageData, args: argparse.Namespace, config: ModelConfig) -> Iterator[str]:
    """Of data like 64 samples of the first epoch."""
    mixture, sizes, reason = data.plan.data, [], None
    for index in np.random.default_rng(args.seed).permutation(mixture.order(args.seed, 0))[:64]:
        try:
            sample = data.encode(mixture[int(index)])
        except UserError as error:       # training leaves such a sample out, too
            reason = error
            continue
        visual = [h * w for _, (h, w) in sample.images]
        sizes.append(SampleSize(len(sample.ids) - len(visual), sum(sample.loss_mask), visual))
    if not sizes:
        raise UserError(f"none of the first samples can be used; the last: {reason}")
    return _forecast(data.config, args, config, sizes)


def _forecast(train: TrainConfig, args: argparse.Namespace, config: ModelConfig,
              sizes: list[SampleSize]) -> Iterator[str]:
    return forecast(config, train, sizes, args.gpus, args.mfu,
                    args.micro_batch_tokens or MICRO_BATCH_TOKENS, args.checkpoint_activations)
