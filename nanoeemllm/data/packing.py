"""Which conversations go into which micro-batch, and one conversation encoded.

    Mixture            several sources, with weights: which samples an epoch has, in which order
    Encoder            one conversation -> ids, loss mask and patches; cut at a turn if too long
    Plan               steps -> global batches -> micro-batches of every rank

Everything random is a function of (seed, epoch), and a step's plan is a function of the data, the
seed and the step's number. So the whole state of the data is one number, the step, and a run
resumes exactly, on any number of processes: a global batch has the same samples on other ranks.
"""

import bisect
import contextlib
import functools
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nanoeemllm.border.files import quoted
from nanoeemllm.config import IMAGE_TOKEN, UserError, VisionConfig
from nanoeemllm.data.background import in_background
from nanoeemllm.data.conversations import ConversationFile, image_names
from nanoeemllm.data.images import load_image, patch_grid, prepare_image
from nanoeemllm.layout import build_layout
from nanoeemllm.model import Batch
from nanoeemllm.prompt import encode_conversation
from nanoeemllm.weights.tokenizer import Tokenizer

WINDOW = 32           # steps that are planned together
GROUP = 16            # samples of nearly the same cost that go into a step together


class Mixture:
    """Sources (anything with __len__ and __getitem__) as one; which of their samples an epoch has.

    Without weights an epoch is every sample once. With weights it is as many samples, source s
    giving its share; each source runs through all its samples in random order before any comes
    again, across epochs too. endless: a single source that makes sample i from i, so that every
    epoch has new ones.
    """

    def __init__(self, sources: list, weights: list[float] | None = None, endless: bool = False):
        self.sources, self.endless = sources, endless
        self.sizes = self.counts = [len(source) for source in sources]
        if weights is not None:
            total = sum(self.sizes) / sum(weights)
            self.counts = [max(1, round(total * weight)) for weight in weights]
        self._first = [0, *itertools.accumulate(self.sizes[:-1])]

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict:
        source = bisect.bisect_right(self._first, index) - 1
        return self.sources[source][index - self._first[source]]

    @functools.lru_cache(maxsize=2)
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the epoch's samples, (len,) int64, in random order."""
        chosen = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts)):
            # this epoch's part of the source's endless random order
            lap, skip = divmod(epoch * count, size)
            laps = [np.random.default_rng([seed, source, lap + i]).permutation(size)
                    for i in range(math.ceil((skip + count) / size))]
            chosen.append(self._first[source] + np.concatenate(laps)[skip:skip + count])
        rng = np.random.default_rng([seed, len(self.sizes), epoch])
        return rng.permutation(np.concatenate(chosen)) + self.endless * epoch * len(self)


def open_mixture(arguments: list[str], images: str | None, max_bad: float = 0.01,
                 is_first: bool = True) -> Mixture:
    """--data arguments, each "file" or "file:weight" -> Mixture of ConversationFiles. The first
    process tells what cannot be used: how much, and the first of it. Raises UserError where that is
    more than the part max_bad of a file."""
    found = [re.fullmatch(r"(?s)(.*?)(?::(\d*\.?\d+(?:e-?\d+)?))?", text) for text in arguments]
    weights = [float(match[2]) for match in found if match[2]]
    if weights and (len(weights) < len(found) or not 1e-6 <= min(weights) <= max(weights) <= 1e6):
        raise UserError(f"--data {' '.join(arguments)}: give every file a weight above 0, from "
                        "1e-6 to 1e6 (file.json:0.35), or none")
    sources = [ConversationFile(match[1], images, is_first) for match in found]
    for source in sources:
        count, total = len(source.problems), len(source) + len(source.problems)
        if count and is_first:
            lines = [f"  {where}: {reason}" for where, reason in source.problems[:10]]
            lines += [f"  ... and {count - 10:,} more"] if count > 10 else []
            print(f"{quoted(source.path)}: {count:,} of {total:,} conversations cannot be used and "
                  "are left out:", *lines, sep="\n", file=sys.stderr)
        if count > max_bad * total:
            raise UserError(f"{quoted(source.path)}: more than {max_bad:.2%} cannot be used: mend "
                            "them, or allow more with --max-bad")
    return Mixture(sources, weights or None)


# ---- one conversation ----

