"""The attention rule of attention.py as a Triton kernel: training, prefill, and decoding with split keys.

WHAT IS COMPUTED. Every sample owns a run of query rows and two runs of keys and values, visual and text, each given
by (start, length) into its own packed tensor, and every row has a position. A query sees a key of its sample iff the
key's position is <= its own. Positions never fall within a run, so what a query sees is a prefix of the visual run
and a prefix of the text run. Two words, a picture, two words, a second picture, two words:

                      visual keys          text keys
    query position    2 3 4   7 8 9        0 1   5 6   10 11
          0           . . .   . . .        : .   . .    .  .     |
          1           . . .   . . .        : #   . .    .  .     |  one tile of queries
          5           # # #   . . .        : #   # .    .  .     |
          6           # # #   . . .        : #   # #    .  .     |
         10           : : :   : : :        : :   : :    :  .        |  the next
         11           : : :   : : :        : :   : :    :  #        |

HOW. One program takes a tile of BLOCK_M query rows and walks both runs in blocks of BLOCK_N keys. Two searches in the
sorted positions tell it, for each run, how many keys the tile's first query sees (so does every row of the tile:
columns of `:`, no mask) and how many its last query sees (the staircase in between, `#`, masked). What lies beyond
is never loaded. The running softmax is FlashAttention's (Dao 2023, algorithm 1), in base 2. Grouped heads: the H // G
query heads that share a key head are packed into the tile as rows (query 0 head 0, query 0 head 1, ..., query 1
head 0, ...), so that one load of a key block serves them all.

FEW QUERIES, MANY KEYS. Tiles x G x B programs would leave most of the GPU idle, so `splits` programs share the keys
of one tile. Each leaves a normalised partial result and the log2 of its softmax sum, and `combine_kernel` weighs them
together. Whatever sizes a launch is known to the host, while starts, lengths and positions stay on the device: no
synchronisation, and decoding from a cache that grows in place can be recorded in a CUDA graph.

The gradients are in kernel_backward.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from nanoeemllm.attention import Run, check_attention_inputs

LOG2_E = 1 / math.log(2)
LOWEST = tl.constexpr(-3.0e38)  # stands for "no key yet": unlike -inf it can be subtracted from itself
FAR = tl.constexpr(2 ** 31 - 1)  # a position beyond every query


class Rows(NamedTuple):
    """A run of queries as a kernel sees it."""
    start: Tensor
    length: Tensor
    position: Tensor


class Keys(NamedTuple):
    """A run of keys as a kernel sees it, with the strides of the two tensors in elements."""
    k: Tensor
    k_row: int
    k_head: int
    v: Tensor
    v_row: int
    v_head: int
    start: Tensor
    length: Tensor
    position: Tensor


# ---- pieces that the kernels share ----

@triton.jit
def count_visible(position, low, length, limit):
    """How many of a sorted run's rows have a position <= limit, given that `low` have. Each turn asks 256 at once."""
    low, high = tl.full((), low, tl.int32), length
    while low < high:
        step = tl.cdiv(high - low, 256)
        probe = low + (tl.arange(0, 256) + 1) * step - 1  # the last row of each of 256 sections
        inside = tl.load(position + probe, mask=probe < high, other=FAR) <= limit
        low += tl.sum(inside.to(tl.int32)) * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def load_tile(x, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK_D) from x + offsets (rows,); zeros for rows not inside and beyond head width D."""
    d = tl.arange(0, BLOCK_D)
    pointer = x + offsets[:, None] + d[None, :]
    if MASKED:
        return tl.load(pointer, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointer, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def load_keys(keys, row, group, end, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
              MASKED: tl.constexpr):
    """-> k and v (BLOCK_N, BLOCK_D) of the rows from `row` on, `end` of them real."""
    n = tl.arange(0, BLOCK_N)
    k = keys.k + row.to(tl.int64) * keys.k_row + group * keys.k_head  # 64 bits: a cache is large
    v = keys.v + row.to(tl.int64) * keys.v_row + group * keys.v_head
    return (load_tile(k, n * keys.k_row, n < end, D, BLOCK_D, MASKED),
            load_tile(v, n * keys.v_row, n < end, D, BLOCK_D, MASKED))


@triton.jit
def key_range(keys, sample, first, last, split, splits, BLOCK_N: tl.constexpr):
    """-> the run's first row; low, middle, high: keys low..middle need no mask, middle..high do."""
    start = tl.load(keys.start + sample)
    length = tl.load(keys.length + sample)
    full = count_visible(keys.position + start, 0, length, first)
    seen = count_visible(keys.position + start, full, length, last)
    share = tl.cdiv(tl.cdiv(seen, BLOCK_N), splits) * BLOCK_N
    low = tl.minimum(split * share, seen)
    high = tl.minimum(low + share, seen)
    return start, low, tl.maximum(low, tl.minimum(full // BLOCK_N * BLOCK_N, high)), high


@triton.jit
def visible(keys, row, end, q_position, BLOCK_N: tl.constexpr):
    """The rule itself, (BLOCK_M, BLOCK_N)."""
    n = tl.arange(0, BLOCK_N)
    k_position = tl.load(keys.position + row + n, mask=n < end, other=FAR)
    return k_position[None, :] <= q_position[:, None]


@triton.jit
def packed_rows(start, packed, end, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M packed query rows from `packed` on: their first row, then for each its row and head from there, and
    whether it exists. Small offsets from one 64-bit row keep the pointers cheap."""
    m = packed % GROUP + tl.arange(0, BLOCK_M)
    return (start + packed // GROUP).to(tl.int64), m // GROUP, m % GROUP, packed + tl.arange(0, BLOCK_M) < end


@triton.jit
def query_tile(query, sample, tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> packed_rows of a tile, their positions, and the first and the last of these."""
    start = tl.load(query.start + sample)
    end = tl.load(query.length + sample) * GROUP
    row, r, h, inside = packed_rows(start, tile * BLOCK_M, end, GROUP, BLOCK_M)
    position = tl.load(query.position + row + r, mask=inside, other=-1)
    last = start + (tl.minimum((tile + 1) * BLOCK_M, end) - 1) // GROUP
    return row, r, h, inside, position, tl.load(query.position + row), tl.load(query.position + last)


# ---- forward ----

@triton.jit
def see_run(q, q_position, first, last, acc, top, total, keys, sample, group, split, splits, scale_log2,
            D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Carry the running softmax over a run of keys: acc = sum of 2^(s - top) v, total = sum of 2^(s - top)."""
    start, low, middle, high = key_range(keys, sample, first, last, split, splits, BLOCK_N)
    for MASKED in tl.static_range(2):
        for n in range(middle if MASKED else low, high if MASKED else middle, BLOCK_N):
            k, v = load_keys(keys, start + n, group, high - n, D, BLOCK_D, BLOCK_N, MASKED)
            s = tl.dot(q, k.T, input_precision="ieee")
            if MASKED:
                s = tl.where(visible(keys, start + n, high - n, q_position, BLOCK_N), s, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
            p = tl.exp2(s * scale_log2 - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["rows", "splits"])
def forward_kernel(q, q_row, q_head, query, visual, text, out, lse, rows, splits, scale_log2,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (splits, rows, H, D), lse (splits, rows, H): log2 of each row's softmax sum."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see most keys: they start first
    group = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * GROUP
    sample = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    if tile * BLOCK_M >= tl.load(query.length + sample) * GROUP:
        return
    row, r, h, inside, position, first, last = query_tile(query, sample, tile, GROUP, BLOCK_M)
    q_tile = load_tile(q + row * q_row + group * GROUP * q_head, r * q_row + h * q_head, inside, D, BLOCK_D, True)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = see_run(q_tile, position, first, last, acc, top, total, visual, sample, group,
                              split, splits, scale_log2, D, BLOCK_D, BLOCK_N)
    # in reverse, so that whoever has the short end of one run has the long end of the other
    acc, top, total = see_run(q_tile, position, first, last, acc, top, total, text, sample, group,
                              splits - 1 - split, splits, scale_log2, D, BLOCK_D, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    at = (split.to(tl.int64) * rows + row) * heads + group * GROUP
    result = acc / tl.where(total > 0, total, 1)[:, None]  # a row that saw nothing: 0 / 1, and lse = -inf
    tl.store(out + at * D + ((r * heads + h) * D)[:, None] + d[None, :], result.to(out.dtype.element_ty),
             mask=inside[:, None] & (d < D)[None, :])
    tl.store(lse + at + r * heads + h, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["rows_heads", "splits"])
def combine_kernel(partial, partial_lse, out, lse, rows_heads, splits,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """out = sum of 2^(lse_s - lse) partial_s, with lse = log2 of the sum of 2^lse_s; one row and head a program."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    places = tl.arange(0, BLOCK_S) * rows_heads.to(tl.int64) + at
    each = tl.load(partial_lse + places, mask=tl.arange(0, BLOCK_S) < splits, other=-float("inf"))
    top = tl.maximum(tl.max(each, 0), LOWEST)
    weight = tl.exp2(each - top)
    total = tl.sum(weight, 0)
    # a row in no run has left its partial results unwritten: do not read them
    x = tl.load(partial + places[:, None] * D + d[None, :], mask=(weight > 0)[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1)
    tl.store(out + at * D + d, result.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + at, top + tl.log2(total))


# ---- which tile sizes to try ----

class Tile(NamedTuple):
    capability: int  # oldest GPU that it is meant for: 8 is Ampere and Ada, 9 is Hopper
    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int


FORWARD = [Tile(8, 64, 64, 4, 3), Tile(8, 128, 32, 8, 3), Tile(9, 128, 64, 8, 3), Tile(9, 128, 128, 8, 2)]
FORWARD_FEW = [Tile(8, 16, 64, 4, 3), Tile(8, 16, 32, 4, 3), Tile(9, 64, 64, 4, 3)]
SMALL = Tile(8, 16, 32, 4, 1)  # what fits everywhere, and for float32, which has no tensor cores to feed
FEW = 16                       # packed query rows up to which a call counts as "few queries"


def tuned(kernel, tiles: list[Tile], tile_rows):
    """`kernel` with the fastest of `tiles`, measured once for each head width and dtype, never for a length.

    tile_rows(tile) is how many rows of keys, values, ... a program keeps in shared memory: what fits is tried.
    """
    def config(tile):
        return triton.Config({"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N}, tile.warps, tile.stages)

    def fitting(_, arguments, **meta):
        q = arguments["q"]
        _, capability, shared_memory = device_limits(q.device)
        room = (shared_memory - 2048) // (meta["BLOCK_D"] * q.element_size())
        fit = [tile for tile in tiles if tile.capability <= capability and tile_rows(tile) <= room]
        return [config(tile) for tile in (fit if q.element_size() == 2 and fit else [SMALL])]

    configs = [config(tile) for tile in tiles]
    if triton.knobs.runtime.interpret:
        return triton.autotune(configs[:1], key=[])(kernel)
    prune = {"early_config_prune": fitting}
    return triton.autotune(configs, key=["D"], prune_configs_by=prune, cache_results=True)(kernel)


def _forward_rows(tile: Tile) -> int:
    return tile.BLOCK_M + 2 * tile.stages * tile.BLOCK_N


forward_many = tuned(forward_kernel, FORWARD, _forward_rows)
forward_few = tuned(forward_kernel, FORWARD_FEW, _forward_rows)


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int, int]:
    """-> multiprocessors, major compute capability, bytes of shared memory a program can have."""
    if device.type != "cuda":
        return 1, 8, 0  # the interpreter
    limits = torch.cuda.get_device_properties(device)
    return limits.multi_processor_count, limits.major, limits.shared_memory_per_block_optin


# ---- launches ----

def composite_attention_kernel(q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor, v_text: Tensor,
                               query: Run, visual: Run, text: Run, scale: float | None = None) -> Tensor:
    """attention.composite_attention on a GPU: same arguments, same result, in bfloat16, float16 or float32."""
    check_attention_inputs(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale)
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q: dtype is {q.dtype}, expected bfloat16, float16 or float32 on a GPU")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    runs = [tensor for run in (query, visual, text) for tensor in run[:3]]
    max_lengths = [run.max_length for run in (query, visual, text)]
    return attend(q, k_visual, v_visual, k_text, v_text, runs, max_lengths, scale)[0]


@library.custom_op("nanoeemllm::attend", mutates_args=())
def attend(q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor, v_text: Tensor, runs: list[Tensor],
           max_lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """runs: start, length, position of query, visual and text. -> out (N, H, D), lse (N, H) float32.

    A custom op: torch.compile and activation checkpointing take it whole.
    """
    (N, H, D), G, B = q.shape, k_text.shape[1], len(runs[0])
    out, lse = q.new_zeros(q.shape), q.new_zeros((N, H), dtype=torch.float32)  # zeros for rows in no run
    packed = max_lengths[0] * (H // G)
    if not B or not packed:
        return out, lse

    kernel, rows = (forward_few, FEW) if packed <= FEW else (forward_many, 64)
    splits = choose_splits(triton.cdiv(packed, rows) * G * B, (max_lengths[1] + max_lengths[2]) // 256,
                           2 * device_limits(q.device)[0])
    into, into_lse = (out, lse) if splits == 1 else (q.new_empty((splits, N, H, D), dtype=torch.float32),
                                                     q.new_full((splits, N, H), -math.inf, dtype=torch.float32))
    sizes = dict(D=D, BLOCK_D=block_width(D))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[lambda meta: (triton.cdiv(packed, meta["BLOCK_M"]), G, B * splits)](
            *dense_rows(q), *kernel_runs(k_visual, v_visual, k_text, v_text, runs), into, into_lse, N, splits,
            scale * LOG2_E, GROUP=H // G, **sizes)
        if splits > 1:
            BLOCK_S = triton.next_power_of_2(splits)
            combine_kernel[(N * H,)](into, into_lse, out, lse, N * H, splits, BLOCK_S=BLOCK_S, **sizes)
    return out, lse


@attend.register_fake
def _(q, k_visual, v_visual, k_text, v_text, runs, max_lengths, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, runs, ctx.max_lengths, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors, *runs)


def _differentiate(ctx, dout, _):
    from nanoeemllm.kernel_backward import attend_backward  # that file builds on this one
    out, lse, *tensors = ctx.saved_tensors
    inputs, runs = tensors[:5], tensors[5:]
    q, *keys = wanted = ctx.needs_input_grad[:5]
    needed = [q, any(keys[:2]), any(keys[2:])]
    grads = attend_backward(dout, out, lse, *inputs, runs, ctx.max_lengths, ctx.scale, needed)
    return *(grad if want else None for grad, want in zip(grads, wanted)), [None] * len(runs), None, None


attend.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def choose_splits(programs: int, most: int, places: int) -> int:
    """How many programs share one tile's keys: the fewest, up to `most`, with which the last round of programs
    fills the GPU's `places` nearly as well as it can be filled."""
    def filled(splits):
        rounds = programs * splits / places
        return rounds / math.ceil(rounds)
    choices = range(1, min(max(most, 1), 64) + 1)
    return next(splits for splits in choices if filled(splits) >= 0.9 * max(map(filled, choices)))


def dense_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """-> x and its strides of rows and heads. Any will do, but the numbers of one row must lie side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def kernel_runs(k_visual, v_visual, k_text, v_text, runs) -> tuple[Rows, Keys, Keys]:
    visual, text = ((*dense_rows(k), *dense_rows(v)) for k, v in ((k_visual, v_visual), (k_text, v_text)))
    return Rows(*runs[:3]), Keys(*visual, *runs[3:6]), Keys(*text, *runs[6:])


def block_width(D: int) -> int:
    return max(16, triton.next_power_of_2(D))
