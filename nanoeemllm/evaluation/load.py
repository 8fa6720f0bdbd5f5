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


def load_model(folder: Path, device: str | None, dtype: str | None, path):
    """device and dtype: the flags. path: the visual path."""
    device = device_from(device)
    if dtype is None and device.startswith("cuda"):
        dtype = "bfloat16"
    model = load(folder, device, dtype and getattr(torch, dtype), path).eval()
    if device == "cpu" and dtype is None and model.dtype == torch.float16:
        model.float()                                 # CPUs have no fast float16
    return model
