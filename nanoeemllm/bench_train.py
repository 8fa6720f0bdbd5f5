"""What a training step costs: time, MFU and memory of `llava` and `eemllm` at equal settings.

    python -m nanoeemllm.bench train                                       the tiny shape, 64 and 256 visual tokens, here
    python -m nanoeemllm.bench train --preset eemllm-7b-980 --visual 4900 --text 256 --samples 1       one large GPU

Random weights and pictures: time does not depend on what was learned. Every case has a process of its own, so that its
peak memory is its own. MFU is operations (flops.py, none counted twice) over the GPU's dense bfloat16 peak; where
that is not known, over the rate of a large matrix product measured in the same process.
"""

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

from nanoeemllm.command_line import Parser, add_visual_path_flags, positive
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, VISUAL_PATHS, UserError, VisualPathConfig
from nanoeemllm.data import Packed, Sample
from nanoeemllm.distributed import join, spread
from nanoeemllm.flops import paths_from, training_operations
from nanoeemllm.model import EEMLLM, collate
from nanoeemllm.training import TrainConfig, accumulate, freeze_for, make_optimizer, memory_gb, peak_operations, update


def main(argv: list[str] | None = None):
    args = parse(argv)
    for visual in args.visual:
        if math.isqrt(visual) ** 2 != visual:
            raise UserError(f"--visual {visual}: give the patches of a square picture, as in {math.isqrt(visual) ** 2}")
    paths = paths_from(args, PRESETS[args.preset])
    names = args.paths or (list(paths) if args.visual_path else ["llava", "eemllm"])
    for name in names:
        if name not in paths:
            raise UserError(f"--paths {name}: with --visual-path known are {', '.join(paths)}")
    print(f"{args.preset}, {args.samples} samples of {args.text} text tokens a step"
          + (", activations checkpointed" if args.checkpoint_activations else "") + (", compiled" if args.compile else ""))
    print("| stage | visual tokens | path | ms a step | to the first | tokens/s | operations a step | MFU | peak memory |\n|---"
          + "|---" * 8 + "|")
    for stage, visual in itertools.product(args.stages, args.visual):
        first = None
        for name in names:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                case = alone.submit(measure, args, stage, paths[name], math.isqrt(visual))
                seconds, operations, peak, gigabytes = case.result()
            first = first or seconds
            print(f"| {stage} | {visual} | {name} | {1e3 * seconds:,.0f} | {seconds / first:.2f} | "
                  f"{args.samples * (args.text + visual) / seconds:,.0f} | {operations:.3g} | "
                  f"{operations / seconds / peak:.0%} | {gigabytes:.2f} GB |", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m nanoeemllm.bench train")
    add = parser.add_argument
    add("--preset", choices=[name for name in PRESETS if PRESETS[name].vision], default="tiny")
    add("--paths", nargs="+", choices=VISUAL_PATHS, help="(llava eemllm)")
    add("--stages", nargs="+", choices=("pretrain", "finetune"), default=["pretrain", "finetune"])
    add("--visual", nargs="+", type=positive(int), default=[64, 256], help="visual tokens a sample (64 256)")
    add("--text", type=positive(int), default=64, help="text tokens a sample (64)")
    add("--samples", type=positive(int), default=8, help="a step and micro-batch (8)")
    add("--steps", type=positive(int), default=10, help="timed, after two that are not (10)")
    add("--checkpoint-activations", action="store_true")
    add("--compile", action="store_true")
    add("--device")
    add_visual_path_flags(parser)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, stage: str, path: VisualPathConfig, side: int) -> tuple[float, float, float, float]:
    """Seconds of a step (the median), its operations, the peak a second, and gigabytes."""
    config = dataclasses.replace(PRESETS[args.preset], visual_path=path)
    with join(args.device) as group:
        torch.manual_seed(0)
        with torch.device("meta" if dist.is_initialized() else group.device):
            model = EEMLLM(config)
        freeze_for(model, stage)
        model.decoder.checkpoint_activations = args.checkpoint_activations
        if args.compile:
            for layer in model.decoder.layers:
                layer.compile(dynamic=True)
        spread(model, group)
        model.initialize()
        settings = TrainConfig(stage, args.steps + 2, args.samples, 1e-5)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(params, settings)
        packed = Packed(0, True, collate([sample(config, args.text, side)] * args.samples), [], [], 0)

        times = []
        for step in range(settings.steps):
            start = time.perf_counter()
            seen, _ = accumulate(model, [packed], stage)
            update(params, optimizer, seen.learned, group, settings, step)     # reads the norm: the host waits
            if group.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        operations = training_operations(config, packed.batch.layout, len(packed.batch.targets), stage)
        held = memory_gb(group.device)
        return statistics.median(times[2:]), operations, peak_operations(group.device) or product_rate(group.device), held


def sample(config, text: int, side: int) -> Sample:
    """A picture and text, the second half of which is learned from."""
    ids = [1, IMAGE_TOKEN, *(2 + i % (config.llama.vocab_size - 2) for i in range(text - 1))]
    patches = torch.rand(side ** 2, config.vision.patch_dim)
    return Sample(ids, [False, False] + [i >= text // 2 for i in range(text - 1)], [(patches, (side, side))], "")


def product_rate(device: torch.device, n: int = 1024) -> float:
    """Operations a second of an n x n matrix product, the best of ten."""
    a, best = torch.rand(n, n, device=device), math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best
