"""Composite attention as a Triton kernel: training, prefill, and decoding with split keys.

WHAT IS COMPUTED. Every sample owns rows of queries and two runs of keys and values, visual and
text, each given by (start, length) into its own packed tensor. A query sees a prefix of its
sample's visual run and a prefix of its text run, two numbers that come with the query row. Two
words, a picture, two words, a second picture, two words:

              visual keys      text keys        sees_visual  sees_text
    query 0   . . .  . . .     : .  . .  . .         0           1     |
    query 1   . . .  . . .     : #  . .  . .         0           2     |  one tile of queries
    query 2   # # #  . . .     : #  # .  . .         3           3     |
    query 3   # # #  . . .     : #  # #  . .         3           4     |
    query 4   : : :  : : :     : :  : :  : .         6           5        |  the next
    query 5   : : :  : : :     : :  : :  : #         6           6        |

HOW. One program takes a tile of BLOCK_M queries and walks the keys in blocks of BLOCK_N. Counts
never fall within a sample, so all rows of a tile see what its first row sees (`:`, no mask), and
none sees more than its last row (the staircase in between, `#`, masked). What lies beyond is never
loaded. There are two loops, one over the full blocks of both runs and one over the masked blocks
of both. The running softmax is FlashAttention's (Dao 2023, algorithm 1), in base 2:

    m' = max(m, max(s))     l' = 2^(m - m') l + sum(2^(s - m'))     o' = 2^(m - m') o + 2^(s - m') v

Grouped heads: the H // G query heads that share a key head are rows of one tile (query 0 head 0,
query 0 head 1, ..., query 1 head 0, ...), so that one load of a key block serves them all.

FEW QUERIES, MANY KEYS. Tiles x G x B programs would leave most of the GPU idle, so `splits`
programs share the blocks of one tile. Each leaves a normalised partial result and the log2 of its
softmax sum, and `combine_kernel` weighs them together. Whatever sizes a launch is known to the
host, while starts, lengths and counts stay on the device: nothing waits, and decoding from a cache
that grows in place can be recorded in a CUDA graph.

HEAD WIDTH. A tile is a pair of column ranges, of MAIN = 2^n and REST columns: 64 + 16 for SigLIP's
72, where the next power of two would be 128; REST = 0 where there is nothing left. Strides come in
units of 8 numbers: the compiler then knows that a row starts at 16 bytes, and copies 16 at a time.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1 / math.log(2)
LOWEST = tl.constexpr(-3.0e38)  # "no key yet": unlike -inf it can be subtracted from itself


class Rows(NamedTuple):
    """A packed tensor as a kernel sees it: the strides of rows and heads in units of 8 numbers."""
    x: Tensor
    row: int
    head: int


class Runs(NamedTuple):
    """Where each sample's rows lie: (B,) int32 both."""
    start: Tensor
    length: Tensor


# ---- pieces that the kernels share ----

