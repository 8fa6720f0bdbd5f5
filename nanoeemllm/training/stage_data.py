"""What a stage trains on: its samples, how they are encoded, and how steps share them."""

import argparse
import dataclasses
import os
import sys

import numpy as np

from nanoeemllm.border.files import quoted
from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.data import (Loader, Mixture, Packed, Plan, Sample, count_tokens, encode_sample,
                             open_mixture)
from nanoeemllm.data.cost import sample_cost
from nanoeemllm.toy import ToyDataset, WorldConfig
from nanoeemllm.training.config import MICRO_BATCH_TOKENS, stage_config
from nanoeemllm.training.distributed import ProcessGroup
from nanoeemllm.weights.tokenizer import Tokenizer


class StageData:
    """--data and --val-data, or the tiny world, drawn when it is needed: no picture comes twice.

    config: the stage's TrainConfig. plan, held_out: which samples, when (held_out may be None).
    settings: for run.json. Raises UserError where data, tokenizer, model and processes do not fit
    each other.
    """

    def __init__(self, stage: str, args: argparse.Namespace, world: WorldConfig,
                 config: ModelConfig, tokenizer: Tokenizer, group: ProcessGroup):
        self.group = group
        template = "plain" if stage == "pretrain" else config.chat_template
        tokenizer.end_id(template)       # raises for a template that is not known or does not fit
        if tokenizer.vocab_size > config.llama.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} words and the language "
                            f"model {config.llama.vocab_size}: they do not belong together")
        self.encoding = (tokenizer, template, config.vision,
                         args.max_length or config.llama.max_position_embeddings)
        self.sample_cost = sample_cost(config)

        budget, workers = args.micro_batch_tokens, args.workers or 0
        if args.data:
            data = open_files(args.data, args, group)
            held_out = open_files(args.val_data, args, group) if args.val_data else None
            self.config = stage_config(stage, args, len(data))
            self.settings = {"data": args.data, "conversations": data.sizes,
                             "max_length": args.max_length}
            budget = budget or MICRO_BATCH_TOKENS
            if args.workers is None:
                workers = min(4, os.cpu_count() or 1)
        else:
            self.config = stage_config(stage, args)
            kind = "caption" if stage == "pretrain" else "conversation"
            epoch = min(self.config.steps * self.config.batch_size, 2 ** 20)
            data = Mixture([ToyDataset(world, "train", kind, epoch)], endless=True)
            held_out = Mixture([ToyDataset(world, "held-out", kind, 8 * self.config.batch_size)])
            self.settings = {"world": dataclasses.asdict(world), "by_cost": budget is not None}

        batch_size = self.config.batch_size
        for name, samples in (("--data", data), ("--val-data", held_out)):
            size = min(len(samples), batch_size) if samples else group.size
            if size < group.size:
                raise UserError(f"{name}: steps of {size} samples cannot be dealt to {group.size} "
                                "processes: give more, or a larger --batch-size")
        if args.data and not args.batch_size and 10 * batch_size > len(data) and group.is_first:
            print(f"the paper's batch of {batch_size} is more than a tenth of {len(data):,} samples"
                  f": with --batch-size {min(32, max(4, len(data) // 50))} an epoch has more steps",
                  file=sys.stderr)
        how = (batch_size, self.config.seed, self.cost if budget else None, budget, workers)
        self.plan = Plan(data, *how)
        self.held_out = Plan(held_out, *how) if held_out else None

    def cost(self, conversation: dict) -> float:
        return self.sample_cost(*count_tokens(conversation, *self.encoding))

    def encode(self, conversation: dict) -> Sample:
        return encode_sample(conversation, *self.encoding)

    def load(self, first: int) -> Loader:
        """Training's batches from step `first` on."""
        return self._loader(self.plan, first, self.config.steps)

    def load_held_out(self) -> Loader:
        return self._loader(self.held_out, 0, self.held_out.steps_per_epoch)

    def _loader(self, plan: Plan, first: int, stop: int) -> Loader:
        return Loader(plan, self.encode, first, stop, self.group.rank, self.group.size,
                      self.group.device.type == "cuda")

    def first_batch(self) -> Packed:
        with self._loader(self.plan, 0, 1) as loader:
            return next(iter(loader))

    def average_size(self) -> list[float]:
        """(text tokens, target tokens, visual tokens) of a few samples of the first epoch."""
        sizes, reason = [], None
        for index in self.plan.data.order(self.config.seed, 0)[:64]:
            try:
                sample = self.encode(self.plan.data[int(index)])
            except UserError as error:   # training leaves such a sample out, too
                reason = error
                continue
            visual = sum(len(patches) for patches, _ in sample.images)
            sizes.append((len(sample.ids) - len(sample.images), sum(sample.loss_mask), visual))
        if not sizes:
            raise UserError(f"none of the first samples can be used; the last: {reason}")
        return np.mean(sizes, axis=0).tolist()


def open_files(names: list[str], args: argparse.Namespace, group: ProcessGroup) -> Mixture:
    """Tells what is wrong with the files before the first step: how much, and the first of it."""
    mixture = open_mixture(names, args.images, group.is_first)
    for source in mixture.sources:
        count, total = len(source.problems), len(source) + len(source.problems)
        if count and group.is_first:
            lines = [f"  {where}: {reason}" for where, reason in source.problems[:10]]
            print(f"{quoted(source.path)}: {count:,} of {total:,} conversations cannot be used and "
                  "are left out:", *lines, sep="\n", file=sys.stderr)
            if count > 10:
                print(f"  ... and {count - 10:,} more", file=sys.stderr)
        if count > args.max_bad * total:
            raise UserError(f"{quoted(source.path)}: more than {args.max_bad:.2%} cannot be used: "
                            "mend them, or allow more with --max-bad")
    return mixture
