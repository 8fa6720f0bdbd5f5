"""Conversations -> packed micro-batches, the same ones however many processes and workers there are.

    Mixture            several sources, with weights: which samples an epoch has, in which order
    encode_sample      one conversation -> ids, mask and patches; cut at a turn where it is too long
    Plan               steps -> global batches -> micro-batches of every rank
    Loader             a rank's micro-batches, made in background processes

Everything random is a function of (seed, epoch), and the plan of a step is a function of the data, the seed and the
step's number. So the whole state of the data is one number, the step, and a run resumes exactly, on as many
processes as it likes: a global batch has the same samples, only dealt to other ranks.
"""

import atexit
import bisect
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from nanoeemllm.config import IMAGE_TOKEN, ModelConfig, UserError, VisionConfig
from nanoeemllm.conversations import ConversationFile, pictures_of
from nanoeemllm.flops import sample_operations
from nanoeemllm.image import load_image, native_size, prepare_image
from nanoeemllm.model import Batch, collate
from nanoeemllm.prompt import Tokenizer, encode_conversation

WINDOW = 32           # steps that are planned together
GROUP = 16            # samples of nearly the same cost that go into a step together


class Mixture:
    """Sources (anything with __len__ and __getitem__) as one; which of their samples an epoch has.

    Without weights an epoch is every sample once. With weights it is as many samples, source s giving its share; each
    source runs through all its samples in random order before any comes again, over the epochs' borders too.
    """

    def __init__(self, sources: list, weights: list[float] | None = None):
        self.sources = sources
        self.sizes = [len(source) for source in sources]
        self.counts = self.sizes if weights is None else [
            max(1, round(sum(self.sizes) * weight / sum(weights))) for weight in weights]
        self._first = np.cumsum([0, *self.sizes]).tolist()

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict:
        source = bisect.bisect_right(self._first, index) - 1
        return self.sources[source][index - self._first[source]]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the epoch's samples, (len,) int64, in random order."""
        chosen = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts)):
            at, stop = epoch * count, (epoch + 1) * count    # this epoch's part of the source's endless random order
            while at < stop:
                lap, skip = divmod(at, size)
                lap_order = np.random.default_rng([seed, source, lap]).permutation(size)
                chosen.append(self._first[source] + lap_order[skip:skip + stop - at])
                at += len(chosen[-1])
        return np.random.default_rng([seed, len(self.sizes), epoch]).permutation(np.concatenate(chosen))


def open_mixture(arguments: list[str], images: str | None, progress: bool = True) -> Mixture:
    """--data arguments, each "file" or "file:weight" -> Mixture of ConversationFiles."""
    if not all(arguments):
        raise UserError("--data is empty: name LLaVA's JSON")
    named = [re.fullmatch(r"(?s)(.+?)(?::(\d*\.?\d+(?:e-?\d+)?))?", argument).groups() for argument in arguments]
    weights = [float(weight) for _, weight in named if weight is not None]
    if weights and (len(weights) < len(named) or min(weights) <= 0 or max(weights) == math.inf):
        raise UserError(f"--data {' '.join(arguments)}: give every file a weight above 0 (file.json:0.35) or none")
    return Mixture([ConversationFile(path, images, progress) for path, _ in named], weights or None)


# ---- one conversation ----

class Sample(NamedTuple):
    """One conversation, encoded."""
    ids: list[int]                       # a picture is one IMAGE_TOKEN
    learned: list[bool]                  # same length: is this token to be learned
    images: list                         # (patches (h * w, 3*p*p), grid (h, w)) of each picture, in order
    key: str                             # its id in the file
    cut: bool = False                    # it was too long and has lost its last turns


def encode_sample(conversation: dict, tokenizer: Tokenizer, template: str, vision: VisionConfig | None,
                  max_length: int) -> Sample:
    """conversation: {"id", "conversations", "image": a path or PIL picture, or a list of them, or absent}.

    Turns beyond max_length tokens, text and visual together, are cut off at the end of an answer. Raises UserError
    for a conversation or picture that cannot be used, and for a first question and answer that are too long.
    """
    ids, learned, pictures, _, cut = _fit(conversation, tokenizer, template, vision, max_length)
    loaded = [load_image(picture) if isinstance(picture, str) else picture for picture in pictures]
    return Sample(ids, learned, [prepare_image(picture, vision) for picture in loaded], conversation["id"], cut)


