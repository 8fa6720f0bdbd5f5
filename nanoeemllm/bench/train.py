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
import statistics
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

from nanoeemllm.bench.operations import paths_of
from nanoeemllm.bench.systems import best_ms, now
from nanoeemllm.border.command import Parser, positive
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, UserError, VisualPath
from nanoeemllm.data import Sample, collate, cost
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import PATHS, add_flags
from nanoeemllm.training.config import TrainConfig, freeze, make_optimizer, trained_parameters
from nanoeemllm.training.distributed import init_distributed, shard_model
from nanoeemllm.training.step import memory_gb, peak_operations, scale_gradients
from nanoeemllm.weights.initialize import initialize

HEAD = ["stage", "visual tokens", "path", "ms a step", "to the first", "tokens/s",
        "operations a step", "MFU", "peak memory"]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m nanoeemllm.bench train")
    add = parser.add_argument
    add("--preset", choices=[name for name in PRESETS if PRESETS[name].vision], default="tiny")
    add("--paths", nargs="+", choices=PATHS, help="(llava eemllm)")
    add("--stages", nargs="+", choices=("pretrain", "finetune"), default=["pretrain", "finetune"])
    add("--visual", nargs="+", type=positive(int), default=[64, 256], help="a sample's (64 256)")
    add("--text", type=positive(int), default=64, help="text tokens a sample (64)")
    add("--samples", type=positive(int), default=8, help="a step and micro-batch (8)")
    add("--steps", type=positive(int), default=10, help="timed, after two that are not (10)")
    add("--checkpoint-activations", action="store_true")
    add("--device")
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = parse(argv)
    for visual in args.visual:
        if math.isqrt(visual) ** 2 != visual:
            raise UserError(f"--visual {visual}: give the patches of a square picture, as in "
                            f"{math.isqrt(visual) ** 2}")
    paths = paths_of(args, PRESETS[args.preset])
    names = args.paths or (list(paths) if args.visual_path else ["llava", "eemllm"])
    for name in names:
        if name not in paths:
            raise UserError(f"--paths {name}: with --visual-path known are {', '.join(paths)}")
    print(f"{args.preset}, {args.samples} samples of {args.text} text tokens a step"
          + ", activations checkpointed" * args.checkpoint_activations)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for stage, visual in itertools.product(args.stages, args.visual):
        first = None
        for name in names:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                case = alone.submit(measure, args, stage, paths[name], math.isqrt(visual))
                ms, operations, peak, gigabytes = case.result()
            first = first or ms
            print(f"| {stage} | {visual} | {name} | {ms:,.0f} | {ms / first:.2f} | "
                  f"{1000 * args.samples * (args.text + visual) / ms:,.0f} | {operations:.3g} | "
                  f"{1000 * operations / ms / peak:.0%} | {gigabytes:.2f} GB |", flush=True)


def measure(args: argparse.Namespace, stage: str, path: VisualPath, side: int) -> tuple:
    """(ms of a step, the median; its operations; the peak a second; gigabytes)"""
    config = dataclasses.replace(PRESETS[args.preset], visual_path=path)
    with init_distributed(args.device) as group:
        torch.manual_seed(0)
        with torch.device("meta" if dist.is_initialized() else group.device):
            model = EEMLLM(config)
        freeze(model, stage)
        model.decoder.checkpoint_activations = args.checkpoint_activations
        shard_model(model, group)
        initialize(model)
        params = trained_parameters(model)
        optimizer = make_optimizer(params, TrainConfig(stage, args.steps, args.samples, 1e-5))
        batch = collate([sample(config, args.text, side)] * args.samples)
        times = []
        for _ in range(args.steps + 2):
            begin = now(group.device)
            model(batch.to(group.device)).backward()
            scale_gradients(params.values(), len(batch.targets), group, clip=1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(now(group.device) - begin)
        held = memory_gb(group.device)
        operations, _ = cost.step(config, [(args.text, [side ** 2])] * args.samples, stage, False,
                                  len(batch.targets))
        return statistics.median(times[2:]), operations, peak(group.device), held


def peak(device: torch.device, n: int = 1024) -> float:
    """Operations a second: known of the GPU, or of an n x n matrix product."""
    a = torch.rand(n, n, device=device)
    return peak_operations(device) or 2000 * n ** 3 / best_ms(lambda: a @ a, device)


def sample(config, text: int, side: int) -> Sample:
    """An image and text, the second half of which are target tokens."""
    ids = [1, IMAGE_TOKEN, *(2 + i % (config.llama.vocab_size - 2) for i in range(text - 1))]
    mask = [False, False] + [i >= text // 2 for i in range(text - 1)]
    patches = torch.rand(side ** 2, config.vision.patch_dim)
    return Sample(ids, mask, [(patches, (side, side))], "")