class Sample(NamedTuple):
    """One conversation, encoded."""
    ids: list[int]                       # an image is one IMAGE_TOKEN
    loss_mask: list[bool]                # same length: is this token a target
    images: list                         # of each: patches (h * w, 3*p*p) and grid (h, w)
    key: str                             # its id in the file
    cut: bool = False                    # it was too long and has lost its last turns


@dataclass(frozen=True)
class Encoder:
    """conversation -> Sample; {"id", "conversations", "image": absent, a path, a PIL image, or a
    list}.

    Turns beyond max_length tokens, text and visual together, are cut off at the end of an answer.
    Raises UserError for a conversation or image that cannot be used, and for a first question and
    answer that are too long.
    """
    tokenizer: Tokenizer
    template: str
    vision: VisionConfig | None
    max_length: int

    def __call__(self, conversation: dict) -> Sample:
        ids, mask, grids, cut = self._fit(conversation)
        images = image_names(conversation)[:len(grids)]
        prepared = [prepare_image(load_image(image), self.vision) for image in images]
        return Sample(ids, mask, prepared, conversation["id"], cut)

    def count(self, conversation: dict) -> tuple[int, int]:
        """(text tokens, visual tokens) that the Sample will have, without decoding the images."""
        ids, _, grids, _ = self._fit(conversation)
        return len(ids) - len(grids), sum(h * w for h, w in grids)

    def _fit(self, conversation: dict) -> tuple[list[int], list[bool], list, bool]:
        """(ids, loss mask, the images' grids, whether turns were cut), at most max_length tokens"""
        images = image_names(conversation)
        if images and self.vision is None:
            raise UserError("a picture, but the model has no image encoder")
        grids = [patch_grid(image, self.vision) for image in images]
        ids, mask = encode_conversation(self.tokenizer, conversation["conversations"],
                                        self.template)
        sizes = iter([h * w for h, w in grids])
        lengths = np.cumsum([next(sizes) if token == IMAGE_TOKEN else 1 for token in ids])

        # the ids of the first rounds are the beginning of those of all rounds (prompt.py)
        answer_ends = np.flatnonzero(np.diff([*mask, 0]) < 0)
        fitting = answer_ends[lengths[answer_ends] <= self.max_length]
        if not len(fitting):
            raise UserError(f"its first question and answer alone are {lengths[answer_ends[0]]:,} "
                            f"tokens, over the {self.max_length:,} allowed")
        end = int(fitting[-1]) + 1
        return ids[:end], mask[:end], grids[:ids[:end].count(IMAGE_TOKEN)], end < len(ids)


def collate(samples: list[Sample]) -> Batch:
    """The target of a text row is the token that follows it in the merged sequence. A target token
    right behind an image would have to be predicted by a visual row, which makes no query, so it is
    left out. No chat template has such a token."""
    ids, layout = build_layout([sample.ids for sample in samples],
                               [[grid for _, grid in sample.images] for sample in samples])
    mask, patches = [], []
    for sample in samples:
        mask += [flag for flag, i in zip(sample.loss_mask, sample.ids) if i != IMAGE_TOKEN]
        patches += [patches for patches, _ in sample.images]
    position = layout.position[:layout.num_text]
    is_next = torch.tensor(mask)[1:] & (position[1:] == position[:-1] + 1)
    is_next[layout.text.start[1:].long() - 1] = False                # the next sample's first token
    rows = is_next.nonzero().squeeze(1)
    return Batch(ids, layout, torch.cat(patches) if patches else torch.zeros(0, 0), rows,
                 ids[rows + 1], [sample.key for sample in samples])


# ---- which samples, when and where ----

class MicroBatch(NamedTuple):
    """What one rank computes at once."""
    step: int
    last: bool                 # of its step; every rank has as many of a step
    indices: list[int]         # of samples in the Mixture


