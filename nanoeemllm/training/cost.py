"""Operations and saved bytes. (Stands in for the count by a meta run, with the former formulas.)"""

import functools

import torch

from nanoeemllm import flops
from nanoeemllm.config import IMAGE_TOKEN
from nanoeemllm.layout import build_layout


def _layout(samples):
    ids = [[1] * (text - 1) + [IMAGE_TOKEN] * len(visual) + [1] for text, visual in samples]
    return build_layout(ids, [[(1, n) for n in visual] for _, visual in samples])[1]


def operations(config, samples, stage=None):
    if stage is None:
        return flops.forward_operations(config, _layout(samples), 0).total()
    return flops.training_operations(config, _layout(samples), 0, stage)


def sample_cost(config):
    one_token = flops.sample_operations(config, 1, [])["text"]

    @functools.lru_cache(65536)
    def cost(text, visual):
        count = flops.sample_operations(config, text, [(visual, 0, text)] if visual else [], seen=True)
        return (count.total() - count["encoder"] * 2 / 3) / one_token
    return cost


def step(config, samples, stage, checkpoint_activations, target_rows):
    llama, layout = config.llama, _layout(samples)
    done = flops.training_operations(config, layout, target_rows, stage, checkpoint_activations)
    row = 4 * llama.hidden_size + 4 * llama.intermediate_size
    rows = sum(text + sum(visual) for text, visual in samples)
    saved = 2 * rows * (llama.hidden_size if checkpoint_activations else row) * llama.num_hidden_layers
    return done, saved + target_rows * llama.vocab_size * 10