def count_tokens(conversation: dict, tokenizer: Tokenizer, template: str, vision: VisionConfig | None,
                 max_length: int) -> tuple[int, list[int]]:
    """(text tokens, visual tokens of each picture) as encode_sample will give them, without decoding the pictures."""
    ids, _, _, grids, _ = _fit(conversation, tokenizer, template, vision, max_length)
    return len(ids) - len(grids), [h * w for h, w in grids]


def _fit(conversation: dict, tokenizer: Tokenizer, template: str, vision: VisionConfig | None, max_length: int):
    """(ids, learned, pictures, their grids, whether turns were cut off), no longer than max_length tokens."""
    turns, pictures = conversation["conversations"], pictures_of(conversation)
    if pictures and vision is None:
        raise UserError("a picture, but the model has no image encoder")
    grids = [patch_grid(picture, vision) for picture in pictures]
    opening = turns[0]["from"] in ("system", "gpt")              # what stands before the first question

    def encode(rounds: int) -> tuple[list[int], list[bool]]:
        return encode_conversation(tokenizer, turns[:opening + 2 * rounds], template)

    def length(rounds: int) -> int:
        ids, _ = encode(rounds)
        used = ids.count(IMAGE_TOKEN)
        return len(ids) - used + sum(h * w for h, w in grids[:used])

    rounds = (len(turns) - opening) // 2
    kept = rounds if length(rounds) <= max_length else bisect.bisect_right(range(1, rounds), max_length, key=length)
    if kept == 0:
        raise UserError(f"its first question and answer alone are {length(1):,} tokens, over the {max_length:,} "
                        "allowed")
    ids, learned = encode(kept)
    used = ids.count(IMAGE_TOKEN)
    return ids, learned, pictures[:used], grids[:used], kept < rounds


def patch_grid(picture: str | Image.Image, vision: VisionConfig) -> tuple[int, int]:
    """Patches (rows, columns) that prepare_image will make of a picture, read from its header."""
    if vision.resize != "native":
        return vision.grid_size, vision.grid_size
    try:
        with Image.open(picture) if isinstance(picture, str) else contextlib.nullcontext(picture) as image:
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:   # stored lying on its side
                width, height = height, width
    except Exception as error:                                   # Pillow's readers raise almost anything
        raise UserError(f"{picture}: not a picture that can be read ({error})") from None
    width, height = native_size(width, height, vision.image_size, vision.min_image_size)
    return height // vision.patch_size, width // vision.patch_size


