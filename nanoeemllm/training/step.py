"""What a training step needs besides the model: the scale of its gradients, signals, its MFU."""

import contextlib
import math
import resource
import signal
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.data import Packed, cost
from nanoeemllm.model import Batch
from nanoeemllm.training.distributed import ProcessGroup

# A GPU's dense bfloat16 operations a second; MFU is measured against it.
PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
        "L40S": 362e12, "B200": 2250e12}


class Stopped(Exception):
    """The run was asked to stop (SIGINT, SIGTERM) and has saved itself."""


def operations_counter(config: ModelConfig, stage: str) -> Callable[[Batch], float]:
    """A function that gives the operations of a batch's forward and backward pass: counted for the
    first batch, scaled for the others by what samples of their lengths cost."""
    cost_of, unit = cost.sample_cost(config), None

    def operations(batch: Batch) -> float:
        nonlocal unit
        text, visual = batch.layout.text.length.tolist(), batch.layout.visual.length.tolist()
        work = sum(map(cost_of, text, visual))
        if unit is None:
            samples = [(t, [v] * bool(v)) for t, v in zip(text, visual)]
            unit = cost.step(config, samples, stage, False, len(batch.targets))[0] / work
        return unit * work
    return operations


def scale_gradients(params: Iterable[nn.Parameter], targets: float, group: ProcessGroup,
                    clip: float) -> float:
    """Gradients of the summed loss -> of the mean over `targets` tokens, clipped to norm `clip`.
    Returns their norm before, and where that is not finite changes nothing.

    FSDP2 has averaged the gradients over the processes: times their number, it is the sum."""
    grads = [p.grad for p in params if p.grad is not None]
    scale = group.size / max(1.0, targets)
    norm = torch.nn.utils.get_total_norm(grads)
    norm = scale * (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):
        for grad in grads:
            grad.mul_(scale * min(1.0, clip / (norm + 1e-6)))
    return norm


@contextlib.contextmanager
def out_of_memory(packed: Packed) -> Iterator[None]:
    """Says what was computed and what to lower, where memory ends."""
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        raise UserError(
            f"out of memory at step {packed.step + 1}, in a micro-batch of {len(packed.keys)} "
            f"samples with {len(packed.batch.ids):,} text and {len(packed.batch.patches):,} visual "
            "tokens: lower --micro-batch-tokens or --max-length, add --checkpoint-activations, or "
            "use more GPUs; then --resume") from error


def one_step(batches: Iterator[Packed]) -> Iterator[Packed]:
    """The next step's micro-batches, as they come."""
    for packed in batches:
        yield packed
        if packed.last:
            return


def peak_operations(device: torch.device) -> float | None:
    """Of a process's device, a second, in bfloat16; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK.items() if gpu in name), None)


def memory_gb(device: torch.device) -> float:
    """Most that this process has held so far: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Gives a list that is empty until SIGINT or SIGTERM arrives. A second one ends the program."""
    caught: list[int] = []

    def handle(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
