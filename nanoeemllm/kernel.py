"""The attention rule of attention.py as Triton kernels: forward, split-key decoding, backward.

WHAT IS COMPUTED. Every sample owns a run of query rows and two runs of keys and values, visual and text, each
given by (start, length) into its own packed tensor, and every row has a position. A query sees a key of its
sample iff the key's position is <= its own. Keys are sorted by position within each run, so what a query sees is
a prefix of the visual run and a prefix of the text run. Text, a picture, text, another picture, text:

                     visual keys         text keys
    query position   2 3 4   7 8 9       0 1   5 6   10 11        a tile of queries 0 1 5 6 and a tile of 10 11:
         0           . . .   . . .       1 .   . .    .  .
         1           . . .   . . .       1 1   . .    .  .            visual         text
         5           1 1 1   . . .       1 1   1 .    .  .        |----|          |##|
         6           1 1 1   . . .       1 1   1 1    .  .        |####|          |####|
        10           1 1 1   1 1 1       1 1   1 1    1  .        |::::::::::|    |:::::#|
        11           1 1 1   1 1 1       1 1   1 1    1  1        |::::::::::|    |::::::|

HOW. One program takes a tile of BLOCK_M query rows and walks the two runs in blocks of BLOCK_N keys. Two searches
on the sorted positions tell it, for each run, how many keys its *first* query sees (every row of the tile sees
those: `::` above, no mask), and how many its *last* query sees (the staircase between the two: `##`, masked). What
lies beyond is never loaded. The running softmax is the one of FlashAttention (Dao 2023, algorithm 1), in base 2.

Grouped heads: the H // G query heads that share a key head are packed into one tile as rows (query 0 head 0,
query 0 head 1, ..., query 1 head 0, ...), so that a block of keys is loaded once for all of them.

Few queries, many keys: the programs (tiles x G x B) would not fill the GPU, so `splits` programs share the keys of
one tile. Each leaves a normalised partial result and the log2 of its softmax sum; `combine_kernel` weighs them
together. Everything that sizes a launch is known to the host; lengths and positions stay on the device, hence no
synchronisation, and decoding from a cache whose lengths grow in place can be recorded in a CUDA graph.

Backward: `delta_kernel`, then one kernel with a tile of queries that walks the keys (dq), and one with a tile of
keys that walks the queries (dk, dv; launched for the visual and for the text run). Each row is written by one
program, without atomics: the same inputs give the same bits.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoeemllm.attention import Run, check_attention_inputs

LOG2_E = 1 / math.log(2)
LOWEST = tl.constexpr(-3.0e38)  # stands for "no key yet": unlike -inf it can be subtracted from itself
FAR = tl.constexpr(2 ** 31 - 1)  # a position beyond every query
BEFORE = tl.constexpr(-(2 ** 31))  # a position before every key


class Rows(NamedTuple):
    """A run of queries as a kernel sees it."""
    start: Tensor
    length: Tensor
    position: Tensor


class Keys(NamedTuple):
    """A run of keys as a kernel sees it, with the strides of the two tensors in elements."""
    k: Tensor
    v: Tensor
    k_row: int
    k_head: int
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
    position = tl.load(query.position + row + r, mask=inside, other=BEFORE)
    last = start + (tl.minimum((tile + 1) * BLOCK_M, end) - 1) // GROUP
    return row, r, h, inside, position, tl.load(query.position + row), tl.load(query.position + last)


# ---- forward ----

@triton.jit
def see(q, q_position, acc, top, total, keys, group, start, low, high, scale_log2,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Carry the running softmax over keys low..high: acc = sum of 2^(s - top) v, total = sum of 2^(s - top)."""
    for n in range(low, high, BLOCK_N):
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


