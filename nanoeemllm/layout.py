"""From ids with images between them to packed rows: where each token stands, and what it sees.

`build_layout` takes lists of ids in which IMAGE_TOKEN stands for a whole image. A token's position
is its index in the merged sequence, in which an image's tokens stand, in a row, where `<image>`
stood. One sample `a b <image> c` with an image of three tokens:

    merged       a b v v v c
    text rows    a b c      positions 0 1 5     see visual 0 0 3    text 1 2 3
    visual rows  v v v      positions 2 3 4     see visual 1 2 3    text 2 2 2   (where they query)

Rows of all samples are packed: the text rows of all, then the visual rows of all.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoeemllm.attention import Span, Visibility, empty_span
from nanoeemllm.config import IMAGE_TOKEN, UserError


class PlacedImage(NamedTuple):
    """Where one image stands in a packed batch."""
    rows: slice          # its visual rows, counted from the first visual row
    grid: tuple[int, int]
    sample: int
    before: slice        # the text rows of its sample that stand before it
    after: slice         # those from it to the sample's next image, or to the end


@dataclass(frozen=True, eq=False)
class Layout:
    """One packed batch of B samples with T text and V visual rows."""
    text: Span
    visual: Span
    position: Tensor         # (T + V,) int32, text rows first
    sees_visual: Tensor      # (T + V,) int32: the row sees so many of its sample's visual keys
    sees_text: Tensor        # (T + V,) int32: and so many of its text keys
    images: tuple[PlacedImage, ...]
    num_text: int            # T

    @property
    def num_samples(self) -> int:
        return len(self.text.start)

    @property
    def num_visual(self) -> int:
        return len(self.position) - self.num_text

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Patches (rows, columns) of every image, in the order of the visual rows."""
        return [image.grid for image in self.images]

    @cached_property
    def text_queries(self) -> Visibility:
        T = self.num_text
        return Visibility(self.text, self.visual, self.text, self.sees_visual[:T],
                          self.sees_text[:T])

    @cached_property
    def visual_queries(self) -> Visibility:
        T = self.num_text
        return Visibility(self.visual, self.visual, self.text, self.sees_visual[T:],
                          self.sees_text[T:])

    @cached_property
    def last_image_queries(self) -> Visibility:
        """Every text row that has an image before it, and the last such image alone: a query group
        an image, which sees all of it and no text."""
        query = span_of([image.after for image in self.images], self.text.start.device)
        visual = span_of([image.rows for image in self.images], self.text.start.device)
        sees = torch.zeros_like(self.sees_visual[:self.num_text])
        for image in self.images:
            sees[image.after] = image.rows.stop - image.rows.start
        return Visibility(query, visual, empty_span(query), sees, torch.zeros_like(sees))

    @property
    def last_images(self) -> Span:
        """The rows of every sample's last image."""
        rows = {image.sample: image.rows for image in self.images}
        return span_of([rows.get(sample, slice(0, 0)) for sample in range(self.num_samples)],
                       self.text.start.device)

    def to(self, device) -> "Layout":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        text, visual = (Span(move(s.start), move(s.length), s.max_length)
                        for s in (self.text, self.visual))
        return Layout(text, visual, move(self.position), move(self.sees_visual),
                      move(self.sees_text), self.images, self.num_text)


def build_layout(samples: list[list[int]],
                 grids: list[list[tuple[int, int]]]) -> tuple[Tensor, Layout]:
    """ids of every sample, and the patch grids of its images in order -> text ids (T,) int64 and
    the Layout. Raises UserError if a sample has more or fewer IMAGE_TOKENs than images."""
    parts, images = [], []
    text_end = visual_end = 0
    for number, (sample, sizes) in enumerate(zip(samples, grids)):
        ids = np.asarray(sample, dtype=np.int64)
        is_image = ids == IMAGE_TOKEN
        if is_image.sum() != len(sizes):
            raise UserError(f"sample {number}: {is_image.sum()} <image> in the text but "
                            f"{len(sizes)} picture(s) given")
        parts.append(place_sample(ids, is_image, np.array([h * w for h, w in sizes], np.int64)))
        images += place_images(number, is_image, sizes, text_end, visual_end)
        text_end, visual_end = text_end + len(parts[-1].ids), visual_end + len(parts[-1].offset)

    def join(*names: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for name in names for part in parts])

    def as_int32(x) -> Tensor:
        return torch.from_numpy(np.asarray(x).astype(np.int32))

    spans = []
    for lengths in ([len(part.ids) for part in parts], [len(part.offset) for part in parts]):
        lengths = np.array(lengths)
        starts = lengths.cumsum() - lengths
        spans.append(Span(as_int32(starts), as_int32(lengths), int(lengths.max())))
    layout = Layout(*spans, as_int32(join("text_position", "visual_position")),
                    as_int32(join("text_sees_visual", "visual_sees_visual")),
                    as_int32(join("text_sees_text", "visual_sees_text")), tuple(images), text_end)
    return torch.from_numpy(join("ids")), layout


class PlacedSample(NamedTuple):
    """One sample's rows: T of text, V visual."""
    ids: np.ndarray                  # (T,) without images
    text_position: np.ndarray        # (T,)
    text_sees_visual: np.ndarray
    text_sees_text: np.ndarray
    offset: np.ndarray               # (V,) 0, 1, ... within each image
    visual_position: np.ndarray      # (V,)
    visual_sees_visual: np.ndarray
    visual_sees_text: np.ndarray


def place_sample(ids: np.ndarray, is_image: np.ndarray, sizes: np.ndarray) -> PlacedSample:
    """sizes: visual tokens of each image."""
    length = np.ones(len(ids), np.int64)          # of each entry of ids, in merged positions
    length[is_image] = sizes
    start = length.cumsum() - length
    text_before = (~is_image).cumsum() - ~is_image
    visual_before = start - text_before
    offset = np.arange(sizes.sum()) - np.repeat(visual_before[is_image], sizes)
    return PlacedSample(
        ids[~is_image], start[~is_image], visual_before[~is_image], text_before[~is_image] + 1,
        offset, np.repeat(start[is_image], sizes) + offset,
        np.repeat(visual_before[is_image], sizes) + offset + 1,
        np.repeat(text_before[is_image], sizes))


def place_images(sample: int, is_image: np.ndarray, grids: list[tuple[int, int]], text_row: int,
                 visual_row: int) -> list[PlacedImage]:
    """The images of one sample whose first text and visual rows are given."""
    text_before = ((~is_image).cumsum() - ~is_image)[is_image].tolist()
    num_text = int((~is_image).sum())
    images = []
    for grid, before, until in zip(grids, text_before, [*text_before[1:], num_text]):
        rows = slice(visual_row, visual_row + grid[0] * grid[1])
        images.append(PlacedImage(rows, grid, sample, slice(text_row, text_row + before),
                                  slice(text_row + before, text_row + until)))
        visual_row = rows.stop
    return images


def span_of(rows: list[slice], device) -> Span:
    bounds = torch.tensor([(r.start, r.stop - r.start) for r in rows], dtype=torch.int32)
    start, length = bounds.reshape(-1, 2).to(device).T.contiguous()
    return Span(start, length, max((r.stop - r.start for r in rows), default=0))


def move_images(layout: Layout, visual: Span, starts: list[int]) -> Layout:
    """The layout whose visual rows lie elsewhere: image i's from row starts[i] on."""
    moved = [image._replace(rows=slice(start, start + image.rows.stop - image.rows.start))
             for image, start in zip(layout.images, starts)]
    return replace(layout, visual=visual, images=tuple(moved))
