"""Random weights, for what is trained from nothing."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanoeemllm.config import ModelConfig

# They write into the residual stream.
RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")
GELU_RMS = 0.652    # of GELU(z), z normal with spread 1


def initialize(model: nn.Module):
    fill(model.named_parameters(), model.config)


def random_weights(like: dict[str, Tensor], config: ModelConfig,
                   words: Tensor | None = None) -> dict[str, Tensor]:
    """For parts that are yet to be trained, the same in every run. words: the token embedding
    (vocabulary, C) of a trained language model that they stand beside."""
    weights = {name: torch.empty(x.shape) for name, x in like.items()}
    generator = torch.Generator().manual_seed(0)
    fill(weights.items(), config, generator)
    if words is not None:
        resemble_words(weights, words, generator)
    return weights


@torch.no_grad()
def resemble_words(weights: dict[str, Tensor], words: Tensor, generator: torch.Generator):
    """A new projector makes visual tokens with the words' mean and spread, channel by channel, of
    image features with RMS 1.

    A language model knows nothing but its words, and these are not centred: two thirds of a row's
    RMS is their common mean in SmolLM2-135M. Rows without it, and too like one another, are
    attention sinks to it: most visual tokens of llava came to 40 times the RMS of the text's, and
    the loss went up before it went down.
    """
    spread, mean = torch.std_mean(words[::1 + len(words) // 8192].float().cpu(), 0)
    for name, x in weights.items():
        if name == "projector.linear_1.weight":
            x.normal_(std=x.shape[1] ** -0.5, generator=generator)
        elif name == "projector.linear_2.weight":
            x.normal_(std=x.shape[1] ** -0.5 / GELU_RMS, generator=generator).mul_(spread[:, None])
        elif name == "projector.linear_2.bias":
            x.copy_(mean)


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
