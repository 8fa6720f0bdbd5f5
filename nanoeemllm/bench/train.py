"""A training step: time, MFU and memory of visual paths at equal settings.

    python -m nanoeemllm.bench train                  the tiny shape, 64 and 256 visual tokens, here
    python -m nanoeemllm.bench train --preset eemllm-7b-980 --visual 4900 --text 256 --samples 1

Random weights and images: time does not depend on what was trained. Every case has a process of its
own, so that its peak memory is its own. MFU is operations (none counted twice) over the GPU's dense
bfloat16 peak; where that is not known, over the rate of a large matrix product measured in the same
process.
"""

import argparse
import dataclasses
import itertools
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
import torch.distributed as dist

from nanoeemllm.bench.clock import best_ms, now
from nanoeemllm.bench.operations import add_case_flags, choose, make_parser, paths_of
from nanoeemllm.border.command import positive
from nanoeemllm.border.table import print_table
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, ModelConfig
from nanoeemllm.data import Sample, collate, cost
from nanoeemllm.model import EEMLLM
from nanoeemllm.training.config import TrainConfig, freeze, make_optimizer, trained_parameters
from nanoeemllm.training.distributed import init_distributed, shard_model
from nanoeemllm.training.step import memory_gb, peak_operations, scale_gradients
from nanoeemllm.weights.initialize import initialize

STAGES, SYSTEMS = ("pretrain", "finetune"), ("llava", "eemllm")


def main(command: str, argv: list[str]):
    parser = make_parser(command, __doc__, "tiny")
    add_case_flags(parser, SYSTEMS, [64, 256])
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=STAGES)
    add("--samples", type=positive(int), default=8, help="a step and micro-batch (8)")
    add("--steps", type=positive(int), default=10, help="timed, after two that are not (10)")
    args = parser.parse_args(argv)
    print(f"{args.preset}, {args.samples} samples of {args.text} text tokens a step")
    print_table(lines(args))


def lines(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    preset = PRESETS[args.preset]
    paths = choose(args, paths_of(args, preset), SYSTEMS)
    for stage, visual in itertools.product(args.stages, args.visual):
        first = None
        for name, path in paths.items():
            config = dataclasses.replace(preset, visual_path=path)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                case = alone.submit(measure, args, stage, config, visual)
                ms, operations, peak, gigabytes = case.result()
            first = first or ms
            yield {"stage": stage, "visual tokens": str(visual), "path": name,
                   "ms a step": f"{ms:,.0f}",
                   "to the first": f"{ms / first:.2f}",
                   "tokens/s": f"{1000 * args.samples * (args.text + visual) / ms:,.0f}",
                   "operations a step": f"{operations:.3g}",
                   "MFU": f"{1000 * operations / ms / peak:.0%}",
                   "peak memory": f"{gigabytes:.2f} GB"}


def measure(args: argparse.Namespace, stage: str, config: ModelConfig, visual: int) -> tuple:
    """(ms of a step, the median; its operations; the peak a second; gigabytes)"""
    with init_distributed(None) as group:
        torch.manual_seed(0)
        device = group.device
        with torch.device("meta" if dist.is_initialized() else device):
            model = EEMLLM(config)
        freeze(model, stage)
        shard_model(model, group)
        initialize(model)
        params = trained_parameters(model)
        optimizer = make_optimizer(params, TrainConfig(stage, args.steps, args.samples, 1e-5))
        batch = collate([random_sample(config, args.text, visual)] * args.samples)
        times = []
        for _ in range(args.steps + 2):
            begin = now(device)
            model(batch.to(device)).backward()
            scale_gradients(params.values(), len(batch.targets), group, clip=1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(now(device) - begin)
        held, n = memory_gb(device), 1024
        operations, _ = cost.step(config, [(args.text, [visual])] * args.samples, stage, False,
                                  len(batch.targets))
        a = torch.rand(n, n, device=device)
        peak = peak_operations(device) or 2000 * n ** 3 / best_ms(lambda: a @ a, device)
        return median(times[2:]), operations, peak, held


def random_sample(config: ModelConfig, text: int, visual: int) -> Sample:
    """An image and text, the second half of which are target tokens."""
    words = torch.randint(2, config.llama.vocab_size, (text - 1,)).tolist()
    mask = [False] * (2 + text // 2) + [True] * (text - 1 - text // 2)
    patches = torch.rand(visual, config.vision.patch_dim)
    return Sample([1, IMAGE_TOKEN, *words], mask, [(patches, (math.isqrt(visual),) * 2)], "")
