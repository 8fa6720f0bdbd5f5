"""Random weights, for what is trained from nothing."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanoeemllm.config import ModelConfig

# They write into the residual stream.
RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")


def initialize(model: nn.Module):
    fill(model.named_parameters(), model.config)


def random_weights(like: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """For parts that are yet to be trained, the same in every run."""
    weights = {name: torch.empty(x.shape) for name, x in like.items()}
    fill(weights.items(), config, torch.Generator().manual_seed(0))
    return weights


@torch.no_grad()
def fill(weights: Iterable[tuple[str, Tensor]], config: ModelConfig,
         generator: torch.Generator | None = None):
    """Normal with spread 0.02, biases and gates 0, norms 1; the matrices that write into the
    residual stream are scaled down by the square root of their number (GPT-2)."""
    for name, p in weights:
        if name.endswith(("bias", "class_embedding", "_gate")):
            p.zero_()
        elif p.dim() > 1:
            part = config.vision if name.startswith("vision") else config.llama
            scale = (2 * part.num_hidden_layers) ** -0.5 if name.endswith(RESIDUAL) else 1
            p.normal_(std=0.02 * scale, generator=generator)
        else:
            p.fill_(1)
