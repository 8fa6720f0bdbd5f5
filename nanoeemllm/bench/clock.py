"""Time as all benchmarks take it: when the device has finished, and in turns, so that other work on
the machine slows all alike."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from tqdm import tqdm

Measured = TypeVar("Measured")


def now(device) -> float:
    """Milliseconds, when all that was launched has been computed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def best_ms(function: Callable, device) -> float:
    times = []
    for _ in range(10):
        begin = now(device)
        function()
        times.append(now(device) - begin)
    return min(times)


def take_turns(calls: dict[str, Callable[[], Measured]], rounds: int, warm_up: int = 1,
               name: str | None = None) -> dict[str, list[Measured]]:
    """What each call returned in every round after the first ones."""
    found = {name: [] for name in calls}
    for _ in tqdm(range(warm_up + rounds), name, leave=False, disable=None):
        for name, call in calls.items():
            found[name].append(call())
    return {name: results[warm_up:] for name, results in found.items()}
