"""Random packed batches for the tests: samples with no picture, with several, first, middle and last."""

import random

import torch

from nanoeemllm.config import IMAGE_TOKEN
from nanoeemllm.layout import build_layout

HAND_MADE = [  # per sample: ids with IMAGE_TOKEN, and the patch grids of its pictures
    ([1, 2, 3, 4], []),                                                          # text only
    ([IMAGE_TOKEN, 5, 6], [(2, 3)]),                                             # picture first
    ([1, 2, IMAGE_TOKEN, 3, IMAGE_TOKEN, IMAGE_TOKEN, 4, 5], [(1, 1), (3, 2), (2, 2)]),
    ([7], []),                                                                   # one token
    ([1, 2, 3, IMAGE_TOKEN], [(2, 2)]),                                          # picture last
]


def random_samples(seed: int, vocab_size: int = 50) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    rng = random.Random(seed)
    samples, grids = [], []
    for _ in range(rng.randint(1, 5)):
        pictures = rng.choice([0, 0, 1, 1, 2, 5])
        ids = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))]
        for _ in range(pictures):
            ids.insert(rng.randint(0, len(ids)), IMAGE_TOKEN)
        samples.append(ids)
        grids.append([(rng.randint(1, 4), rng.randint(1, 4)) for _ in range(pictures)])
    return samples, grids


def random_layout(seed: int, vocab_size: int = 50):
    """(ids (T,), Layout, number of visual rows); seed 0 is the hand-made batch."""
    samples, grids = random_samples(seed, vocab_size) if seed else map(list, zip(*HAND_MADE))
    ids, layout = build_layout(samples, grids)
    return ids, layout, layout.num_visual


def rows_of(span, sample: int) -> slice:
    return slice(int(span.start[sample]), int(span.start[sample] + span.length[sample]))


def seeded(*shape, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
