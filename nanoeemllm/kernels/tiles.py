"""Which tile sizes a launch takes, and how many programs share the keys of one tile."""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    capability: int  # the oldest GPU it is for: 80 Ampere, 89 Ada, 90 Hopper
    D: int           # the widest head it is for
    own: int         # rows that a program owns: queries or, for dk and dv, keys
    step: int        # rows of the other side that it loads at a time
    warps: int
    stages: int      # three, or the next copy is issued only at the loop's bottom, too late


# A launch takes the first entry that fits the GPU. Chosen by what the compiler makes of them
# (README.md: no spills, wgmma not serialised); no GPU has measured them yet.
FORWARD = [Tile(90, 80, 128, 128, 8, 3), Tile(90, 128, 128, 64, 8, 3),
           Tile(80, 80, 128, 64, 8, 3), Tile(80, 128, 64, 64, 4, 2)]
# Few queries, as in decoding: 16 rows are the least that tensor cores multiply. More stages spill.
# At 8.9 and D = 64 so do 64 keys a step, on Triton 3.7.1.
FORWARD_FEW = [Tile(89, 64, 16, 32, 4, 2), Tile(89, 128, 16, 64, 4, 2),
               Tile(80, 128, 16, 32, 4, 2)]
QUERY = [Tile(90, 128, 128, 64, 8, 3), Tile(80, 128, 128, 32, 8, 3), Tile(80, 128, 128, 32, 8, 2)]
KEYS = [Tile(90, 128, 128, 32, 8, 3), Tile(80, 128, 64, 32, 8, 2)]
SMALL = Tile(80, 256, 16, 32, 4, 1)  # for wider heads; and float32 has no tensor cores to feed
FEW = 16                             # packed query rows up to which a call counts as "few"


def choose_tile(tiles: list[Tile], q: Tensor) -> Tile:
    return next((tile for tile in tiles if fits(tile, q)), SMALL)


def fits(tile: Tile, q: Tensor) -> bool:
    _, capability, memory = device_limits(q.device)
    return (tile.capability <= capability and q.shape[2] <= tile.D and q.element_size() == 2
            and shared_bytes(tile, q) <= memory)


def shared_bytes(tile: Tile, q: Tensor) -> int:
    """A bound: two tensors of its own rows, `stages` times two of the others, and a little."""
    D = q.shape[2]
    width = sum(columns(D, part) for part in range(parts(D)))
    return 2 * (tile.own + tile.stages * tile.step) * width * q.element_size() + 2048


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int, int]:
    """-> multiprocessors, compute capability x 10, bytes of shared memory a program can have."""
    if device.type != "cuda":
        return 1, 80, 2 ** 20  # the interpreter
    limits = torch.cuda.get_device_properties(device)
    capability = 10 * limits.major + limits.minor
    return limits.multi_processor_count, capability, limits.shared_memory_per_block_optin


def sizes(tile: Tile, D: int, GROUP: int) -> dict:
    """What a kernel is compiled for."""
    return dict(D=D, GROUP=GROUP, OWN=tile.own, STEP=tile.step, num_warps=tile.warps,
                num_stages=tile.stages)


@triton.constexpr_function
def parts(D):
    """Into how many parts a tile of D columns falls."""
    return 1 if D == columns(D, 0) else 2


@triton.constexpr_function
def columns(D, part):
    """The largest power of two in D, and a power of two that holds the rest, at least 16."""
    main = 2 ** (D.bit_length() - 1)
    return main if part == 0 else max(16, triton.next_power_of_2(D - main))


def splits_for(tile: Tile, q: Tensor, programs: int, longest_keys: list[int]) -> int:
    blocks = sum(triton.cdiv(length, tile.step) for length in longest_keys)
    processors, _, memory = device_limits(q.device)
    at_once = max(1, min(2, memory // shared_bytes(tile, q)))  # programs a multiprocessor
    return choose_splits(programs, blocks, processors * at_once)


@functools.cache
def choose_splits(programs: int, blocks: int, places: int) -> int:
    """How many programs share the `blocks` of one tile, on a GPU that runs `places` programs at
    once: the fewest within 2% of the shortest time, counted in blocks of the longest program."""
    def time(splits):
        start_and_end = 1 if splits == 1 else 2  # of a program; partial results are larger
        return math.ceil(programs * splits / places) * (math.ceil(blocks / splits) + start_and_end)
    choices = range(1, max(1, min(blocks, 64)) + 1)
    shortest = min(map(time, choices))
    return next(splits for splits in choices if time(splits) <= 1.02 * shortest)
