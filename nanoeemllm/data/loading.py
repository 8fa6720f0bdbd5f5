"""A rank's micro-batches, made by background processes."""

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

    def pin_memory(self) -> "Packed":
        """Called by the DataLoader. Only the patches are large enough to matter."""
        pinned = dataclasses.replace(self.batch, patches=self.batch.patches.pin_memory())
        return dataclasses.replace(self, batch=pinned)


class Loader:
    """Iterates over a rank's `Packed` micro-batches of the steps start to stop - 1. Its processes
    end with it: after the last batch, or at the end of a `with` block.

    encode: conversation -> Sample. `waited`: seconds spent waiting for batches.
    """

    def __init__(self, plan: Plan, encode: Callable[[dict], Sample], start: int, stop: int,
                 rank: int = 0, world: int = 1, pin_memory: bool = False):
        self.waited, self.samples = 0.0, (stop - start) * plan.batch_size
        self._batches = in_background(functools.partial(_pack, plan.data, encode),
                                      plan.micro_batches(start, stop, rank, world), plan.workers,
                                      pin_memory)

    def __iter__(self) -> Iterator[Packed]:
        while True:
            begin = time.perf_counter()
            packed = next(self._batches, None)
            self.waited += time.perf_counter() - begin
            if packed is None:
                return
            yield packed

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_):
        self._batches.close()


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
        except Exception as error:      # one odd sample in a million must not end a run of days
            bad.append((key, f"{type(error).__name__}: {error}"))
    keys, cut = [sample.key for sample in samples], sum(sample.cut for sample in samples)
    batch = collate(samples or [Sample([0], [False], [], "")])   # every rank takes part every time
    return Packed(micro_batch.step, micro_batch.last, batch, keys, bad, cut)
