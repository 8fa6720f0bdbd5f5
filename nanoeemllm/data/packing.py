"""Which conversations go into which micro-batch, and one conversation encoded.

    Mixture            several sources, with weights: which samples an epoch has, in which order
    encode_sample      one conversation -> ids, loss mask and patches; cut at a turn if too long
    Plan               steps -> global batches -> micro-batches of every rank

Everything random is a function of (seed, epoch), and a step's plan is a function of the data, the
seed and the step's number. So the whole state of the data is one number, the step, and a run
resumes exactly, on any number of processes: a global batch has the same samples on other ranks.
"""

import bisect
import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

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
        self.sizes = [len(source) for source in sources]
        self.counts = self.sizes
        if weights is not None:
            total = sum(self.sizes) / sum(weights)
            self.counts = [max(1, round(total * weight)) for weight in weights]
        self._first = np.cumsum([0, *self.sizes]).tolist()

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict:
        if self.endless:
            return self.sources[0][index]
        source = bisect.bisect_right(self._first, index) - 1
        return self.sources[source][index - self._first[source]]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the epoch's samples, (len,) int64, in random order."""
        chosen = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts)):
            # this epoch's part of the source's endless random order
            at, stop = epoch * count, (epoch + 1) * count
            while at < stop:
                lap, skip = divmod(at, size)
                lap_order = np.random.default_rng([seed, source, lap]).permutation(size)
                chosen.append(self._first[source] + lap_order[skip:skip + stop - at])
                at += len(chosen[-1])
        rng = np.random.default_rng([seed, len(self.sizes), epoch])
        order = rng.permutation(np.concatenate(chosen))
        return order + epoch * len(self) if self.endless else order


def open_mixture(arguments: list[str], images: str | None, progress: bool = True) -> Mixture:
    """--data arguments, each "file" or "file:weight" -> Mixture of ConversationFiles."""
    names, weights = [], []
    for argument in arguments:
        match = re.fullmatch(r"(?s)(.+?)(?::(\d*\.?\d+(?:e-?\d+)?))?", argument)
        if match is None:
            raise UserError("--data is empty: name LLaVA's JSON")
        names.append(match[1])
        if match[2] is not None:
            weights.append(float(match[2]))
    if weights and (len(weights) < len(names) or not 1e-6 <= min(weights) <= max(weights) <= 1e6):
        raise UserError(f"--data {' '.join(arguments)}: give every file a weight above 0, from "
                        "1e-6 to 1e6 (file.json:0.35), or none")
    return Mixture([ConversationFile(name, images, progress) for name in names], weights or None)


# ---- one conversation ----

class Sample(NamedTuple):
    """One conversation, encoded."""
    ids: list[int]                       # an image is one IMAGE_TOKEN
    loss_mask: list[bool]                # same length: is this token a target
    images: list                         # of each: patches (h * w, 3*p*p) and grid (h, w)
    key: str                             # its id in the file
    cut: bool = False                    # it was too long and has lost its last turns


def encode_sample(conversation: dict, tokenizer: Tokenizer, template: str,
                  vision: VisionConfig | None, max_length: int) -> Sample:
    """conversation: {"id", "conversations", "image": absent, a path, a PIL image, or a list}.

    Turns beyond max_length tokens, text and visual together, are cut off at the end of an answer.
    Raises UserError for a conversation or image that cannot be used, and for a first question and
    answer that are too long.
    """
    ids, mask, grids, cut = _fit(conversation, tokenizer, template, vision, max_length)
    images = image_names(conversation)[:len(grids)]
    prepared = [prepare_image(load_image(image), vision) for image in images]
    return Sample(ids, mask, prepared, conversation["id"], cut)


def count_tokens(conversation: dict, tokenizer: Tokenizer, template: str,
                 vision: VisionConfig | None, max_length: int) -> tuple[int, int]:
    """(text tokens, visual tokens) as encode_sample will give them, without decoding the images."""
    ids, _, grids, _ = _fit(conversation, tokenizer, template, vision, max_length)
    return len(ids) - len(grids), sum(h * w for h, w in grids)


