"""A function over many inputs, computed by worker processes."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.data import DataLoader


class _Identity:
    """A data set whose batches are what the DataLoader's batch sampler yields."""

    def __getitems__(self, batch):
        return batch


def in_background(function: Callable, inputs: Iterable, workers: int, pin_memory: bool = False,
                  ) -> Iterator:
    """Yields function(x) of every input, in order, computed by `workers` processes, or by this one.
    close() ends the processes."""
    loader = DataLoader(_Identity(), batch_sampler=inputs, num_workers=workers, collate_fn=function,
                        pin_memory=pin_memory, worker_init_fn=_start_worker,
                        multiprocessing_context="fork" if workers else None,
                        generator=torch.Generator())    # its own: training's stays untouched
    yield from loader                                   # whose iterator ends them when it is let go


def _start_worker(_):
    """Ctrl-C and SIGTERM may reach every process of a group, but the training loop decides what
    they mean. So a worker ends only when its parent says so, or has ended itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
