"""Several processes as one: who is who, and the model sharded over all of them.

`torchrun` starts the processes. Each keeps a shard of every tensor (FSDP2): a layer's weights are
gathered right before the layer runs and freed after it, gradients are summed where the shard lies,
and AdamW updates shards alone. One process on a CPU has the plain model. On a GPU, one or many, the
layers compute in bfloat16, trained weights are kept in float32, and frozen ones in bfloat16.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nanoeemllm.weights import folder as weights
from nanoeemllm.border.command import device_from, processes
from nanoeemllm.config import UserError
from nanoeemllm.model import EEMLLM

# No layer's output is changed in place; and one process may well save alone.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module|torch.distributed is disabled")

@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, as one of them sees them."""
    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor([*values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def gather(self, found: list) -> list:
        """All processes' lists as one."""
        if self.size == 1:
            return found
        lists = [None] * self.size
        dist.all_gather_object(lists, found)
        return sum(lists, [])

    def on_first(self, function: Callable):
        """Calls function() on the first process only; all get its result, or its UserError."""
        answers = []
        if self.is_first:
            try:
                answers.append((function(), None))
            except UserError as error:
                answers.append((None, str(error)))
        (result, error), = self.gather(answers)
        if error is not None:
            raise UserError(error)
        return result


@contextlib.contextmanager
def init_distributed(device: str | None):
    """Gives the ProcessGroup that torchrun has started, or this process alone. device: by default
    the best there is. A process computes on its share of the machine's cores, unless
    OMP_NUM_THREADS says otherwise."""
    rank, size, here = processes()
    if here > 1 and "OMP_NUM_THREADS" not in os.environ:     # by default a process takes all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    device = device_from(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(backend)
    elif backend == "nccl":              # FSDP2 is what computes in bfloat16, on one GPU too
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield ProcessGroup(rank, size, torch.device(device))
    if dist.is_initialized():            # not after an error: the others may wait for this process
        dist.barrier()
        dist.destroy_process_group()


# ---- the model ----

def shard_model(model: EEMLLM, group: ProcessGroup, compute_dtype: torch.dtype | None = None,
                ) -> dict[str, Tensor]:
    """Puts a model onto the group's devices, what is trained in float32. Returns its tensors as
    they were.

    model: as it is mapped from its files on the CPU, so that a process reads only its own shard; or
    on "meta", to get memory without values. compute_dtype: by default bfloat16 on a GPU.
    """
    stored = {name: p.detach() for name, p in model.named_parameters()}
    if compute_dtype is None and group.device.type == "cuda":
        compute_dtype = torch.bfloat16
    sharded = dist.is_initialized()
    if sharded:
        model.to("meta")
    for p in model.parameters():
        dtype = torch.float32 if p.requires_grad or compute_dtype is None else compute_dtype
        p.data = p.data.to(p.device if sharded else group.device, dtype)
    if not sharded:
        return stored

    mesh = init_device_mesh(group.device.type, (group.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    encoder = model.vision.layers if model.config.vision else ()
    for part in (*encoder, *model.decoder.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=group.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            whole = stored[name]
            rows = -(-len(whole) // group.size)              # FSDP2 deals rows as torch.chunk does
            if not whole.is_meta:
                p.to_local().copy_(whole[group.rank * rows:(group.rank + 1) * rows])
    return stored


def reshard(model: EEMLLM):
    """After a forward pass without a backward pass: FSDP2 keeps the root's weights gathered for a
    backward pass, and would show them, not the trained shards, as the model's parameters."""
    if isinstance(model, FSDPModule):
        model.reshard()


def save_model(model: EEMLLM, stored: dict[str, Tensor], group: ProcessGroup, folder: Path):
    """Writes the model folder that one process would write: in the number types it came in, frozen
    tensors to the bit. The first process writes and all gather, one tensor at a time."""
    def lazy(name: str, p: Tensor) -> weights.Lazy:
        def load() -> Tensor:
            if not p.requires_grad:
                return stored[name]
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            return whole.detach().to("cpu", stored[name].dtype)
        return weights.Lazy(tuple(p.shape), stored[name].dtype, load)

    tensors = {name: lazy(name, p) for name, p in model.named_parameters()}
    if group.is_first:
        weights.save(tensors, model.config, model.tokenizer, folder)
    else:
        for tensor in tensors.values():
            tensor.load()
    if group.size > 1:
        dist.barrier()
