"""The gradients of forward.py, deterministic: one program writes each row, without atomics.

With s = scale q k^T, p = softmax(s), o = p v and a gradient do of o (FlashAttention-2, Dao 2023,
algorithm 2):

    delta = rowsum(do o)    dp = do v^T    ds = p (dp - delta)
    dq = scale ds k         dk = scale ds^T q                     dv = p^T do

p is not kept: s and the forward's log2 of each softmax sum give it back. `delta_kernel` comes
first, then `query_kernel`, a tile of queries that walks the keys as the forward does, and
`keys_kernel`, a tile of keys, visual or text, that walks the queries. What a query sees is a
prefix of a run, so the queries that see a key are a suffix of theirs, from `first` on: those
before it are never loaded, and the mask ends at the first query that sees the tile's last key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import (LOG2_E, Tile, add_dot, column_split, dot_rows, fitting_tiles,
                      key_blocks, load_block, load_tile, packed_rows, rows_of, runs_of,
                      scale_tile, sizes, store_tile, zero_rows_in_no_run, zero_tile)


@triton.jit(do_not_specialize=["row_heads"])
def delta_kernel(out, dout, delta, row_heads, D: tl.constexpr, MAIN: tl.constexpr,
                 REST: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta = rowsum(do o) = rowsum(p dp): what the softmax's normalisation takes from ds."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = at < row_heads
    o = load_tile(out, at * D, inside, D, MAIN, REST, True)
    do = load_tile(dout, at * D, inside, D, MAIN, REST, True)
    result = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if REST:
        result += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    tl.store(delta + at, result, mask=inside)


@triton.jit(do_not_specialize=["rows", "samples"])
def query_kernel(q, k_visual, v_visual, k_text, v_text, query, visual, text, sees_visual,
                 sees_text, dout, lse, delta, dq, rows, samples, scale, scale_log2,
                 D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, GROUP: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq (rows, H, D), on the forward's walk."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * GROUP
    sample = tl.program_id(2)
    if sample == samples:
        zero_rows_in_no_run(dq, None, None, rows * heads, heads, query, samples, D, MAIN, REST, 16)
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
    at, offsets = row * heads + group * GROUP, r * heads + h
    do = load_tile(dout + at * D, offsets * D, inside, D, MAIN, REST, True)
    row_lse = tl.load(lse + at + offsets, mask=inside, other=0.0)
    row_delta = tl.load(delta + at + offsets, mask=inside, other=0.0)
    visual_row, visual_seen, visual_full, visual_masked = key_blocks(
        visual, sees_visual, sample, row, last, BLOCK_N)
    text_row, text_seen, text_full, text_masked = key_blocks(
        text, sees_text, sample, row, last, BLOCK_N)

    acc = zero_tile(BLOCK_M, MAIN, REST)
    for MASKED in tl.static_range(2):
        of_visual = visual_masked if MASKED else visual_full
        blocks = of_visual + (text_masked if MASKED else text_full)
        if blocks > 0:
            for i in range(0, blocks):
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
                p = tl.exp2(dot_rows(q_tile, k, REST) * scale_log2 - row_lse[:, None])
                if MASKED:
                    sees = tl.where(is_text, sees_text, sees_visual) + row + r
                    sees = tl.load(sees, mask=inside, other=0)
                    p = tl.where(n[None, :] < sees[:, None], p, 0.0)
                ds = p * (dot_rows(do, v, REST) - row_delta[:, None])
                acc = add_dot(acc, ds, k, REST)
    store_tile(dq + at * D, offsets * D, scale_tile(acc, scale, REST), inside, D, MAIN, REST)


@triton.jit(do_not_specialize=["visual_rows", "text_rows", "samples", "visual_tiles"])
def keys_kernel(q, k_visual, v_visual, k_text, v_text, query, visual, text, first_visual,
                first_text, dout, lse, delta, dk_visual, dv_visual, dk_text, dv_text, visual_rows,
                text_rows, samples, visual_tiles, scale, scale_log2,
                D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, GROUP: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk, dv (rows, G, D): a tile of keys, of the visual run for the first `visual_tiles` programs
    and of the text run for the others, and every query that sees any of it. Scores are transposed,
    (keys, queries)."""
    groups = tl.num_programs(1)
    group = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2)
    is_text = tl.program_id(0) >= visual_tiles
    if sample == samples:
        if visual_tiles > 0:
            zero_rows_in_no_run(dk_visual, dv_visual, None, visual_rows * groups, groups, visual,
                                samples, D, MAIN, REST, 16)
        if visual_tiles < tl.num_programs(0):
            zero_rows_in_no_run(dk_text, dv_text, None, text_rows * groups, groups, text, samples,
                                D, MAIN, REST, 16)
        return
    begin = (tl.program_id(0) - tl.where(is_text, visual_tiles, 0)) * BLOCK_N
    length = tl.load(tl.where(is_text, text.length, visual.length) + sample) - begin
    if length <= 0:
        return
    key_row = tl.load(tl.where(is_text, text.start, visual.start) + sample) + begin
    n = tl.arange(0, BLOCK_N)
    k = load_block(k_visual, k_text, is_text, key_row, key_row, 0, group, n < length,
                   D, MAIN, REST, BLOCK_N, True)
    v = load_block(v_visual, v_text, is_text, key_row, key_row, 0, group, n < length,
                   D, MAIN, REST, BLOCK_N, True)

    # Queries before `low` see no key of the tile, those before `middle` perhaps a part of it, the
    # rest all of it.
    first = tl.where(is_text, first_text, first_visual) + key_row
    start = tl.load(query.start + sample)
    end = tl.load(query.length + sample) * GROUP
    low = tl.load(first) * GROUP
    some = tl.load(first + tl.minimum(BLOCK_N, length) - 1) * GROUP - low
    middle = low + tl.cdiv(some, BLOCK_M) * BLOCK_M
    first = tl.load(first + n, mask=n < length, other=0)

    heads = groups * GROUP
    acc_k = zero_tile(BLOCK_N, MAIN, REST)
    acc_v = zero_tile(BLOCK_N, MAIN, REST)
    for FULL in tl.static_range(2):
        from_packed = middle if FULL else low
        to_packed = end if FULL else middle
        if from_packed < to_packed:
            for packed in range(from_packed, to_packed, BLOCK_M):
                row, r, h, inside = packed_rows(start, packed, end, GROUP, BLOCK_M)
                q_tile = load_tile(q.x + (row * q.row + group * GROUP * q.head) * 8,
                                   (r * q.row + h * q.head) * 8, inside, D, MAIN, REST, True)
                at, offsets = row * heads + group * GROUP, r * heads + h
                do = load_tile(dout + at * D, offsets * D, inside, D, MAIN, REST, True)
                row_lse = tl.load(lse + at + offsets, mask=inside, other=float("inf"))  # p = 0
                row_delta = tl.load(delta + at + offsets, mask=inside, other=0.0)
                p = tl.exp2(dot_rows(k, q_tile, REST) * scale_log2 - row_lse[None, :])
                if not FULL:
                    p = tl.where(first[:, None] <= (row - start + r)[None, :], p, 0.0)
                acc_v = add_dot(acc_v, p, do, REST)
                ds = p * (dot_rows(v, do, REST) - row_delta[None, :])
                acc_k = add_dot(acc_k, ds, q_tile, REST)

    at = (key_row.to(tl.int64) * groups + group) * D
    dk = tl.where(is_text, dk_text, dk_visual) + at
    dv = tl.where(is_text, dv_text, dv_visual) + at
    offsets = n * groups * D
    store_tile(dk, offsets, scale_tile(acc_k, scale, REST), n < length, D, MAIN, REST)
    store_tile(dv, offsets, acc_v, n < length, D, MAIN, REST)


