"""What a stage trains on: its samples, how they are encoded, and how steps share them."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator

import numpy as np

from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.data import Encoder, Mixture, Packed, Plan, load_batches, open_mixture
from nanoeemllm.data.cost import sample_cost
from nanoeemllm.data.packing import assign_to_ranks
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
        self.encode = Encoder(tokenizer, template, config.vision,
                              args.max_length or config.llama.max_position_embeddings)

        budget, workers, held_out = args.micro_batch_tokens, args.workers, None
        if args.data:
            about_files = (args.images, args.max_bad, group.is_first)
            data = open_mixture(args.data, *about_files)
            if args.val_data:
                held_out = open_mixture(args.val_data, *about_files)
            self.config = stage_config(stage, args, len(data))
            self.settings = {"data": args.data, "conversations": data.sizes,
                             "max_length": args.max_length}
            budget = budget or MICRO_BATCH_TOKENS
            workers = min(4, os.cpu_count() or 1) if workers is None else workers
        else:
            self.config = stage_config(stage, args)
            kind = "caption" if stage == "pretrain" else "conversation"
            epoch = min(self.config.steps * self.config.batch_size, 2 ** 20)
            data = Mixture([ToyDataset(world, "train", kind, epoch)], endless=True)
            held_out = Mixture([ToyDataset(world, "held-out", kind, 8 * self.config.batch_size)])
            self.settings = {"world": dataclasses.asdict(world), "by_cost": budget is not None}

        size, cost_of = self.config.batch_size, sample_cost(config)
        if args.data and not args.batch_size and 10 * size > len(data) and group.is_first:
            smaller = min(32, max(4, group.size, len(data) // 50))
            print(f"the paper's batch of {size} is more than a tenth of {len(data):,} samples: with"
                  f" --batch-size {smaller} an epoch has more steps", file=sys.stderr)

        def cost(conversation: dict) -> float:
            return cost_of(*self.encode.count(conversation))

        how = (size, self.config.seed, cost if budget else None, budget, workers or 0)
        self.plan = Plan(data, *how)
        self.held_out = Plan(held_out, *how) if held_out else None
        for samples in (data, held_out or data):         # each step must have enough of them
            assign_to_ranks(np.ones(min(len(samples), size)), group.size, None)

    def load(self, first: int) -> Iterator[Packed]:
        """Training's batches from step `first` on."""
        return self._load(self.plan, first, self.config.steps)

    def load_held_out(self) -> Iterator[Packed]:
        return self._load(self.held_out, 0, self.held_out.steps_per_epoch)

    def first_step(self) -> Iterator[Packed]:
        return self._load(self.plan, 0, 1)

    def _load(self, plan: Plan, first: int, stop: int) -> Iterator[Packed]:
        return load_batches(plan, self.encode, first, stop, self.group.rank, self.group.size,
                            self.group.device.type == "cuda")
