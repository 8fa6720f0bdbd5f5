"""The training loop: what is trained, the schedule, the steps.

The loss of a step is the mean cross entropy over the learned-from tokens of the whole global batch, however it is cut
into micro-batches and dealt to processes: gradients of sums are added up, and divided once by the number of tokens.

Nothing here draws random numbers, the schedule and the data are functions of the step's number, so a checkpoint needs
no more than that to go on as if the run had never stopped.
"""

import contextlib
import math
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nanoeemllm.config import UserError
from nanoeemllm.data import Loader, Packed
from nanoeemllm.distributed import Group
from nanoeemllm.flops import training_operations
from nanoeemllm.model import EEMLLM
from nanoeemllm.run import Run
from nanoeemllm.visual_path import learns_in_pretrain

PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
        "B200": 2250e12}                # a GPU's dense bfloat16 operations a second; MFU is measured against it


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one stage."""
    stage: str                          # "pretrain" or "finetune"
    steps: int
    batch_size: int                     # samples an optimizer step, over all processes and micro-batches
    learning_rate: float
    warmup: float = 0.03                # part of the steps in which the learning rate rises
    weight_decay: float = 0.0
    clip: float = 1.0                   # largest norm of the gradient
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to 0. Steps count from 0."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def freeze_for(model: EEMLLM, stage: str) -> list[nn.Parameter]:
    """Leaves to train what the stage trains and returns it: the projector (and what else a visual path put between
    encoder and language model) alone, or with the language model."""
    for name, p in model.named_parameters():
        p.requires_grad_(learns_in_pretrain(name) or stage == "finetune" and name.startswith("decoder."))
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(params: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, fused=True)


# ---- one step ----

@dataclass
class Seen:
    """What the micro-batches of a step, or of held-out data, held; this process's until `over` sums it."""
    loss: float = 0.0                   # summed over the learned-from tokens
    learned: float = 0.0
    tokens: float = 0.0
    operations: float = 0.0
    cut: float = 0.0                    # samples that lost turns
    bad: float = 0.0
    stop: float = 0.0                   # processes that were asked to stop

    def over(self, group: Group) -> "Seen":
        return Seen(*group.sum(*vars(self).values()))

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1.0, self.learned)


def accumulate(model: EEMLLM, micro_batches: Iterable[Packed], stage: str | None) -> tuple[Seen, list[tuple]]:
    """Adds the gradient of each micro-batch's summed loss to .grad. stage None: measures the loss and nothing else.

    Returns what was seen, and of every micro-batch (keys, bad samples, loss): the batches themselves are let go.
    """
    seen, losses, samples = Seen(), [], []
    for p in micro_batches:
        try:
            loss = model(p.batch.to(model.device))
            if stage is not None:
                loss.backward()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise OnOneProcess(
                f"out of memory at step {p.step + 1}, in a micro-batch of {len(p.keys)} samples with {len(p.batch.ids):,} "
                f"text and {len(p.batch.layout.visual.position):,} visual tokens: lower --micro-batch-tokens or "
                "--max-length, add --checkpoint-activations, or use more GPUs; then --resume") from error
        losses.append(loss.detach())
        samples.append((p.keys, p.bad))
        seen.learned += len(p.batch.targets)
        seen.tokens += len(p.batch.ids) + len(p.batch.layout.visual.position)
        seen.cut, seen.bad = seen.cut + p.cut, seen.bad + len(p.bad)
        if stage is not None and peak_operations(model.device):
            seen.operations += training_operations(model.config, p.batch.layout, len(p.batch.targets), stage)
    losses = torch.stack(losses).tolist()                       # the host waits for the device here, once a step
    seen.loss = sum(losses)
    return seen, [(keys, bad, loss) for (keys, bad), loss in zip(samples, losses)]


class OnOneProcess(UserError):
    """An error that the other processes know nothing of, so that this one has to tell it."""


def update(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, learned: float, group: Group,
           config: TrainConfig, step: int) -> float:
    """One step of AdamW from the gradients of the summed loss. Returns their norm; if it is not finite, does nothing.

    FSDP2 has averaged the gradients over the processes: times their number, it is the sum.
    """
    grads = [p.grad for p in params if p.grad is not None]
    scale = group.size / max(1.0, learned)
    norm = torch.nn.utils.get_total_norm(grads)
    norm = scale * (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):
        for grad in grads:
            grad.mul_(scale * min(1.0, config.clip / (norm + 1e-6)))
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate(config, step)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def peak_operations(device: torch.device) -> float | None:
    """Of a process's device, a second, in bfloat16; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK.items() if gpu in name), None)


def memory_gb(device: torch.device) -> float:
    """Most that this process has held so far: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---- the loop ----

class Stopped(Exception):
    """The run was asked to stop (SIGINT, SIGTERM) and has saved itself."""