@triton.jit
def see_run(q, q_position, first, last, acc, top, total, keys, sample, group, split, splits, scale_log2,
            D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    start, low, middle, high = key_range(keys, sample, first, last, split, splits, BLOCK_N)
    acc, top, total = see(q, q_position, acc, top, total, keys, group, start, low, middle, scale_log2,
                          D, BLOCK_D, BLOCK_N, False)
    return see(q, q_position, acc, top, total, keys, group, start, middle, high, scale_log2,
               D, BLOCK_D, BLOCK_N, True)


@triton.jit(do_not_specialize=["rows", "splits"])
def forward_kernel(q, q_row, q_head, query, visual, text, out, lse, rows, splits, scale_log2,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (splits, rows, H, D), lse (splits, rows, H): log2 of each row's softmax sum."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see most keys: they start first
    group = tl.program_id(1)
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


# ---- backward. With s = scale q k^T, p = softmax(s), o = p v, and do the gradient of o:
#          dv = p^T do     dp = do v^T     ds = p (dp - delta), delta = rowsum(do o)     dq = scale ds k     dk = scale ds^T q

@triton.jit(do_not_specialize=["rows_heads"])
def delta_kernel(out, dout, delta, rows_heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta = rowsum(do o) = rowsum(p dp): what the softmax's normalisation takes back from ds."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = load_tile(out, at * D, at < rows_heads, D, BLOCK_D, True).to(tl.float32)
    do = load_tile(dout, at * D, at < rows_heads, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta + at, tl.sum(o * do, 1), mask=at < rows_heads)


@triton.jit
def see_backward(q, do, lse, delta, q_position, dq, keys, group, start, low, high, scale_log2,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    for n in range(low, high, BLOCK_N):
        k, v = load_keys(keys, start + n, group, high - n, D, BLOCK_D, BLOCK_N, MASKED)
        s = tl.dot(q, k.T, input_precision="ieee")
        p = tl.exp2(s * scale_log2 - lse[:, None])                                     # p = softmax(s)
        if MASKED:
            p = tl.where(visible(keys, start + n, high - n, q_position, BLOCK_N), p, 0.0)
        dp = tl.dot(do, v.T, input_precision="ieee")                                   # dp = do v^T
        ds = p * (dp - delta[:, None])                                                 # ds = p (dp - delta)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")                     # dq = ds k, scaled at the end
    return dq


@triton.jit
def see_run_backward(q, do, lse, delta, q_position, first, last, dq, keys, sample, group, scale_log2,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    start, low, middle, high = key_range(keys, sample, first, last, 0, 1, BLOCK_N)
    dq = see_backward(q, do, lse, delta, q_position, dq, keys, group, start, low, middle, scale_log2,
                      D, BLOCK_D, BLOCK_N, False)
    return see_backward(q, do, lse, delta, q_position, dq, keys, group, start, middle, high, scale_log2,
                        D, BLOCK_D, BLOCK_N, True)


@triton.jit
def backward_query_kernel(q, q_row, q_head, query, visual, text, dout, lse, delta, dq, scale, scale_log2,
                          D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq (N, H, D), on the forward's walk."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    sample = tl.program_id(2)
    if tile * BLOCK_M >= tl.load(query.length + sample) * GROUP:
        return
    row, r, h, inside, position, first, last = query_tile(query, sample, tile, GROUP, BLOCK_M)
    q_tile = load_tile(q + row * q_row + group * GROUP * q_head, r * q_row + h * q_head, inside, D, BLOCK_D, True)
    at, offsets = row * heads + group * GROUP, r * heads + h
    do = load_tile(dout + at * D, offsets * D, inside, D, BLOCK_D, True)
    row_lse = tl.load(lse + at + offsets, mask=inside, other=0.0)
    row_delta = tl.load(delta + at + offsets, mask=inside, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = see_run_backward(q_tile, do, row_lse, row_delta, position, first, last, acc, visual, sample, group,
                           scale_log2, D, BLOCK_D, BLOCK_N)
    acc = see_run_backward(q_tile, do, row_lse, row_delta, position, first, last, acc, text, sample, group,
                           scale_log2, D, BLOCK_D, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    tl.store(dq + at * D + (offsets * D)[:, None] + d[None, :], (acc * scale).to(dq.dtype.element_ty),
             mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def be_seen(k, v, k_position, dk, dv, q, q_row, q_head, query, dout, lse, delta, group, start, low, high, end, scale_log2,
            D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """Carry dk and dv over packed query rows low..high, of which those before `end` exist. Scores are (keys, queries)."""
    heads = tl.num_programs(1) * GROUP
    for packed in range(low, high, BLOCK_M):
        row, r, h, inside = packed_rows(start, packed, end, GROUP, BLOCK_M)
        q_tile = load_tile(q + row * q_row + group * GROUP * q_head, r * q_row + h * q_head, inside, D, BLOCK_D, True)
        at, offsets = row * heads + group * GROUP, r * heads + h
        row_lse = tl.load(lse + at + offsets, mask=inside, other=float("inf"))         # p = 0 where there is no row
        s = tl.dot(k, q_tile.T, input_precision="ieee")
        p = tl.exp2(s * scale_log2 - row_lse[None, :])                                 # p^T = softmax(s)^T
        if MASKED:
            q_position = tl.load(query.position + row + r, mask=inside, other=BEFORE)
            p = tl.where(k_position[:, None] <= q_position[None, :], p, 0.0)
        do = load_tile(dout + at * D, offsets * D, inside, D, BLOCK_D, True)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")                    # dv = p^T do
        dp = tl.dot(v, do.T, input_precision="ieee")                                   # dp^T = v do^T
        row_delta = tl.load(delta + at + offsets, mask=inside, other=0.0)
        ds = p * (dp - row_delta[None, :])                                             # ds^T = p^T (dp^T - delta)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")           # dk = ds^T q, scaled at the end
    return dk, dv


@triton.jit
def backward_keys_kernel(q, q_row, q_head, query, keys, dout, lse, delta, dk, dv, scale, scale_log2,
                         D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk, dv (rows, G, D) of one run of keys: a tile of keys, and every query that sees any of it."""
    group = tl.program_id(1)
    sample = tl.program_id(2)
    begin = tl.program_id(0) * BLOCK_N
    length = tl.load(keys.length + sample) - begin
    if length <= 0:
        return
    row = tl.load(keys.start + sample) + begin
    n = tl.arange(0, BLOCK_N)
    k, v = load_keys(keys, row, group, length, D, BLOCK_D, BLOCK_N, True)
    k_position = tl.load(keys.position + row + n, mask=n < length, other=FAR)
    first = tl.load(keys.position + row)
    last = tl.load(keys.position + row + tl.minimum(BLOCK_N, length) - 1)

    # the first `none` queries see no key of the tile, those up to `some` a part of it, the rest all of it
    start = tl.load(query.start + sample)
    queries = tl.load(query.length + sample)
    none = count_visible(query.position + start, 0, queries, first - 1)
    some = count_visible(query.position + start, none, queries, last - 1)
    low, end = none * GROUP, queries * GROUP
    middle = low + tl.cdiv(some * GROUP - low, BLOCK_M) * BLOCK_M
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_k, acc_v = be_seen(k, v, k_position, acc_k, acc_v, q, q_row, q_head, query, dout, lse, delta, group,
                           start, low, middle, end, scale_log2, D, BLOCK_D, GROUP, BLOCK_M, True)
    acc_k, acc_v = be_seen(k, v, k_position, acc_k, acc_v, q, q_row, q_head, query, dout, lse, delta, group,
                           start, middle, end, end, scale_log2, D, BLOCK_D, GROUP, BLOCK_M, False)

    d = tl.arange(0, BLOCK_D)
    at = (row.to(tl.int64) * tl.num_programs(1) + group) * D
    offsets = (n * tl.num_programs(1) * D)[:, None] + d[None, :]
    mask = (n < length)[:, None] & (d < D)[None, :]
    tl.store(dk + at + offsets, (acc_k * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at + offsets, acc_v.to(dv.dtype.element_ty), mask=mask)


# ---- which tile sizes to try: BLOCK_M, BLOCK_N, warps, stages. Chosen once per kernel, head width and dtype ----

FORWARD = [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1)]
FORWARD_FEW = [(16, 64, 4, 3), (16, 128, 4, 2), (64, 64, 4, 3), (16, 32, 4, 2)]
BACKWARD_QUERY = [(64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1)]
BACKWARD_KEYS = [(64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 2), (32, 32, 4, 1)]
FLOAT32 = (16, 32, 4, 1)  # 32-bit products go without tensor cores, in one small tile
FEW = 16                  # packed query rows up to which a call counts as "few queries"


def fitting(configs, arguments, **meta):
    return configs


def tuned(kernel, entries):
    configs = [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in entries]
    if triton.knobs.runtime.interpret:
        configs = configs[:1]
    return triton.autotune(configs, key=["D"], prune_configs_by={"early_config_prune": fitting}, cache_results=True)(kernel)


forward_many, forward_few = tuned(forward_kernel, FORWARD), tuned(forward_kernel, FORWARD_FEW)
backward_query = tuned(backward_query_kernel, BACKWARD_QUERY)
backward_keys = tuned(backward_keys_kernel, BACKWARD_KEYS)


# ---- launches ----

def composite_attention_kernel(q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor, v_text: Tensor,
                               query: Run, visual: Run, text: Run, scale: float | None = None) -> Tensor:
    """attention.composite_attention on a GPU: same arguments, same result."""
    check_attention_inputs(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    runs = [tensor for run in (query, visual, text) for tensor in run[:3]]
    lengths = [run.max_length for run in (query, visual, text)]
    return attend(q, k_visual, v_visual, k_text, v_text, runs, lengths, scale)[0]


@torch.library.custom_op("nanoeemllm::attend", mutates_args=())
def attend(q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor, v_text: Tensor, runs: list[Tensor],
           max_lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """-> out (N, H, D), lse (N, H) float32."""
    q, k_visual, v_visual, k_text, v_text = (_dense_rows(x) for x in (q, k_visual, v_visual, k_text, v_text))
    N, H, D = q.shape
    G, B = k_text.shape[1], len(runs[0])
    out, lse = q.new_zeros(q.shape), q.new_zeros((N, H), dtype=torch.float32)
    if not B or not max_lengths[0]:
        return out, lse
    packed = max_lengths[0] * (H // G)
    kernel = forward_few if packed <= FEW else forward_many
    splits = _splits(triton.cdiv(packed, FEW if packed <= FEW else 64) * G * B, max_lengths[1] + max_lengths[2], q.device)
    query, visual, text = Rows(*runs[:3]), _keys(k_visual, v_visual, runs[3:6]), _keys(k_text, v_text, runs[6:])
    sizes = dict(D=D, BLOCK_D=_block(D))
    into, into_lse = (out, lse) if splits == 1 else (
        q.new_empty((splits, N, H, D), dtype=torch.float32), q.new_full((splits, N, H), -math.inf, dtype=torch.float32))
    kernel[lambda meta: (triton.cdiv(packed, meta["BLOCK_M"]), G, B * splits)](
        q, q.stride(0), q.stride(1), query, visual, text, into, into_lse, N, splits, scale * LOG2_E, GROUP=H // G, **sizes)
    if splits > 1:
        combine_kernel[(N * H,)](into, into_lse, out, lse, N * H, splits, BLOCK_S=triton.next_power_of_2(splits), **sizes)
    return out, lse


@attend.register_fake
def _(q, k_visual, v_visual, k_text, v_text, runs, max_lengths, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("nanoeemllm::attend_backward", mutates_args=())
def attend_backward(dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k_visual: Tensor, v_visual: Tensor,
                    k_text: Tensor, v_text: Tensor, runs: list[Tensor], max_lengths: list[int], scale: float,
                    needed: list[bool]) -> list[Tensor]:
    """-> dq and the gradients of both runs' k and v; where q, the visual or the text run is not needed, empty tensors."""
    inputs = [_dense_rows(x) for x in (q, k_visual, v_visual, k_text, v_text)]
    q, k_visual, v_visual, k_text, v_text = inputs
    N, H, D = q.shape
    G, B = k_text.shape[1], len(runs[0])
    dout, delta = dout.contiguous(), torch.empty_like(lse)
    grads = [x.new_zeros(x.shape if need else 0) for x, need in zip(inputs, needed)]
    if not B or not max_lengths[0]:
        return grads
    query, visual, text = Rows(*runs[:3]), _keys(k_visual, v_visual, runs[3:6]), _keys(k_text, v_text, runs[6:])
    sizes = dict(D=D, BLOCK_D=_block(D))
    delta_kernel[(triton.cdiv(N * H, 32),)](out, dout, delta, N * H, BLOCK_M=32, **sizes)
    common = dict(scale=scale, scale_log2=scale * LOG2_E, GROUP=H // G, **sizes)
    if needed[0]:
        backward_query[lambda meta: (triton.cdiv(max_lengths[0] * (H // G), meta["BLOCK_M"]), G, B)](
            q, q.stride(0), q.stride(1), query, visual, text, dout, lse, delta, grads[0], **common)
    for keys, longest, (dk, dv), need in ((visual, max_lengths[1], grads[1:3], needed[1]),
                                          (text, max_lengths[2], grads[3:5], needed[3])):
        if need and longest:
            backward_keys[lambda meta: (triton.cdiv(longest, meta["BLOCK_N"]), G, B)](
                q, q.stride(0), q.stride(1), query, keys, dout, lse, delta, dk, dv, **common)
    return grads


@attend_backward.register_fake
def _(dout, out, lse, q, k_visual, v_visual, k_text, v_text, runs, max_lengths, scale, needed):
    inputs = (q, k_visual, v_visual, k_text, v_text)
    return [x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needed)]


def _save(ctx, inputs, output):
    *tensors, runs, ctx.max_lengths, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors, *runs)


def _differentiate(ctx, dout, _):
    out, lse, *rest = ctx.saved_tensors
    inputs, runs = rest[:5], rest[5:]
    q, k_visual, v_visual, k_text, v_text = wanted = ctx.needs_input_grad[:5]
    needed = [q, k_visual or v_visual, k_visual or v_visual, k_text or v_text, k_text or v_text]
    grads = attend_backward(dout, out, lse, *inputs, runs, ctx.max_lengths, ctx.scale, needed)
    return *(grad if want else None for grad, want in zip(grads, wanted)), [None] * 9, None, None


attend.register_autograd(_differentiate, setup_context=_save)


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels take any stride of rows and heads, but the numbers of one row lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _keys(k: Tensor, v: Tensor, run: list[Tensor]) -> Keys:
    return Keys(k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1), *run)


def _block(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def _splits(programs: int, keys: int, device) -> int:
    return _even_splits(programs, min(64, keys // 256), 2 * _multiprocessors(device))


@functools.cache
def _even_splits(programs: int, most: int, places: int) -> int:
    """Programs that share one tile's keys: the fewest whose last wave fills the `places` nearly as well as any."""
    def filled(splits):
        waves = programs * splits / places
        return waves / math.ceil(waves)
    choices = range(1, max(1, most) + 1)
    return next(s for s in choices if filled(s) >= 0.85 * max(map(filled, choices)))


@functools.cache
def _multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
