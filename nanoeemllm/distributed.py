"""Several processes as one: who is who, the model spread over all of them, and its state on disk.

`torchrun` starts the processes. Each keeps a share of every tensor (FSDP2): a layer's weights are gathered right before
the layer runs and forgotten after it, gradients are summed where the share lies, and AdamW updates shares alone. One
process on a CPU has the plain model. On a GPU, one or many, the layers compute in bfloat16, what is trained keeps its
weights in float32, and what is frozen lies in bfloat16.

A checkpoint is a folder of PyTorch's own distributed format, the same for any number of processes.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nanoeemllm import checkpoint
from nanoeemllm.command_line import device_from
from nanoeemllm.config import UserError
from nanoeemllm.model import EEMLLM

# The layers' outputs are changed in place nowhere; and one process may well save alone.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module|torch.distributed is disabled")

WHOLE = "whole.json"      # written last: the checkpoint's files and their sizes


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them."""
    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, found: list) -> list:
        """Everybody's lists as one."""
        if self.size == 1:
            return found
        everybody = [None] * self.size
        dist.all_gather_object(everybody, found)
        return sum(everybody, [])

    def first_alone(self, function: Callable):
        """What function() gives, or its UserError, on every process; only the first one calls it."""
        if self.size == 1:
            return function()
        answer = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]


@contextlib.contextmanager
def join(device: str | None):
    """Gives the Group of the processes that torchrun has started, or of this one alone. device: the best there is."""
    device = device_from(device)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(backend)
    elif backend == "nccl":                                # FSDP2 is what computes in bfloat16, on one GPU too
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield Group(rank, size, torch.device(device))
    if dist.is_initialized():                              # not after an error: the others may wait for this process
        dist.barrier()
        dist.destroy_process_group()


# ---- the model ----

def spread(model: EEMLLM, group: Group, compute_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Puts a model onto the group's devices, what requires a gradient in float32. Returns its tensors as they were.

    model: as checkpoint.load maps it from its files on the CPU, so that a process reads only its own share; or on
    "meta", to get memory without values. compute_dtype: by default bfloat16 on a GPU.
    """
    stored = {name: p.detach() for name, p in model.named_parameters()}
    if compute_dtype is None and group.device.type == "cuda":
        compute_dtype = torch.bfloat16
    dtype_of = lambda p: torch.float32 if p.requires_grad or compute_dtype is None else compute_dtype
    if not dist.is_initialized():
        for p in model.parameters():
            p.data = p.data.to(group.device, dtype_of(p))
        return stored

    model.to("meta")
    for p in model.parameters():
        p.data = p.data.to(dtype_of(p))
    mesh = init_device_mesh(group.device.type, (group.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for part in (*(model.vision.layers if model.config.vision else ()), *model.decoder.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=group.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            whole = stored[name]
            rows = -(-len(whole) // group.size)            # FSDP2 deals rows as torch.chunk does
            if not whole.is_meta:
                p.to_local().copy_(whole[group.rank * rows:(group.rank + 1) * rows])
    return stored


def save_model(model: EEMLLM, stored: dict[str, Tensor], group: Group, folder: Path):
    """Writes the model folder that one process would write: in the number types it came in, frozen tensors to the bit.

    The first process writes and all gather, one tensor at a time, in the same order.
    """
    def lazy(name: str, p: Tensor) -> checkpoint.Lazy:
        def load() -> Tensor:
            if not p.requires_grad:
                return stored[name]
            return (p.full_tensor() if isinstance(p, DTensor) else p).detach().to("cpu", stored[name].dtype)
        return checkpoint.Lazy(tuple(p.shape), stored[name].dtype, load)

    tensors = {name: lazy(name, p) for name, p in model.named_parameters()}
    if group.is_first:
        checkpoint.save(tensors, model.config, model.tokenizer, folder)
    else:
        for tensor in tensors.values():
            tensor.load()
    if group.size > 1:
        dist.barrier()


# ---- checkpoints ----

def save_state(state: dict[str, Tensor], folder: Path, group: Group):
    """Writes tensors (plain, or shares of whole ones) as a checkpoint: aside, flushed to the disk, then renamed.

    Several machines must see the same folder. Raises UserError where it cannot be written.
    """
    aside = folder.with_name(f".writing-{folder.name}")
    try:
        group.first_alone(lambda: aside.mkdir(parents=True))
        dcp.save(state, storage_writer=dcp.FileSystemWriter(aside), no_dist=group.size == 1)
        group.first_alone(lambda: _complete(aside, folder))
    except (OSError, dcp.api.CheckpointException) as error:
        reasons = [str(e) for e, _ in getattr(error, "failures", {}).values()] or [str(error)]
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({reasons[0].splitlines()[0]}): the checkpoint before it stands; "
                        "make room on the disk and go on with --resume") from error


def _complete(aside: Path, folder: Path):
    sizes = {path.name: path.stat().st_size for path in aside.iterdir()}
    checkpoint._write(aside / WHOLE, json.dumps(sizes).encode())
    checkpoint._flush(aside)
    aside.rename(folder)
    checkpoint._flush(folder.parent)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files, each with all its bytes."""
    try:
        sizes = json.loads((folder / WHOLE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def load_state(state: dict[str, Tensor], folder: Path, group: Group):
    """Reads a checkpoint into tensors of the same names and shapes, shared out among however many processes."""
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=group.size == 1)