def _fit(conversation: dict, tokenizer: Tokenizer, template: str, vision: VisionConfig | None,
         max_length: int) -> tuple[list[int], list[bool], list[tuple[int, int]], bool]:
    """(ids, loss mask, the images' grids, whether turns were cut), at most max_length tokens."""
    images = image_names(conversation)
    if images and vision is None:
        raise UserError("a picture, but the model has no image encoder")
    grids = [patch_grid(image, vision) for image in images]
    ids, mask = encode_conversation(tokenizer, conversation["conversations"], template)
    sizes = iter([h * w for h, w in grids])
    lengths = np.cumsum([next(sizes) if token == IMAGE_TOKEN else 1 for token in ids])

    # the ids of the first rounds are the beginning of those of all rounds (prompt.py)
    is_target = np.array([*mask, False])
    answer_ends = np.flatnonzero(is_target[:-1] & ~is_target[1:])
    fitting = answer_ends[lengths[answer_ends] <= max_length]
    if not len(fitting):
        raise UserError(f"its first question and answer alone are {lengths[answer_ends[0]]:,} "
                        f"tokens, over the {max_length:,} allowed")
    end = int(fitting[-1]) + 1
    return ids[:end], mask[:end], grids[:ids[:end].count(IMAGE_TOKEN)], end < len(ids)


def collate(samples: list[Sample]) -> Batch:
    """The target of a text row is the token that follows it in the merged sequence. A target token
    right behind an image would have to be predicted by a visual row, which makes no query, so it is
    left out. No chat template has such a token."""
    grids = [[grid for _, grid in sample.images] for sample in samples]
    ids, layout = build_layout([sample.ids for sample in samples], grids)
    mask = []
    for sample in samples:
        mask += [flag for flag, i in zip(sample.loss_mask, sample.ids) if i != IMAGE_TOKEN]
    position = layout.position[:layout.num_text]
    is_next = torch.tensor(mask)[1:] & (position[1:] == position[:-1] + 1)
    is_next[layout.text.start[1:].long() - 1] = False                # the next sample's first token
    rows = is_next.nonzero().squeeze(1)
    patches = [patches for sample in samples for patches, _ in sample.images]
    return Batch(ids, layout, torch.cat(patches) if patches else torch.zeros(0, 0), rows,
                 ids[rows + 1], [sample.key for sample in samples])


# ---- which samples, when and where ----

class MicroBatch(NamedTuple):
    """What one rank computes at once."""
    step: int
    last: bool                 # of its step; every rank has as many of a step
    indices: list[int]         # of samples in the Mixture