# ---- tile sizes: as in forward.py, the first that fits ----

QUERY = [Tile(90, 128, 128, 64, 8, 3), Tile(90, 128, 128, 64, 8, 2),
         Tile(89, 128, 128, 32, 8, 2), Tile(89, 256, 64, 32, 4, 2),
         Tile(80, 128, 128, 32, 8, 3), Tile(80, 256, 64, 32, 4, 3)]
KEYS = [Tile(90, 128, 32, 128, 8, 3), Tile(90, 128, 32, 128, 8, 2),
        Tile(80, 128, 32, 64, 8, 3), Tile(80, 256, 32, 64, 8, 2)]


def query_rows(tile: Tile) -> int:
    """Rows of q, do, k and v that a program of query_kernel keeps in shared memory."""
    return 2 * tile.BLOCK_M + 2 * tile.stages * tile.BLOCK_N


def key_rows(tile: Tile) -> int:
    return 2 * tile.BLOCK_N + 2 * tile.stages * tile.BLOCK_M


# ---- launch ----

def launch_backward(dout, out, lse, q, keys, tables, max_lengths, scale, needed, grads,
                    query_tile=None, keys_tile=None):
    """The op `attend_backward` on a device: fills grads (of q, k_visual, v_visual, k_text, v_text),
    as far as needed (q, visual pair, text pair). Tiles override the choice."""
    (N, H, D), G, B = q.shape, keys[0].shape[1], len(tables[0])
    longest_query, longest_visual, longest_text = max_lengths
    if not B or not longest_query:
        for grad in grads:
            grad.zero_()
        return
    query_tile = query_tile or fitting_tiles(QUERY, query_rows, q)[0]
    keys_tile = keys_tile or fitting_tiles(KEYS, key_rows, q)[0]
    inputs = (rows_of(q), *map(rows_of, keys), *runs_of(tables))
    dout, delta = dout.contiguous(), torch.empty_like(lse)
    MAIN, REST = column_split(D)
    tiles = [0, 0]
    for i, longest in enumerate((longest_visual, longest_text)):
        if needed[1 + i]:
            tiles[i] = triton.cdiv(longest, keys_tile.BLOCK_N)
            if not longest:  # no program would write them
                grads[1 + 2 * i].zero_()
                grads[2 + 2 * i].zero_()
    with torch.cuda.device_of(q):
        delta_kernel[triton.cdiv(N * H, 32),](out, dout, delta, N * H, D=D, MAIN=MAIN, REST=REST,
                                              BLOCK_M=32)
        if needed[0]:
            grid = triton.cdiv(longest_query * (H // G), query_tile.BLOCK_M), G, B + 1
            query_kernel[grid](*inputs, *tables[6:8], dout, lse, delta, grads[0], N, B,
                               scale, scale * LOG2_E, **sizes(D, H // G, query_tile))
        if sum(tiles):
            keys_kernel[sum(tiles), G, B + 1](
                *inputs, *tables[8:10], dout, lse, delta, *grads[1:], len(keys[0]), len(keys[2]),
                B, tiles[0], scale, scale * LOG2_E, **sizes(D, H // G, keys_tile))
