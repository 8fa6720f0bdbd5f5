"""Random weights, for what is trained from nothing."""

import torch
from torch import nn

from nanoeemllm.config import ModelConfig


@torch.no_grad()
def initialize(model: nn.Module):
    """Normal with spread 0.02, biases and gates 0, norms 1; the matrices that write into the
    residual stream are scaled down by the square root of their number (GPT-2)."""
    config: ModelConfig = model.config
    for name, p in model.named_parameters():
        if name.endswith(("bias", "class_embedding", "_gate")):
            nn.init.zeros_(p)
        elif p.dim() > 1:
            part = config.vision if name.startswith("vision") else config.llama
            writes = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")
            scale = (2 * part.num_hidden_layers) ** -0.5 if name.endswith(writes) else 1
            nn.init.normal_(p, std=0.02 * scale)
        else:
            nn.init.ones_(p)
