"""A rank's micro-batches, made by background processes."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

from nanoeemllm.config import UserError
from nanoeemllm.data.background import in_background
from nanoeemllm.data.packing import MicroBatch, Mixture, Plan, Sample, collate
from nanoeemllm.model import Batch


@dataclasses.dataclass
class Packed:
    """A micro-batch ready for the model."""
    step: int
    last: bool                          # of its step
    batch: Batch
    keys: list[str]                     # of the samples in it
    bad: list[tuple[str, str]]          # (id, reason) of those that had to be left out
    cut: int                            # samples that were too long and have lost turns
    waited: float = 0.0                 # seconds until it came

    def pin_memory(self) -> "Packed":
        """Called by the DataLoader. Only the patches are large enough to matter."""
        pinned = dataclasses.replace(self.batch, patches=self.batch.patches.pin_memory())
        return dataclasses.replace(self, batch=pinned)


def load_batches(plan: Plan, encode: Callable[[dict], Sample], start: int, stop: int, rank: int = 0,
                 world: int = 1, pin_memory: bool = False) -> Iterator[Packed]:
    """Yields a rank's micro-batches of the steps start to stop - 1. Its processes end after the
    last one, or when it is closed. encode: conversation -> Sample."""
    planned = plan.micro_batches(start, stop, rank, world)
    packing = in_background(functools.partial(_pack, plan.data, encode), planned, plan.workers,
                            pin_memory)
    with contextlib.closing(packing):
        begin = time.perf_counter()
        for packed in packing:
            packed.waited = time.perf_counter() - begin
            yield packed
            begin = time.perf_counter()


def _pack(data: Mixture, encode: Callable[[dict], Sample], micro_batch: MicroBatch) -> Packed:
    """In a worker. A sample that cannot be used is left out and reported."""
    samples, bad = [], []
    for index in micro_batch.indices:
        key = f"sample {index}"
        try:
            conversation = data[index]
            key = str(conversation["id"])
            samples.append(encode(conversation))
        except Exception as error:      # one odd sample in a million must not end a run of days
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            bad.append((key, f"{kind}{error}"))
    keys, cut = [sample.key for sample in samples], sum(sample.cut for sample in samples)
    batch = collate(samples or [Sample([0], [False], [], "")])   # every rank takes part every time
    return Packed(micro_batch.step, micro_batch.last, batch, keys, bad, cut)
