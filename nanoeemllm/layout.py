"""From ids with pictures between them to packed rows: who stands where.

`build_layout` takes lists of ids in which IMAGE_TOKEN stands for a whole picture and gives every token, textual or
visual, its position: its index in the merged sequence in which a picture's tokens stand, in a row, where `<image>`
stood. One sample `a b <image> c` with a picture of three tokens:

    text rows    a b c      positions 0 1 5         visual rows   v v v     positions 2 3 4
    merged rows  a b v v v c
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nanoeemllm.attention import Run
from nanoeemllm.config import IMAGE_TOKEN, UserError


@dataclass(frozen=True)
class Layout:
    """The runs of one packed batch of B samples with T text and V visual rows."""
    text: Run
    visual: Run
    grids: list[tuple[int, int]]          # patches (rows, columns) of every picture, in the order of the visual rows

    @property
    def num_samples(self) -> int:
        return len(self.text.start)

    @cached_property
    def merge(self) -> Tensor:
        """(T + V,): rows of cat([text, visual]), sample by sample, in the order of their positions."""
        sample = torch.cat([_sample_of_row(self.text), _sample_of_row(self.visual)])
        position = torch.cat([self.text.position, self.visual.position]).long()
        return (sample * (position.max() + 1 if len(position) else 1) + position).argsort()

    @cached_property
    def merged(self) -> Run:
        """The run of all rows of a sample together, in merged order."""
        length = self.text.length + self.visual.length
        position = torch.cat([self.text.position, self.visual.position])[self.merge]
        return Run((length.cumsum(0) - length).int(), length, position,
                   self.text.max_length + self.visual.max_length)

    @cached_property
    def unmerge(self) -> Tensor:
        """(T + V,): where each row of cat([text, visual]) stands in merged order; merge's inverse."""
        return torch.empty_like(self.merge).scatter_(0, self.merge, torch.arange(len(self.merge),
                                                                                device=self.merge.device))

    def to(self, device) -> "Layout":
        move = lambda run: Run(*(t.to(device, non_blocking=True) for t in run[:3]), run.max_length)
        return Layout(move(self.text), move(self.visual), self.grids)


def build_layout(samples: list[list[int]], grids: list[list[tuple[int, int]]]) -> tuple[Tensor, Layout]:
    """ids of every sample, and the patch grids of its pictures in order -> text ids (T,) int64 and the Layout.

    Raises UserError if a sample has more or fewer IMAGE_TOKENs than pictures.
    """
    ids, text_position, visual_position = [], [], []
    for number, (sample, sizes) in enumerate(zip(samples, grids)):
        sample = np.asarray(sample, dtype=np.int64)
        is_image = sample == IMAGE_TOKEN
        if is_image.sum() != len(sizes):
            raise UserError(f"sample {number}: {is_image.sum()} <image> in the text but {len(sizes)} picture(s) given")
        length = np.ones(len(sample), dtype=np.int64)
        length[is_image] = [h * w for h, w in sizes]
        start = length.cumsum() - length
        ids.append(sample[~is_image])
        text_position.append(start[~is_image])
        visual_position.append(np.concatenate(
            [np.arange(s, s + n) for s, n in zip(start[is_image], length[is_image])] or [np.zeros(0, np.int64)]))
    layout = Layout(_packed_run(text_position), _packed_run(visual_position), [g for sizes in grids for g in sizes])
    return torch.from_numpy(np.concatenate(ids)), layout


def _packed_run(positions: list[np.ndarray]) -> Run:
    """One sample's rows behind the other's."""
    length = np.array([len(p) for p in positions])
    as_int32 = lambda x: torch.from_numpy(x.astype(np.int32))
    return Run(as_int32(length.cumsum() - length), as_int32(length), as_int32(np.concatenate(positions)),
               int(length.max()))


def _sample_of_row(run: Run) -> Tensor:
    """(N,) for a run whose samples lie one behind the other."""
    return torch.repeat_interleave(torch.arange(len(run.length), device=run.length.device), run.length,
                                   output_size=len(run.position))