def train(model: EEMLLM, load: Callable[[int], Loader], config: TrainConfig, run: Run, group: Group,
          held_out: Callable[[], Iterable[Packed]] | None = None, checkpoint_every: int = 500,
          max_bad: float = 0.01) -> bool:
    """Trains in place a model that is frozen for the stage and spread over the group. load(first) gives this
    process's micro-batches of all steps from `first` on; held_out() those of the held-out data, measured
    at every checkpoint. max_bad: part of the samples that may be unusable. Returns whether a signal came too late, in the
    last step.

    Raises Stopped after a signal, the step finished and saved; UserError for a loss that is not finite, and for too
    many bad samples.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(params, config)
    first = run.load(training_state(model, optimizer))
    for p in params:
        optimizer.state[p]["step"].fill_(first)
    samples = config.steps * config.batch_size
    peak, loader = peak_operations(group.device), load(first)

    with _signals() as caught, tqdm(total=config.steps, initial=first, desc=config.stage, mininterval=0.5,
                                    disable=None if group.is_first else True) as bar:
        start, waited = time.perf_counter(), 0.0
        for step, micro_batches in steps_of(loader):
            mine, parts = accumulate(model, micro_batches, config.stage)
            mine.stop = len(caught)
            seen = mine.over(group)
            if seen.bad:
                bad = group.gather([sample for _, bad, _ in parts for sample in bad])
                run.note_bad(step + 1, bad, samples, config.batch_size, max_bad)
            norm = update(params, optimizer, seen.learned, group, config, step) if math.isfinite(seen.loss) else math.nan
            if not math.isfinite(norm):
                keys = group.gather([key for keys, _, loss in parts if not math.isfinite(loss) for key in keys])
                raise UserError(f"the loss is {seen.mean_loss} and the norm of its gradient {norm} at step {step + 1}, samples "
                                f"{', '.join(keys[:8]) or 'unknown'}: the last checkpoint stands; lower the learning rate or "
                                "look at these samples")

            now = time.perf_counter()
            line = {"step": step + 1, "loss": seen.mean_loss, "lr": learning_rate(config, step), "grad_norm": norm,
                    "tokens_per_s": seen.tokens / (now - start), "seconds": now - start,
                    "waited_for_data": loader.waited - waited, "memory_gb": memory_gb(group.device)}
            if peak:
                line["mfu"] = seen.operations / (now - start) / (peak * group.size)
            if seen.cut:
                line["cut"] = int(seen.cut)
            start, waited = now, loader.waited
            save = (step + 1) % checkpoint_every == 0 or step + 1 == config.steps or seen.stop
            if save and held_out is not None and not seen.stop:
                line |= measure(model, held_out(), group)
            run.note(line)
            bar.set_postfix_str(_in_short(line), refresh=False)
            bar.update()
            if save:
                run.save(step + 1, training_state(model, optimizer))
                start = time.perf_counter()                              # of training alone
            if seen.stop and step + 1 < config.steps:
                run.draw_curve()
                raise Stopped(f"stopped after step {step + 1} of {config.steps}; it is saved: run the same command "
                              "with --resume to go on")
        run.draw_curve()
        return group.sum(len(caught))[0] > 0


def steps_of(packed: Iterable[Packed]) -> Iterator[tuple[int, Iterator[Packed]]]:
    """(step, its micro-batches, as they come)"""
    packed = iter(packed)

    def rest(p: Packed) -> Iterator[Packed]:
        yield p
        while not p.last:
            p = next(packed)
            yield p

    for first in packed:
        yield first.step, rest(first)


@torch.no_grad()
def measure(model: EEMLLM, micro_batches: Iterable[Packed], group: Group) -> dict[str, float]:
    """Mean loss over all learned-from tokens of held-out data, and how many of its samples cannot be used."""
    seen = accumulate(model, micro_batches, None)[0].over(group)
    found = {"held_out_loss": seen.mean_loss} if seen.learned else {}
    return found | ({"held_out_bad": int(seen.bad)} if seen.bad else {})


def training_state(model: EEMLLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained weights and AdamW's moments of each, by name: the tensors themselves, to be saved or read into."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kept = optimizer.state[p]
            if not kept:
                kept["step"] = torch.zeros((), device=p.device)
                kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state |= {name: p.detach(), f"{name} exp_avg": kept["exp_avg"], f"{name} exp_avg_sq": kept["exp_avg_sq"]}
    return state


def _in_short(line: dict) -> str:
    mfu = f", MFU {line['mfu']:.0%}" if "mfu" in line else ""
    held_out = f", held-out {line['held_out_loss']:.3f}" if "held_out_loss" in line else ""
    held_out += f", held-out samples not used {line['held_out_bad']}" if "held_out_bad" in line else ""
    return (f"loss {line['loss']:.3f}{held_out}, lr {line['lr']:.1e}, {line['tokens_per_s']:,.0f} tokens/s{mfu}, "
            f"{line['memory_gb']:.1f} GB")


@contextlib.contextmanager
def _signals():
    """Gives a list that stays empty until SIGINT or SIGTERM arrives. A second signal ends the program at once."""
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
