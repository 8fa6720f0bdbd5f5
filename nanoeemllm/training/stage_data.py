"""What a stage trains on: its samples, how they are encoded, and how steps share them."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.data import Loader, Mixture, Plan, count_tokens, encode_sample, open_mixture
from nanoeemllm.prompt import Tokenizer
from nanoeemllm.training import cost
from nanoeemllm.training.config import PAPER, TINY, TrainConfig
from nanoeemllm.training.distributed import ProcessGroup
from nanoeemllm.training.forecast import SampleSize

MICRO_BATCH_TOKENS = 8192    # a 7B model's activations of them take about 40 GB, not checkpointed


@dataclass(frozen=True)
class StageData:
    plan: Plan
    held_out: Plan | None
    encode: Callable            # conversation -> Sample

    def loader(self, plan: Plan, group: ProcessGroup, first: int, stop: int) -> Loader:
        return Loader(plan, self.encode, first, stop, group.rank, group.size,
                      group.device.type == "cuda")


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


def plan_stage(train: TrainConfig, args: argparse.Namespace, config: ModelConfig,
               tokenizer: Tokenizer, group: ProcessGroup, mixture: Mixture,
               held_out: Mixture | None) -> StageData:
    """Raises UserError where data, tokenizer, model and processes do not fit each other."""
    for name, data in (("--data", mixture), ("--val-data", held_out)):
        if data and min(len(data), train.batch_size) < group.size:
            raise UserError(f"{name}: steps of {min(len(data), train.batch_size)} samples cannot be dealt "
                            f"to {group.size} processes: give more samples, or a larger --batch-size")
    if args.data and not args.batch_size and 10 * train.batch_size > len(mixture) and group.is_first:
        print(f"the paper's batch of {train.batch_size} is more than a tenth of {len(mixture):,} samples: "
              f"with --batch-size {min(32, max(4, len(mixture) // 50))} an epoch has more steps",
              file=sys.stderr)
    template = "plain" if train.stage == "pretrain" else config.chat_template
    tokenizer.end_id(template)           # raises for a template that is not known or does not fit
    if tokenizer.vocab_size > config.llama.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} words and the language model "
                        f"{config.llama.vocab_size}: they do not belong together")
    how = (tokenizer, template, config.vision,
           args.max_length or config.llama.max_position_embeddings)
    cost_of, budget = cost.sample_cost(config), args.micro_batch_tokens
    workers = args.workers
    if args.data:
        budget = budget or MICRO_BATCH_TOKENS
        workers = min(4, os.cpu_count() or 1) if workers is None else workers

    def plan(data: Mixture) -> Plan:
        measured = (lambda conversation: cost_of(*count_tokens(conversation, *how))) if budget else None
        return Plan(data, train.batch_size, train.seed, measured, budget, workers or 0)

    return StageData(plan(mixture), held_out and plan(held_out),
                     lambda conversation: encode_sample(conversation, *how))


def assumed_sizes(text: str) -> tuple[int, list[SampleSize]]:
    """--assume SAMPLES,TEXT,VISUAL -> number of samples, and one like all of them."""
    if not re.fullmatch(r"[1-9]\d{0,11},[1-9]\d{0,5},\d{1,6}", text, re.ASCII):
        raise UserError(f"--assume {text}: give three whole numbers, as in 558000,60,4900")
    samples, words, visual = map(int, text.split(","))
    return samples, [SampleSize(words, words // 2, [visual] if visual else [])]


def measured_sizes(data: StageData, seed: int, count: int = 64) -> list[SampleSize]:
    """Of a few samples of the first epoch."""
    mixture, sizes, reason = data.plan.data, [], None
    for index in np.random.default_rng(seed).permutation(mixture.order(seed, 0))[:count]:
        try:
            sample = data.encode(mixture[int(index)])
        except UserError as error:       # training leaves such a sample out, too
            reason = error
            continue
        visual = [h * w for _, (h, w) in sample.images]
        sizes.append(SampleSize(len(sample.ids) - len(visual), sum(sample.loss_mask), visual))
    if not sizes:
        raise UserError(f"none of {count} samples can be used; the last: {reason}")
    return sizes
