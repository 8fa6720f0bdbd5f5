"""What a stage trains and how: its settings, learning rate, trained weights and optimizer."""

import argparse
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import is_trained

WARMUP_STEPS = 8             # at least, but at most a fifth of the steps: see learning_rate
MICRO_BATCH_TOKENS = 8192    # a 7B model's activations of them take about 40 GB, not checkpointed


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one stage."""
    stage: str                          # "pretrain" or "finetune"
    steps: int
    batch_size: int                     # samples a step, over all processes and micro-batches
    learning_rate: float
    warmup: float = 0.03                # part of the steps in which the learning rate rises
    weight_decay: float = 0.0
    clip: float = 1.0                   # largest norm of the gradient
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0


TINY = {  # the tiny world's settings
    "pretrain": TrainConfig("pretrain", 300, 16, 2e-3, betas=(0.9, 0.98)),
    "finetune": TrainConfig("finetune", 1800, 16, 1e-3, weight_decay=0.01, betas=(0.9, 0.98)),
}
PAPER = {  # LLaVA's and the paper's; steps come from the size of the data
    "pretrain": TrainConfig("pretrain", 0, 256, 1e-3),
    "finetune": TrainConfig("finetune", 0, 128, 2e-5),
}


def stage_config(stage: str, args: argparse.Namespace, samples: int | None = None) -> TrainConfig:
    """The tiny world's settings, or the paper's for so many samples, changed by the flags."""
    default = TINY[stage] if samples is None else PAPER[stage]
    batch_size = args.batch_size or default.batch_size
    steps = args.steps or default.steps
    if not steps:
        steps = max(1, round((args.epochs or 1) * max(1, samples // batch_size)))
    return dataclasses.replace(default, seed=args.seed, steps=steps, batch_size=batch_size,
                               learning_rate=args.lr or default.learning_rate)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to 0. Steps count from 0.

    AdamW's first steps change every weight by the whole learning rate, however small its gradient.
    In a short run 3% of the steps are one or two: too few for a new part, whose loss rises.
    """
    warm = max(1, round(config.warmup * config.steps), min(WARMUP_STEPS, config.steps // 5))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, config.steps - warm)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def freeze(model: EEMLLM, stage: str):
    """Leaves to train the projector and what else a visual path adds between encoder and language
    model (stage "pretrain"), or these and the language model."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, stage))


def trained_parameters(model: EEMLLM) -> dict[str, nn.Parameter]:
    """By name. Ask once, before the first step: between a forward and a backward pass FSDP2 shows
    other tensors in their place, which no optimizer knows."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(params: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with its moments made; vectors (norms, biases) are not decayed."""
    groups = [{"params": [p for p in params.values() if p.dim() > 1],
               "weight_decay": config.weight_decay},
              {"params": [p for p in params.values() if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    for p in params.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def training_state(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
                   ) -> dict[str, Tensor]:
    """Trained weights and AdamW's moments, by name: the tensors themselves, to save or read."""
    state = {name: p.detach() for name, p in params.items()}
    for name, p in params.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{name} {moment}"] = optimizer.state[p][moment]
    return state
