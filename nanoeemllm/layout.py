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
    images: list[PlacedImage]
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
    def merged(self) -> tuple[Tensor, Tensor, Visibility]:
        """All rows of a sample in the order of their positions: which row stands at each place,
        where each row stands, and who sees whom, causally."""
        samples = torch.arange(self.num_samples, device=self.position.device)
        sample = torch.cat([samples.repeat_interleave(span.length.long())
                            for span in (self.text, self.visual)])
        length = self.text.length + self.visual.length
        span = Span((length.cumsum(0) - length).int(), length,
                    self.text.max_length + self.visual.max_length)
        place = span.start[sample] + self.position.long()
        sees = torch.empty_like(self.position).index_copy(0, place, self.position + 1)
        return place.argsort(), place, Visibility(span, empty_span(span), span,
                                                  torch.zeros_like(sees), sees)

    @cached_property
    def last_image_queries(self) -> Visibility:
        """Every text row's view of the last image before it alone: each image acts as a sample,
        whose queries are the text rows after it."""
        device = self.position.device
        query = span_of([image.after for image in self.images], device)
        visual = span_of([image.rows for image in self.images], device)
        sees = torch.zeros_like(self.sees_visual[:self.num_text])
        for image in self.images:
            sees[image.after] = image.rows.stop - image.rows.start
        return Visibility(query, visual, empty_span(query), sees, torch.zeros_like(sees))

    @property
    def last_images(self) -> Span:
        """The rows of every sample's last image."""
        rows = {image.sample: image.rows for image in self.images}
        found = [rows.get(sample, slice(0, 0)) for sample in range(self.num_samples)]
        return span_of(found, self.position.device)

    def to(self, device) -> "Layout":
        moved = {name: getattr(self, name).to(device, non_blocking=True)
                 for name in ("position", "sees_visual", "sees_text")}
        for name in ("text", "visual"):
            start, length, max_length = getattr(self, name)
            moved[name] = Span(start.to(device, non_blocking=True),
                               length.to(device, non_blocking=True), max_length)
        return replace(self, **moved)


def span_of(rows: list[slice], device) -> Span:
    bounds = torch.tensor([(r.start, r.stop - r.start) for r in rows], dtype=torch.int32)
    start, length = bounds.reshape(-1, 2).T.contiguous().to(device)
    return Span(start, length, max((r.stop - r.start for r in rows), default=0))


def build_layout(samples: list[list[int]],
                 grids: list[list[tuple[int, int]]]) -> tuple[Tensor, Layout]:
    """ids of every sample, and the patch grids of its images in order -> text ids (T,) int64 and
    the Layout. Raises UserError if a sample has more or fewer IMAGE_TOKENs than images."""
    images, text_rows, visual_rows = [], [], []
    texts, visuals = [slice(0, 0)], [slice(0, 0)]            # the rows of every sample
    for number, (sample, sizes) in enumerate(zip(samples, grids)):
        ids = np.asarray(sample, dtype=np.int64)
        is_image = ids == IMAGE_TOKEN
        if is_image.sum() != len(sizes):
            raise UserError(f"sample {number}: {is_image.sum()} <image> in the text but "
                            f"{len(sizes)} picture(s) given")
        length = np.ones(len(ids), np.int64)                 # of each entry, in merged positions
        length[is_image] = [h * w for h, w in sizes]
        start = length.cumsum() - length
        text_before = (~is_image).cumsum() - ~is_image
        visual_before = start - text_before
        text_rows.append(np.stack([ids, start, visual_before, text_before + 1])[:, ~is_image])
        # row i of an image: position, sees_visual, sees_text of its row 0, plus i, i, 0
        row_0 = np.stack([start, visual_before + 1, text_before])[:, is_image]
        patches = length[is_image]
        i_in_image = np.arange(patches.sum()) - np.repeat(visual_before[is_image], patches)
        visual_rows.append(np.repeat(row_0, patches, axis=1) + [[1], [1], [0]] * i_in_image)

        texts.append(slice(texts[-1].stop, texts[-1].stop + text_rows[-1].shape[1]))
        visuals.append(slice(visuals[-1].stop, visuals[-1].stop + len(i_in_image)))
        places = [*(texts[-1].start + text_before[is_image]).tolist(), texts[-1].stop]
        row = visuals[-1].start
        for grid, place, until in zip(sizes, places, places[1:]):
            rows = slice(row, row := row + grid[0] * grid[1])
            images.append(PlacedImage(rows, grid, number, slice(texts[-1].start, place),
                                      slice(place, until)))
    text = np.concatenate(text_rows, axis=1)
    numbers = np.concatenate([text[1:], *visual_rows], axis=1).astype(np.int32)
    layout = Layout(span_of(texts[1:], "cpu"), span_of(visuals[1:], "cpu"),
                    *(torch.from_numpy(row.copy()) for row in numbers), images, text.shape[1])
    return torch.from_numpy(text[0].copy()), layout
