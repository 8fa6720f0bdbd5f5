"""What a pass costs, by running the real model on the `meta` device, where tensors have shapes and
no values: operations from PyTorch's FlopCounterMode, bytes saved for the backward pass from
saved_tensors_hooks. So no formula has to know a visual path.

A multiplication and its addition are two operations; only matrix products count. Attention counts
the pairs in which the query sees the key, which is what kernels compute; the papers count whole
rectangles (`rectangles=True`). Samples are given as (text tokens, [visual tokens of each image]),
images in front.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from nanoeemllm import kernels  # noqa: F401  whose ops are counted below
from nanoeemllm.attention import compute, use_attention
from nanoeemllm.config import IMAGE_TOKEN, ModelConfig
from nanoeemllm.layout import build_layout
from nanoeemllm.model import EEMLLM, Batch
from nanoeemllm.paths import is_trained

Samples = list[tuple[int, list[int]]]


@register_flop_formula(torch.ops.nanoeemllm.attend, get_raw=True)
def attend_operations(q, k_visual, v_visual, k_text, v_text, tables, *args, **kwargs) -> int:
    """Two products, q k^T and p v, over the pairs that the two tables of counts hold."""
    return 4 * int(tables[6].sum() + tables[7].sum()) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.nanoeemllm.attend_backward, get_raw=True)
def attend_backward_operations(dout, out, lse, q, k_visual, v_visual, k_text, v_text, tables, *args,
                               **kwargs) -> int:
    """Each of the two products has two gradients. Scores that a kernel computes again are, like
    other recomputation, not counted."""
    return 2 * attend_operations(q, k_visual, v_visual, k_text, v_text, tables)


def operations(config: ModelConfig, samples: Samples, rectangles: bool = False,
               logits: int = 1) -> tuple[float, float, float]:
    """The language model's, the projector's and the encoder's in a prefill. logits: rows of them a
    sample."""
    model, batch = meta_batch(config, samples, logits * len(samples))
    with (use_attention(as_rectangle) if rectangles else contextlib.nullcontext(),
          FlopCounterMode(display=False) as counted, torch.no_grad()):
        model(batch)
    counts = counted.get_flop_counts()
    projector, encoder = (sum(counts.get(part, {}).values())
                          for part in ("EEMLLM.projector", "EEMLLM.vision"))
    return counted.get_total_flops() - projector - encoder, projector, encoder


def as_rectangle(q, keys, sees):
    """Attention in which every query sees all keys of its sample. Which row has which count does
    not matter here, their sum does."""
    rows = sees.query.length.long()
    counts = [span.length.repeat_interleave(rows) for span in (sees.visual, sees.text)]
    visual, text = (F.pad(count, (0, len(q) - len(count))) for count in counts)
    return compute(q, keys, dataclasses.replace(sees, sees_visual=visual, sees_text=text))


def step(config: ModelConfig, samples: Samples, stage: str, checkpoint_activations: bool,
         target_rows: int) -> tuple[float, float]:
    """(operations, bytes saved for the backward pass) of a training step, the latter at the end of
    the forward pass: each storage once, without the weights."""
    model, batch = meta_batch(config, samples, target_rows)
    model.decoder.checkpoint_activations = checkpoint_activations
    weights, saved = set(), {}         # storages, held so that none is counted under two names
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, stage))
        weights.add(p.untyped_storage()._cdata)

    def save(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights and x.is_meta:
            saved[storage._cdata] = storage
        return x

    with FlopCounterMode(display=False) as counted:
        with saved_tensors_hooks(save, lambda x: x):
            loss = model(batch)
        loss.backward()
    model.zero_grad()
    return counted.get_total_flops(), sum(storage.nbytes() for storage in saved.values())


def meta_batch(config: ModelConfig, samples: Samples, target_rows: int) -> tuple[EEMLLM, Batch]:
    """The model and packed samples on meta. CLIP takes images of one size alone: as many as come
    nearest."""
    grids = [[(1, n) for n in visual] for _, visual in samples]
    if config.vision and config.vision.architecture == "clip":
        side = config.vision.grid_size
        grids = [[(side, side)] * round(sum(visual) / side ** 2) for _, visual in samples]
    ids, layout = build_layout([[IMAGE_TOKEN] * len(images) + [1] * text
                                for (text, _), images in zip(samples, grids)], grids)
    patch_dim = config.vision.patch_dim if config.vision else 0
    rows = torch.zeros(target_rows, dtype=torch.long, device="meta")
    patches = torch.empty(layout.num_visual, patch_dim, device="meta")
    return meta_model(config), Batch(ids.to("meta"), layout, patches, rows, rows, [])


@functools.lru_cache(maxsize=4)
def meta_model(config: ModelConfig) -> EEMLLM:
    with torch.device("meta"):
        return EEMLLM(config).to(torch.bfloat16)


@functools.lru_cache(maxsize=4)
def sample_cost(config: ModelConfig) -> Callable[[int, int], float]:
    """Training work of a sample, in units of one text token's: f(text tokens, visual tokens).

    The frozen encoder runs forward, the rest forward and backward, three times as much. Work is a
    polynomial in both numbers, of the second degree, so that a few passes give it exactly.
    """
    def terms(text: int, visual: int) -> list[float]:
        return [1, text, text * text, visual, text * visual, visual * visual][:len(points)]

    points = [(2, 0), (16, 0), (40, 0)]
    if config.vision:
        image = config.vision.grid_size ** 2 if config.vision.architecture == "clip" else 64
        points += [(2, image), (16, image), (2, 2 * image)]
    work = []
    for text, visual in points:
        language, projector, encoder = operations(config, [(text, [visual] * bool(visual))],
                                                  logits=0)
        work.append(3 * (language + projector) + encoder)
    matrix = np.array([terms(*point) for point in points], dtype=float)
    scale = matrix.max(axis=0).clip(min=1)
    found = np.linalg.lstsq(matrix / scale, np.array(work), rcond=None)[0] / scale

    @functools.lru_cache(65536)               # many samples have the same lengths
    def cost(text: int, visual: int) -> float:
        return float(found @ terms(text, visual) / (found @ terms(1, 0)))
    return cost