def token_cost(config: ModelConfig) -> Callable[[int, list[int]], float]:
    """Training work of a sample, in units of one text token's linear layers: f(text tokens, visual tokens per picture).

    The decoder runs forward and backward, 3 times a forward pass, the frozen encoder forward alone. Pictures are taken
    to stand in front, with equal parts of the text behind them.
    """
    one_token = sample_operations(config, 1, [])["text"]

    @functools.lru_cache(65536)                                  # many samples have the same lengths
    def operations(text: int, pictures: tuple[int, ...]) -> Counter:
        return sample_operations(config, text, [(n, 0, text // len(pictures)) for n in pictures], seen=True)

    def cost(text: int, pictures: list[int]) -> float:
        count = operations(text, tuple(pictures))
        return (count.total() - count["encoder"] * 2 / 3) / one_token
    return cost


# ---- which samples, when and where ----

class MicroBatch(NamedTuple):
    """What one rank computes at once."""
    step: int
    last: bool                 # of its step; every rank has as many of a step
    indices: list[int]         # of samples in the Mixture


class Plan:
    """Which samples make up which step's global batch, and how it is dealt to ranks and micro-batches.

    An epoch has len(data) // batch_size steps; the samples left over are spread over its first steps, so that every
    sample is seen once. Costs are equalised by planning WINDOW steps together: their samples are sorted by cost and cut
    into groups of GROUP neighbours, and every step draws one group of each range of costs. Ranks then take their
    samples from the same groups, and none waits for another.
    """

    def __init__(self, data: Mixture, batch_size: int, seed: int, cost: Callable[[dict], float] | None = None,
                 budget: float | None = None, workers: int = 0):
        """cost: of a conversation, in tokens (by default all cost 1). budget: a micro-batch's; by default one
        micro-batch a step. A micro-batch goes over the budget only if fewer would leave a rank without a sample. workers: processes."""
        self.data, self.seed, self.cost, self.budget, self.workers = data, seed, cost, budget, workers
        self.steps_per_epoch = max(1, len(data) // batch_size)

    def micro_batches(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
        """Of the steps start to stop - 1, counted from 0 through all epochs."""
        for step, indices, costs in self.steps(start, stop):
            dealt = deal(costs, world, self.budget)
            for number, ranks in enumerate(dealt, start=1):
                yield MicroBatch(step, number == len(dealt), indices[ranks[rank]].tolist())

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(step, indices of its samples, their costs): range of cost by range of cost, falling."""
        windows, same_windows = itertools.tee(self._windows(start, stop))
        orders = (order for _, _, order in same_windows)
        if self.cost is None:
            measured = (np.ones(len(order)) for order in orders)
        else:                                                                # a worker is one or two windows ahead
            measured = _background(functools.partial(_costs, self.data, self.cost), orders, min(1, self.workers))
        for (first, count, order), costs in zip(windows, measured):
            rng = np.random.default_rng([self.seed, len(self.data), first])
            for step, chosen in enumerate(_equal_steps(costs, count, rng), start=first):
                if start <= step < stop:
                    yield step, order[chosen], costs[chosen]

    def _windows(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first step, how many steps, indices of all their samples), from the window that holds step `start`."""
        size, larger = divmod(len(self.data), self.steps_per_epoch)          # the first `larger` steps have one more
        step, order_of = start - start % self.steps_per_epoch % WINDOW, None
        while step < stop:
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = self.data.order(self.seed, epoch), epoch
            end = min(within + WINDOW, self.steps_per_epoch)
            yield step, end - within, order[within * size + min(within, larger):end * size + min(end, larger)]
            step += end - within


def _equal_steps(costs: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals a window's samples to `count` steps of equal size and nearly equal cost: positions in costs, by step."""
    order = np.argsort(-costs, kind="stable")                                # equal costs stay in random order
    size, larger = divmod(len(costs), count)
    groups = order[:count * size].reshape(-1, count, math.gcd(size, GROUP))  # (ranges of cost, steps, a group)
    steps = np.concatenate([rng.permutation(in_range) for in_range in groups], axis=1)
    left_over = order[count * size:]                                         # the cheapest, one each
    return [np.append(step, left_over[i:i + 1]) for i, step in enumerate(steps)]


def deal(costs: np.ndarray, world: int, budget: float | None) -> list[list[list[int]]]:
    """A step's samples, costs falling -> [micro-batch][rank] -> positions in costs.

    Rows of `world` neighbours give each rank one sample, the dearest to the rank with the least work so far. Whole rows
    make up a micro-batch, so that all ranks do like work at a time: the fewest micro-batches within the budget, each
    next row into the lightest.
    """
    if len(costs) < world:
        raise UserError(f"a batch of {len(costs)} samples cannot be dealt to {world} processes: give a "
                        "larger --batch-size")
    work = np.zeros(world)
    rows = []
    for start in range(0, len(costs), world):
        row = [[] for _ in range(world)]
        for position, rank in zip(range(start, min(start + world, len(costs))), work.argsort(kind="stable")):
            row[rank].append(position)
            work[rank] += costs[position]
        rows.append(row)
    heaviest = [costs[start:start + world].max() for start in range(0, len(costs), world)]

    most = len(costs) // world                                               # the last row may lack some ranks
    budget = budget or math.inf
    for micro_batches in range(max(1, min(most, math.ceil(sum(heaviest) / budget))), most + 1):
        filled, members = np.zeros(micro_batches), [[] for _ in range(micro_batches)]
        for row, weight in zip(rows, heaviest):
            lightest = filled.argmin()
            members[lightest].append(row)
            filled[lightest] += weight
        if filled.max() <= budget:
            break
    return [[sum(ranks, []) for ranks in zip(*rows_of_one)] for rows_of_one in members]


# ---- made in the background ----

@dataclasses.dataclass
class Packed:
    """A micro-batch ready for the model."""
    step: int
    last: bool                          # of its step
    batch: Batch
    keys: list[str]                     # of the samples in it
    bad: list[tuple[str, str]]          # (id, reason) of those that had to be left out
    cut: int                            # samples that were too long and have lost turns

    def pin_memory(self) -> "Packed":
        """Called by the DataLoader. Only the patches are large enough to matter."""
        return dataclasses.replace(self, batch=dataclasses.replace(self.batch, patches=self.batch.patches.pin_memory()))


class Loader:
    """Iterates over a rank's `Packed` micro-batches of the steps start to stop - 1.

    encode: conversation -> Sample. `waited` is how many seconds the caller has waited for batches so far.
    """

    def __init__(self, plan: Plan, encode: Callable[[dict], Sample], start: int, stop: int, rank: int = 0,
                 world: int = 1, pin_memory: bool = False):
        self.waited = 0.0
        self._batches = _background(functools.partial(_pack, plan.data, encode),
                                    plan.micro_batches(start, stop, rank, world), plan.workers, pin_memory)

    def __iter__(self) -> Iterator[Packed]:
        while True:
            begin = time.perf_counter()
            packed = next(self._batches, None)
            self.waited += time.perf_counter() - begin
            if packed is None:
                return
            yield packed


def _pack(data: Mixture, encode: Callable[[dict], Sample], micro_batch: MicroBatch) -> Packed:
    """In a worker. A sample that cannot be used is left out and reported."""
    samples, bad = [], []
    for index in micro_batch.indices:
        key = f"sample {index}"
        try:
            conversation = data[index]
            key = str(conversation["id"])
            samples.append(encode(conversation))
        except UserError as error:
            bad.append((key, str(error)))
        except Exception as error:                 # one odd sample in a million must not end a run of days
            bad.append((key, f"{type(error).__name__}: {error}"))
    keys, cut = [sample.key for sample in samples], sum(sample.cut for sample in samples)
    if not samples:                                # every rank must take part in every micro-batch
        samples = [Sample([0], [False], [], "")]
    return Packed(micro_batch.step, micro_batch.last, collate(samples), keys, bad, cut)


def _costs(data: Mixture, cost: Callable[[dict], float], indices: list[int]) -> np.ndarray:
    """In a worker. What cannot be measured will be left out when its turn comes: it costs next to nothing."""
    def cost_of(index: int) -> float:
        try:
            return cost(data[index])
        except Exception:
            return 1.0
    return np.array([cost_of(index) for index in indices])


class _Unread:
    """A data set for the DataLoader whose batches are what the batch sampler gives."""

    def __getitems__(self, batch):
        return batch


def _background(function: Callable, batches: Iterator, workers: int, pin_memory: bool = False) -> Iterator:
    """function(batch) of every batch, in order, computed by worker processes."""
    return iter(DataLoader(_Unread(), batch_sampler=batches, num_workers=workers, collate_fn=function,
                           pin_memory=pin_memory, worker_init_fn=_start_worker,
                           multiprocessing_context="fork" if workers else None,
                           generator=torch.Generator()))          # its own: training's random numbers stay untouched


def _start_worker(_):
    """Ctrl-C and SIGTERM reach every process of a group, but only the training loop may decide what they mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Python ends its children with SIGTERM and would wait for ever for those that ignore it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)                 # the DataLoader would call their end an error
    for child in multiprocessing.active_children():
        child.kill()
