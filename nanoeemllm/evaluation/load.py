"""The flags that name a model, and the model itself: for the benchmarks and sample.py."""

from pathlib import Path

import torch

from nanoeemllm.border.command import device_from
from nanoeemllm.paths import add_flags
from nanoeemllm.weights.folder import load


def add_model_flags(parser, **weights):
    """weights: what argparse is told of --weights."""
    add = parser.add_argument
    add("--weights", type=Path, metavar="DIR", **weights)
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="(bfloat16 on a GPU, else as the weights are)")
    add_flags(parser)


def load_model(args, path):
    """The model that the flags name, under a visual path."""
    device = device_from(args.device)
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else None)
    model = load(args.weights, device, dtype and getattr(torch, dtype), path).eval()
    if device == "cpu" and dtype is None and model.dtype == torch.float16:
        model.float()                                 # CPUs have no fast float16
    return model