@triton.jit
def load_tile(x, offsets, inside, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
              MASKED: tl.constexpr):
    """The rows at x + offsets -> (rows, MAIN), (rows, REST); zeros for rows not inside."""
    main = x + offsets[:, None] + tl.arange(0, MAIN)[None, :]
    if MASKED:
        main = tl.load(main, mask=inside[:, None], other=0.0)
    else:
        main = tl.load(main)
    rest = 0.0
    if REST:
        d = MAIN + tl.arange(0, REST)
        rest = x + offsets[:, None] + d[None, :]
        if MASKED:
            rest = tl.load(rest, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        else:
            rest = tl.load(rest, mask=(d < D)[None, :], other=0.0)
    return main, rest


@triton.jit
def store_tile(x, offsets, tile, inside, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    d = tl.arange(0, MAIN)
    main = tile[0].to(x.dtype.element_ty)
    tl.store(x + offsets[:, None] + d[None, :], main, mask=inside[:, None])
    if REST:
        d = MAIN + tl.arange(0, REST)
        rest = tile[1].to(x.dtype.element_ty)
        tl.store(x + offsets[:, None] + d[None, :], rest, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def zero_tile(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    rest = 0.0
    if REST:
        rest = tl.zeros((ROWS, REST), tl.float32)
    return tl.zeros((ROWS, MAIN), tl.float32), rest


@triton.jit
def scale_tile(tile, x, REST: tl.constexpr):
    rest = tile[1]
    if REST:
        rest = rest * x
    return tile[0] * x, rest


@triton.jit
def dot_rows(a, b, REST: tl.constexpr):
    """a b^T, contracted over the head width."""
    s = tl.dot(a[0], b[0].T, input_precision="ieee")
    if REST:
        s = tl.dot(a[1], b[1].T, s, input_precision="ieee")
    return s


@triton.jit
def add_dot(acc, p, x, REST: tl.constexpr):
    """acc + p x, contracted over rows."""
    p = p.to(x[0].dtype)
    rest = acc[1]
    if REST:
        rest = tl.dot(p, x[1], rest, input_precision="ieee")
    return tl.dot(p, x[0], acc[0], input_precision="ieee"), rest


@triton.jit
def packed_rows(start, packed, end, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M packed query rows from `packed` on: their first row, then for each its row and head
    from there, and whether it exists. Small offsets from one 64-bit row keep the pointers cheap."""
    m = packed % GROUP + tl.arange(0, BLOCK_M)
    inside = packed + tl.arange(0, BLOCK_M) < end
    return (start + packed // GROUP).to(tl.int64), m // GROUP, m % GROUP, inside


@triton.jit
def key_blocks(runs, sees, sample, first, last, BLOCK_N: tl.constexpr):
    """-> the run's first row, how many keys row `last` sees, how many full blocks row `first`
    sees, and how many more blocks are in reach of the rows between."""
    seen = tl.load(sees + last)
    full = tl.load(sees + first) // BLOCK_N
    return tl.load(runs.start + sample), seen, full, tl.cdiv(seen, BLOCK_N) - full


@triton.jit
def load_block(x, y, is_text, x_row, y_row, n, group, inside, D: tl.constexpr, MAIN: tl.constexpr,
               REST: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK_N rows of x from x_row + n on, or, for text, of y from y_row + n."""
    row = tl.where(is_text, y.row, x.row) * 8
    head = tl.where(is_text, y.head, x.head) * 8
    start = (tl.where(is_text, y_row, x_row) + n).to(tl.int64)
    pointer = tl.where(is_text, y.x, x.x) + start * row + group * head
    return load_tile(pointer, tl.arange(0, BLOCK_N) * row, inside, D, MAIN, REST, MASKED)


@triton.jit
def zero_rows_in_no_run(x, y, lse, row_heads, heads, runs, samples, D: tl.constexpr,
                        MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr):
    """In x, in y and in lse (-inf) unless they are None. The programs of one grid layer share the
    rows, BLOCK at a time; most have nothing to write."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    zeros = zero_tile(BLOCK, MAIN, REST)
    for first in range(program * BLOCK, row_heads, programs * BLOCK):
        at = first + tl.arange(0, BLOCK)
        absent = (at < row_heads) & ~in_a_run(at // heads, runs, samples, BLOCK)
        store_tile(x, at.to(tl.int64) * D, zeros, absent, D, MAIN, REST)
        if y is not None:
            store_tile(y, at.to(tl.int64) * D, zeros, absent, D, MAIN, REST)
        if lse is not None:
            tl.store(lse + at, -float("inf"), mask=absent)


@triton.jit
def in_a_run(row, runs, samples, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.int32)
    for b in range(0, samples, 64):  # 64 samples at once, or the loads would wait for each other
        sample = b + tl.arange(0, 64)
        start = tl.load(runs.start + sample, mask=sample < samples, other=0)[None, :]
        end = start + tl.load(runs.length + sample, mask=sample < samples, other=0)[None, :]
        found |= tl.max(((row[:, None] >= start) & (row[:, None] < end)).to(tl.int32), 1)
    return found > 0


# ---- forward ----

@triton.jit(do_not_specialize=["rows", "samples", "splits"])
def forward_kernel(q, k_visual, v_visual, k_text, v_text, query, visual, text, sees_visual,
                   sees_text, out, lse, rows, samples, splits, scale_log2,
                   D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, GROUP: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (splits, rows, H, D), lse (splits, rows, H): log2 of each row's softmax sum."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see most keys: they go first
    group = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * GROUP
    sample = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    if sample == samples:
        zero_rows_in_no_run(out, None, lse, rows * heads, heads, query, samples, D, MAIN, REST, 16)
        return
    end = tl.load(query.length + sample) * GROUP
    if tile * BLOCK_M >= end:
        return
    start = tl.load(query.start + sample)
    row, r, h, inside = packed_rows(start, tile * BLOCK_M, end, GROUP, BLOCK_M)
    last = start + (tl.minimum((tile + 1) * BLOCK_M, end) - 1) // GROUP
    q_offsets = (r * q.row + h * q.head) * 8
    q_tile = load_tile(q.x + (row * q.row + group * GROUP * q.head) * 8, q_offsets, inside,
                       D, MAIN, REST, True)
    visual_row, visual_seen, visual_full, visual_masked = key_blocks(
        visual, sees_visual, sample, row, last, BLOCK_N)
    text_row, text_seen, text_full, text_masked = key_blocks(
        text, sees_text, sample, row, last, BLOCK_N)

    # Blocks are counted over both runs: first all full ones, then the masked ones.
    full = visual_full + text_full
    blocks = full + visual_masked + text_masked
    begin, stop = split * blocks // splits, (split + 1) * blocks // splits
    acc = zero_tile(BLOCK_M, MAIN, REST)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(2):
        low = tl.maximum(begin, full) - full if MASKED else begin
        high = stop - full if MASKED else tl.minimum(stop, full)
        of_visual = visual_masked if MASKED else visual_full
        if low < high:  # a pipelined loop that may run zero times makes ptxas serialise wgmma
            for i in range(low, high):
                is_text = i >= of_visual
                block = i - tl.where(is_text, of_visual, 0)
                if MASKED:
                    block += tl.where(is_text, text_full, visual_full)
                n = block * BLOCK_N + tl.arange(0, BLOCK_N)
                real = n < tl.where(is_text, text_seen, visual_seen)
                k = load_block(k_visual, k_text, is_text, visual_row, text_row, block * BLOCK_N,
                               group, real, D, MAIN, REST, BLOCK_N, MASKED)
                v = load_block(v_visual, v_text, is_text, visual_row, text_row, block * BLOCK_N,
                               group, real, D, MAIN, REST, BLOCK_N, MASKED)
                s = dot_rows(q_tile, k, REST)
                if MASKED:
                    sees = tl.where(is_text, sees_text, sees_visual) + row + r
                    sees = tl.load(sees, mask=inside, other=0)
                    s = tl.where(n[None, :] < sees[:, None], s, -float("inf"))
                new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
                p = tl.exp2(s * scale_log2 - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(p, 1)
                acc = add_dot(scale_tile(acc, shrink[:, None], REST), p, v, REST)
                top = new_top

    at = (split.to(tl.int64) * rows + row) * heads + group * GROUP
    weight = 1 / tl.where(total > 0, total, 1)[:, None]  # a row that saw nothing: 0, and lse -inf
    store_tile(out + at * D, (r * heads + h) * D, scale_tile(acc, weight, REST), inside,
               D, MAIN, REST)
    tl.store(lse + at + r * heads + h, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["row_heads", "samples", "splits"])
def combine_kernel(partial, partial_lse, out, lse, query, row_heads, heads, samples, splits,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
                   BLOCK_R: tl.constexpr):
    """out = sum of 2^(lse_s - lse) partial_s, with lse = log2 of the sum of 2^lse_s. Rows in no run
    get zeros: nobody has written their partial results."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.arange(0, BLOCK_S)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = at < row_heads
    real = inside & in_a_run(at // heads, query, samples, BLOCK_R)
    places = split * row_heads.to(tl.int64) + at[None, :]  # (BLOCK_S, BLOCK_R)
    real = (split < splits) & real[None, :]
    each = tl.load(partial_lse + places, mask=real, other=-float("inf"))
    top = tl.maximum(tl.max(each, 0), LOWEST)
    weight = tl.exp2(each - top[None, :])
    total = tl.sum(weight, 0)
    x = tl.load(partial + places[:, :, None] * D + d[None, :, :],
                mask=real[:, :, None] & (d < D)[None, :, :], other=0.0)
    result = tl.sum(x * weight[:, :, None], 0) / tl.where(total > 0, total, 1)[:, None]
    tl.store(out + at[:, None] * D + d, result.to(out.dtype.element_ty),
             mask=inside[:, None] & (d < D))
    tl.store(lse + at, top + tl.log2(total), mask=inside)


# ---- tile sizes ----

class Tile(NamedTuple):
    capability: int  # the oldest GPU it is for: 80 Ampere, 89 Ada, 90 Hopper
    D: int           # the widest head it is for
    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int


# The launcher takes the first entry for the GPU's generation that fits its shared memory. Chosen by
# what the compiler makes of them (README.md: no spills, wgmma not serialised); no GPU has measured
# them yet. Three stages: with two, the next block's copy is issued at the loop's bottom, too late.
FORWARD = [Tile(90, 80, 128, 128, 8, 3), Tile(90, 128, 128, 64, 8, 3),
           Tile(80, 128, 128, 64, 8, 3), Tile(80, 256, 64, 64, 4, 2)]
# Few query rows, as in decoding: 16 are the least that tensor cores multiply, and blocks of 32
# share a sequence out more evenly than blocks of 64.
FORWARD_FEW = [Tile(90, 256, 16, 32, 4, 3), Tile(90, 256, 16, 64, 4, 2),
               Tile(89, 256, 16, 32, 2, 3),
               Tile(80, 256, 16, 32, 4, 3), Tile(80, 256, 16, 64, 4, 2)]
SMALL = Tile(80, 256, 16, 32, 4, 1)  # fits everywhere; and float32 has no tensor cores to feed
FEW = 16                             # packed query rows up to which a call counts as "few"


def forward_rows(tile: Tile) -> int:
    """Rows of q, k and v that a program keeps in shared memory."""
    return tile.BLOCK_M + 2 * tile.stages * tile.BLOCK_N


def fitting_tiles(tiles: list[Tile], rows, q: Tensor) -> list[Tile]:
    """The entries for q's GPU and head width, given rows(tile) of shared memory; never none."""
    _, capability, memory = device_limits(q.device)
    D = q.shape[-1]
    room = (memory - 2048) // (sum(column_split(D)) * q.element_size())
    fit = [tile for tile in tiles
           if tile.capability <= capability and D <= tile.D and rows(tile) <= room]
    if not fit or q.element_size() != 2:
        return [SMALL]
    newest = max(tile.capability for tile in fit)
    return [tile for tile in fit if tile.capability == newest]


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int, int]:
    """-> multiprocessors, compute capability x 10, bytes of shared memory a program can have."""
    if device.type != "cuda":
        return 1, 80, 2 ** 20  # the interpreter
    limits = torch.cuda.get_device_properties(device)
    capability = 10 * limits.major + limits.minor
    return limits.multi_processor_count, capability, limits.shared_memory_per_block_optin


@functools.cache
def column_split(D: int) -> tuple[int, int]:
    """-> MAIN, REST: powers of two, or REST = 0, that D columns fit into."""
    main = 2 ** (D.bit_length() - 1)
    return main, (max(16, triton.next_power_of_2(D - main)) if D > main else 0)


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


def program_places(tile: Tile, rows, q: Tensor) -> int:
    """How many programs the GPU runs at once: two a multiprocessor where shared memory allows."""
    processors, _, memory = device_limits(q.device)
    needed = rows(tile) * sum(column_split(q.shape[-1])) * q.element_size()
    return processors * max(1, min(2, memory // needed))


# ---- launch ----

def rows_of(x: Tensor) -> Rows:
    """Any strides of rows and heads will do, but for those that would split 8 numbers."""
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    return Rows(x, x.stride(0) // 8, x.stride(1) // 8)


def runs_of(tables: list[Tensor]) -> list[Runs]:
    """-> query, visual, text."""
    return [Runs(*tables[i:i + 2]) for i in (0, 2, 4)]


def sizes(D: int, GROUP: int, tile: Tile) -> dict:
    """What a kernel is compiled for."""
    MAIN, REST = column_split(D)
    return dict(D=D, MAIN=MAIN, REST=REST, GROUP=GROUP, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
                num_warps=tile.warps, num_stages=tile.stages)


def splits_for(tile: Tile, q: Tensor, programs: int, max_lengths: list[int]) -> int:
    blocks = sum(triton.cdiv(length, tile.BLOCK_N) for length in max_lengths[1:])
    return choose_splits(programs, blocks, program_places(tile, forward_rows, q))


def launch_forward(q, keys, tables, max_lengths, scale, tile=None, splits=None):
    """The op `attend` on a device. keys: k_visual, v_visual, k_text, v_text; tile and splits
    override the choice."""
    (N, H, D), G, B = q.shape, keys[0].shape[1], len(tables[0])
    packed = max_lengths[0] * (H // G)
    if not B or not packed:
        return torch.zeros_like(q), q.new_full((N, H), -math.inf, dtype=torch.float32)
    tile = tile or fitting_tiles(FORWARD_FEW if packed <= FEW else FORWARD, forward_rows, q)[0]
    tiles = triton.cdiv(packed, tile.BLOCK_M)
    splits = splits or splits_for(tile, q, tiles * G * B, max_lengths)

    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (N, H), dtype=torch.float32)
    into, into_lse = out, lse
    if splits > 1:
        into = q.new_empty((splits, N, H, D), dtype=torch.float32)
        into_lse = q.new_empty((splits, N, H), dtype=torch.float32)
    runs = runs_of(tables)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[tiles, G, B * splits + (splits == 1)](
            rows_of(q), *map(rows_of, keys), *runs, *tables[6:8], into, into_lse, N, B, splits,
            scale * LOG2_E, **sizes(D, H // G, tile))
        if splits > 1:
            BLOCK_S = triton.next_power_of_2(splits)
            BLOCK_R = max(1, 32 // BLOCK_S)
            combine_kernel[triton.cdiv(N * H, BLOCK_R),](
                into, into_lse, out, lse, runs[0], N * H, H, B, splits, D=D,
                BLOCK_D=triton.next_power_of_2(D), BLOCK_S=BLOCK_S, BLOCK_R=BLOCK_R)
    return out, lse
