"""Pictures paid for once: their keys and values, kept from prompt to prompt.

In a composite path visual tokens never look at text, so a picture's keys and values in all layers follow from the
picture and its place alone. `see` computes them, `read` lets prompts see them: the second question about a picture
costs a pass over its text. Where a picture stands elsewhere in the next prompt its keys are turned there, since
RoPE's turns add up:   k(p + s) = R(s) k(p).   Values know no place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoeemllm.attention import Run
from nanoeemllm.config import UserError
from nanoeemllm.decoder import Decoder, KVCache
from nanoeemllm.layout import Layout
from nanoeemllm.llama import rope_cos_sin
from nanoeemllm.visual_path import CompositePath, Context


@dataclass(eq=False, repr=False)
class Picture:
    """A picture's keys and values in every layer, each (n, G, D), as if its first token stood at position 0."""
    grid: tuple[int, int]
    k: list[Tensor]
    v: list[Tensor]
    turned: tuple[int, list[Tensor]] | None = None           # the last other place, and the keys there

    def keys_at(self, start: int, decoder: Decoder) -> list[Tensor]:
        """Always from the keys at 0, so that roundings do not pile up."""
        if start == 0:
            return self.k
        if self.turned is None or self.turned[0] != start:
            rope = rope_cos_sin(torch.tensor([start], device=self.k[0].device), decoder.config)
            exact = torch.promote_types(self.k[0].dtype, torch.float32)
            self.turned = start, [decoder.path.turn(k.to(exact), rope).to(k.dtype) for k in self.k]
        return self.turned[1]


def see(decoder: Decoder, visual: Tensor, grids: list[tuple[int, int]]) -> list[Picture]:
    """Visual tokens (V, C) of some pictures -> the pictures. Raises UserError under a path whose visual tokens look at
    text."""
    if not isinstance(decoder.path, CompositePath):
        raise UserError("pictures cannot be kept under this model's visual path: its visual tokens look at the text before "
                        "them, so their keys and values are other ones in every prompt; give the images with each prompt")
    device, lengths = visual.device, [h * w for h, w in grids]
    position = torch.cat([torch.arange(n, dtype=torch.int32, device=device) for n in lengths])
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    ctx = Context(decoder.config, Layout(Run(zero, zero, position[:0], 0),
                                         Run(zero, zero + len(position), position, len(position)), grids))
    layers, (_, rows) = [], decoder.path.begin(visual[:0], visual, ctx)
    for layer in decoder.layers:
        k, v, rows = decoder.path.visual_step(layer, rows, ctx)
        layers.append((k.split(lengths), v.split(lengths)))
    return [Picture(grid, [k[i] for k, _ in layers], [v[i] for _, v in layers]) for i, grid in enumerate(grids)]


@dataclass(frozen=True)
class KeptKeys:
    """What a batch of prompts sees of its pictures. Samples with the same pictures at the same places share one copy;
    a single picture is not even copied for the batch."""
    k: list[Tensor]           # per layer (V, G, D)
    v: list[Tensor]
    layout: Layout            # the batch's, its visual run pointing into k and v


def gather(decoder: Decoder, pictures: list[list[Picture]], layout: Layout) -> KeptKeys:
    """pictures of every sample, at least one in all; layout: as layout.build_layout makes it, on the CPU."""
    copies: dict[tuple, int] = {}                            # pictures and their places -> first row
    parts, position, start = [], [], []
    for group, row in zip(pictures, layout.visual.start.tolist()):
        first_rows = [row + sum(len(p.k[0]) for p in group[:i]) for i in range(len(group))]
        placed = [(picture, int(layout.visual.position[r])) for picture, r in zip(group, first_rows)]
        key = tuple((id(picture), place) for picture, place in placed)
        if key not in copies:
            copies[key] = sum(map(len, position))
            parts += placed
            position += [torch.arange(place, place + len(p.k[0]), dtype=torch.int32) for p, place in placed]
        start.append(copies[key])
    join = lambda tensors: tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    visual = Run(torch.tensor(start, dtype=torch.int32), layout.visual.length, torch.cat(position),
                 layout.visual.max_length)
    return KeptKeys([join(k) for k in zip(*(picture.keys_at(place, decoder) for picture, place in parts))],
                    [join(v) for v in zip(*(picture.v for picture, _ in parts))],
                    Layout(layout.text, visual, layout.grids).to(parts[0][0].v[0].device))


def read(decoder: Decoder, ids: Tensor, kept: KeptKeys, cache: KVCache | None = None) -> Tensor:
    """Decoder.forward from kept pictures: text ids (T,) -> hidden rows (T, C); nothing is computed for a visual row."""
    ctx = Context(decoder.config, kept.layout, cache)
    text = decoder.embed_tokens(ids)
    text, _ = decoder.path.begin(text, text[:0], ctx)
    for layer, k, v in zip(decoder.layers, kept.k, kept.v):
        text = decoder.path.text_step(layer, text, k, v, ctx)
    return decoder.norm(text)