@dataclass
class Plan:
    """Which samples make up which step's global batch, and how ranks and micro-batches share it.

    An epoch has len(data) // batch_size steps; the samples left over are spread over its first
    steps, so that every sample is seen once. Steps are made to cost alike by planning WINDOW of
    them together: their samples are sorted by cost and cut into groups of GROUP neighbours, and
    every step draws one group of each range of costs. Ranks then take their samples from the same
    groups, and none waits for another.
    """
    data: Mixture
    batch_size: int
    seed: int
    cost: Callable[[dict], float] | None = None     # of a conversation; None: all cost 1
    budget: float | None = None                     # of a micro-batch; None: a step is one
    workers: int = 0                                # processes

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.data) // self.batch_size)

    def micro_batches(self, start: int, stop: int, rank: int = 0, world: int = 1,
                      ) -> Iterator[MicroBatch]:
        """Of the steps start to stop - 1, counted from 0 through all epochs."""
        for step, indices, costs in self.steps(start, stop):
            micro_batch_of, rank_of = assign_to_ranks(costs, world, self.budget)
            last = micro_batch_of.max()
            for number in range(last + 1):
                mine = indices[(micro_batch_of == number) & (rank_of == rank)]
                yield MicroBatch(step, number == last, mine.tolist())

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(step, indices of its samples, their costs): range of cost by range of cost, falling."""
        def window_of(step: int) -> tuple[int, int]:
            epoch, place = divmod(step, self.steps_per_epoch)
            return epoch, place - place % WINDOW

        windows = (window for window, _ in itertools.groupby(range(start, stop), window_of))
        workers = min(1, self.workers if self.cost else 0)   # which is one or two windows ahead
        with contextlib.closing(in_background(self._plan_window, windows, workers)) as planned:
            for planned_step in itertools.chain.from_iterable(planned):
                if start <= planned_step[0] < stop:
                    yield planned_step

    def _plan_window(self, window: tuple[int, int]) -> list[tuple]:
        """window: the epoch, and in it the first of up to WINDOW steps. Returns for each (step,
        indices of its samples, their costs), equal sizes and nearly equal costs. A sample that
        cannot be measured will be left out later: it costs next to nothing."""
        epoch, first = window
        count = min(WINDOW, self.steps_per_epoch - first)
        size, larger = divmod(len(self.data), self.steps_per_epoch)
        # the epoch's first `larger` steps have one sample more
        begin, end = (step * size + min(step, larger) for step in (first, first + count))
        samples = self.data.order(self.seed, epoch)[begin:end]
        costs = np.ones(len(samples))
        for i, index in enumerate(samples if self.cost else ()):
            with contextlib.suppress(Exception):
                costs[i] = self.cost(self.data[index])
        order = np.argsort(-costs, kind="stable")            # equal costs stay in random order
        # (ranges of cost, steps, a group)
        groups = order[:count * size].reshape(-1, count, math.gcd(size, GROUP))
        left_over = order[count * size:]                     # the cheapest, one each
        number = epoch * self.steps_per_epoch + first
        rng = np.random.default_rng([self.seed, len(self.data), number])
        dealt = np.concatenate([rng.permutation(in_range) for in_range in groups], axis=1)
        steps = []
        for i, chosen in enumerate(dealt):
            chosen = np.append(chosen, left_over[i:i + 1])
            steps.append((number + i, samples[chosen], costs[chosen]))
        return steps


def assign_to_ranks(costs: np.ndarray, world: int, budget: float | None,
                    ) -> tuple[np.ndarray, np.ndarray]:
    """A step's samples, costs falling -> of each the number of its micro-batch, and its rank.

    Rows of `world` neighbours give each rank one sample, the costliest to the rank with the least
    work so far. A micro-batch is made of whole rows, so that all ranks do like work at a time: the
    fewest micro-batches within the budget, each next row into the lightest. A micro-batch exceeds
    the budget only if fewer samples would leave a rank without one.
    """
    if len(costs) < world:
        raise UserError(f"a batch of {len(costs)} samples cannot be dealt to {world} processes: "
                        "give more samples, or a larger --batch-size")
    budget, heaviest = budget or math.inf, costs[::world]    # of each row
    most = len(costs) // world                               # the last row may lack some ranks
    for count in range(min(most, max(1, math.ceil(heaviest.sum() / budget))), most + 1):
        filled, chosen = np.zeros(count), []                 # chosen: a micro-batch for each row
        for weight in heaviest:
            chosen.append(filled.argmin())
            filled[chosen[-1]] += weight
        if filled.max() <= budget:
            break
    work, rank_of = np.zeros(world), np.empty(len(costs), int)
    for first in range(0, len(costs), world):
        row = costs[first:first + world]
        ranks = work.argsort(kind="stable")[:len(row)]
        rank_of[first:first + world] = ranks
        work[ranks] += row
    return np.repeat(chosen, world)[:len(costs)], rank_of