class Plan:
    """Which samples make up which step's global batch, and how ranks and micro-batches share it.

    An epoch has len(data) // batch_size steps; the samples left over are spread over its first
    steps, so that every sample is seen once. Steps are made to cost alike by planning WINDOW of
    them together: their samples are sorted by cost and cut into groups of GROUP neighbours, and
    every step draws one group of each range of costs. Ranks then take their samples from the same
    groups, and none waits for another.
    """

    def __init__(self, data: Mixture, batch_size: int, seed: int,
                 cost: Callable[[dict], float] | None = None, budget: float | None = None,
                 workers: int = 0):
        """cost: of a conversation, in tokens (by default all cost 1). budget: a micro-batch's; by
        default a step is one micro-batch. A micro-batch exceeds it only if fewer samples would
        leave a rank without one. workers: processes."""
        self.data, self.seed, self.cost, self.budget = data, seed, cost, budget
        self.batch_size, self.workers = batch_size, workers
        self.steps_per_epoch = max(1, len(data) // batch_size)

    def micro_batches(self, start: int, stop: int, rank: int = 0, world: int = 1,
                      ) -> Iterator[MicroBatch]:
        """Of the steps start to stop - 1, counted from 0 through all epochs."""
        for step, indices, costs in self.steps(start, stop):
            assigned = assign_to_ranks(costs, world, self.budget)
            for number, ranks in enumerate(assigned, start=1):
                yield MicroBatch(step, number == len(assigned), indices[ranks[rank]].tolist())

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(step, indices of its samples, their costs): range of cost by range of cost, falling."""
        workers = min(1, self.workers if self.cost else 0)   # which is one or two windows ahead
        planned = in_background(self._plan_window, self._windows(start, stop), workers)
        with contextlib.closing(planned):
            for step, indices, costs in itertools.chain.from_iterable(planned):
                if start <= step < stop:
                    yield step, indices, costs

    def _windows(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first step, how many steps, all their samples), from the window that holds `start`."""
        # the first `larger` steps have one sample more
        size, larger = divmod(len(self.data), self.steps_per_epoch)
        step, order_of = start - start % self.steps_per_epoch % WINDOW, None
        while step < stop:
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = self.data.order(self.seed, epoch), epoch
            end = min(within + WINDOW, self.steps_per_epoch)
            samples = order[within * size + min(within, larger):end * size + min(end, larger)]
            yield step, end - within, samples
            step += end - within

    def _plan_window(self, window: tuple[int, int, np.ndarray]) -> list[tuple]:
        """[(step, indices of its samples, their costs), ...]: equal sizes and nearly equal costs.
        A sample that cannot be measured will be left out later: it costs next to nothing."""
        first, count, samples = window
        costs = np.ones(len(samples))
        if self.cost:
            for i, index in enumerate(samples):
                with contextlib.suppress(Exception):
                    costs[i] = self.cost(self.data[index])
        order = np.argsort(-costs, kind="stable")            # equal costs stay in random order
        size = len(samples) // count
        # (ranges of cost, steps, a group)
        groups = order[:count * size].reshape(-1, count, math.gcd(size, GROUP))
        left_over = order[count * size:]                     # the cheapest, one each
        rng = np.random.default_rng([self.seed, len(self.data), first])
        dealt = np.concatenate([rng.permutation(in_range) for in_range in groups], axis=1)
        steps = []
        for i, chosen in enumerate(dealt):
            chosen = np.append(chosen, left_over[i:i + 1])
            steps.append((first + i, samples[chosen], costs[chosen]))
        return steps


def assign_to_ranks(costs: np.ndarray, world: int, budget: float | None) -> list[list[list[int]]]:
    """A step's samples, costs falling -> [micro-batch][rank] -> positions in costs.

    Rows of `world` neighbours give each rank one sample, the costliest to the rank with the least
    work so far. A micro-batch is made of whole rows, so that all ranks do like work at a time: the
    fewest micro-batches within the budget, each next row into the lightest.
    """
    if len(costs) < world:
        raise UserError(f"a batch of {len(costs)} samples cannot be dealt to {world} processes: "
                        "give a larger --batch-size")
    budget, heaviest = budget or math.inf, costs[::world]    # of each row
    most = len(costs) // world                               # the last row may lack some ranks
    for count in range(min(most, max(1, math.ceil(heaviest.sum() / budget))), most + 1):
        filled, chosen = np.zeros(count), []                 # chosen: a micro-batch for each row
        for weight in heaviest:
            chosen.append(filled.argmin())
            filled[chosen[-1]] += weight
        if filled.max() <= budget:
            break

    work, micro_batches = np.zeros(world), []
    for _ in range(count):
        micro_batches.append([[] for _ in range(world)])
    for row, micro_batch in enumerate(chosen):
        positions = range(row * world, min((row + 1) * world, len(costs)))
        for position, rank in zip(positions, work.argsort(kind="stable")):
            micro_batches[micro_batch][rank].append(position)
            work[rank] += costs[position]
    return micro_batches
