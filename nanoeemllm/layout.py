"""From ids with pictures between them to packed rows: who stands where.

`build_layout` takes lists of ids in which IMAGE_TOKEN stands for a whole picture and gives every token, textual or
visual, its position: its index in the merged sequence in which a picture's tokens stand, in a row, where `<image>`
stood. One sample `a b <image> c` with a picture of three tokens:

    text rows    a b c      positions 0 1 5         visual rows   v v v     positions 2 3 4
    merged rows  a b v v v c
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoeemllm.attention import Run
from nanoeemllm.config import IMAGE_TOKEN, LlamaConfig, UserError
from nanoeemllm.llama import rope_cos_sin


class PlacedPicture(NamedTuple):
    """Where one picture stands in a packed batch."""
    rows: slice          # its visual rows
    grid: tuple[int, int]
    sample: int
    before: slice        # the text rows of its sample that stand before it
    after: slice         # those from it to the sample's next picture, or to the end


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

    @cached_property
    def pictures(self) -> list[PlacedPicture]:
        """Sample by sample, in order. On a GPU the host waits here."""
        found, grids = [], iter(self.grids)
        text_position, visual_position = self.text.position.tolist(), self.visual.position.tolist()
        bounds = zip(*(t.tolist() for run in (self.text, self.visual) for t in (run.start, run.length)))
        for sample, (t, t_length, v, v_length) in enumerate(bounds):
            t_end, v_end = t + t_length, v + v_length
            while v < v_end:
                h, w = grid = next(grids)
                rows, v = slice(v, v + h * w), v + h * w
                place = bisect_left(text_position, visual_position[rows.start], t, t_end)
                stop = bisect_left(text_position, visual_position[v], place, t_end) if v < v_end else t_end
                found.append(PlacedPicture(rows, grid, sample, slice(t, place), slice(place, stop)))
        return found

    @cached_property
    def picture_runs(self) -> tuple[Run, Run]:
        """One run a picture: the text rows from it to the next, and its visual rows."""
        pictures = self.pictures
        return run_of([p.after for p in pictures], self.text), run_of([p.rows for p in pictures], self.visual)

    def to(self, device) -> "Layout":
        move = lambda run: Run(*(t.to(device, non_blocking=True) for t in run[:3]), run.max_length)
        return Layout(move(self.text), move(self.visual), self.grids)


class Context:
    """What every layer of one pass needs beside the rows themselves. (decoder.Step is the same for one new token.)"""

    def __init__(self, config: LlamaConfig, layout: Layout, cache=None):
        """cache: decoder.KVCache, filled by a pass over prompts."""
        self.config, self.layout, self.cache = config, layout, cache
        self.query = self.text = layout.text
        self.visual = layout.visual

    @cached_property
    def rope_text(self) -> tuple[Tensor, Tensor]:
        return rope_cos_sin(self.layout.text.position, self.config)

    @cached_property
    def rope_visual(self) -> tuple[Tensor, Tensor]:
        return rope_cos_sin(self.layout.visual.position, self.config)

    @cached_property
    def rope_merged(self) -> tuple[Tensor, Tensor]:
        return rope_cos_sin(self.layout.merged.position, self.config)

    @property
    def picture_runs(self) -> tuple[Run, Run]:
        return self.layout.picture_runs

    def keep(self, layer: int, k: Tensor, v: Tensor, k_visual: Tensor, v_visual: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer made of its text rows -> the keys and values its queries see as text."""
        if self.cache is not None:
            self.cache.fill(layer, k, v, k_visual, v_visual)
        return k, v


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


def run_of(rows: list[slice], like: Run) -> Run:
    """Slices of like's rows, as a run."""
    bounds = torch.tensor([(r.start, r.stop - r.start) for r in rows], dtype=torch.int32).reshape(-1, 2)
    start, length = bounds.to(like.start.device).unbind(1)
    return Run(start, length, like.position, max((r.stop - r.start for r in rows), default=0))


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
