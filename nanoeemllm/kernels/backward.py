"""The gradients of forward.py, deterministic: one program writes each row, without atomics.

With s = scale q k^T, p = softmax(s), o = p v and a gradient do of o (FlashAttention-2, Dao 2023,
algorithm 2):

    delta = rowsum(do o)    dp = do v^T    ds = p (dp - delta)
    dq = scale ds k         dk = scale ds^T q                     dv = p^T do

p is not kept: s and the forward's log2 of each softmax sum give it back. `delta_kernel` comes
first, then `query_kernel`, a tile of queries that walks the keys as the forward does, and
`keys_kernel`, a tile of keys, visual or text, that walks the queries. What a query sees is a
prefix of a run, so the queries that see a key are a suffix of theirs, from `first` on: those
before it are never loaded.
"""

import torch
import triton
import triton.language as tl
from triton.language import constexpr

from .forward import (LOG2_E, Place, add_dot, begin_walk, choose, dot_rows, inputs_of, load_block,
                      load_rows, query_place, row_heads, rows_of, store_rows, zero_rows_in_no_run,
                      zero_tile)
from .tiles import KEYS, QUERY, choose_tile, sizes


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(out, dout, delta, rows, heads, D: constexpr, ROWS: constexpr):
    """delta = rowsum(do o) = rowsum(p dp): what the softmax's normalisation takes from ds."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = Place(0, 0, at // heads, at % heads, at < rows * heads)
    o = load_rows(out, place, D)
    do = load_rows(dout, place, D)
    result = tl.zeros((ROWS,), tl.float32)
    for PART in tl.static_range(len(o)):
        result += tl.sum(o[PART].to(tl.float32) * do[PART].to(tl.float32), 1)
    tl.store(delta + at, result, mask=place.inside)


@triton.jit
def load_queries(q, dout, lse, delta, place, heads, D: constexpr):
    """-> tiles of q and do, (rows,) log2 of softmax sums (inf where no row is: p = 0) and delta."""
    at = row_heads(place, heads)
    return (load_rows(q, place, D), load_rows(dout, place, D),
            tl.load(lse + at, mask=place.inside, other=float("inf")),
            tl.load(delta + at, mask=place.inside, other=0.0))


@triton.jit(do_not_specialize=["rows", "samples"])
def query_kernel(q, query, visual, text, dout, lse, delta, dq, rows, samples, scale,
                 D: constexpr, GROUP: constexpr, OWN: constexpr, STEP: constexpr):
    """dq (rows, H, D), on the forward's walk."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    sample = tl.program_id(2)
    if sample == samples:
        zero_rows_in_no_run((dq,), None, rows, 1, heads, query, samples, D)
        return
    end = tl.load(query.length + sample) * GROUP
    if tile * OWN >= end:
        return
    queries, of_visual, of_text = begin_walk(query, visual, text, sample, group, tile * OWN, end,
                                             GROUP, OWN, STEP)
    q_tile, do, row_lse, row_delta = load_queries(q, dout, lse, delta, queries, heads, D)
    acc = zero_tile(OWN, D)
    for MASKED in tl.static_range(2):
        blocks = of_visual.full + of_text.full
        if MASKED:
            blocks = of_visual.masked + of_text.masked
        if blocks > 0:
            for i in range(0, blocks):
                k, v, mask = load_block(i, queries, of_visual, of_text, D, STEP, MASKED)
                p = tl.exp2(dot_rows(q_tile, k) * (scale * LOG2_E) - row_lse[:, None])
                if MASKED:
                    p = tl.where(mask, p, 0.0)
                ds = p * (dot_rows(do, v) - row_delta[:, None])
                acc = add_dot(acc, ds, k)
    store_rows(dq, queries, [x * scale for x in acc], D)


@triton.jit(do_not_specialize=["visual_rows", "text_rows", "samples", "visual_tiles"])
def keys_kernel(q, query, visual, text, first_visual, first_text, dout, lse, delta, d_visual,
                d_text, visual_rows, text_rows, samples, visual_tiles, scale, D: constexpr,
                GROUP: constexpr, OWN: constexpr, STEP: constexpr):
    """d_visual, d_text: pairs of dk, dv (rows, G, D). A program has a tile of keys, the first
    `visual_tiles` of the visual run and the others of the text run, and every query that sees any
    of it. Scores are transposed, (keys, queries)."""
    groups = tl.num_programs(1)
    group = tl.program_id(1)
    sample = tl.program_id(2)
    is_text = tl.program_id(0) >= visual_tiles
    if sample == samples:
        zero_rows_in_no_run(d_visual, None, visual_rows, 1, groups, visual, samples, D)
        zero_rows_in_no_run(d_text, None, text_rows, 1, groups, text, samples, D)
        return
    begin = (tl.program_id(0) - tl.where(is_text, visual_tiles, 0)) * OWN
    length = tl.load(tl.where(is_text, text.length, visual.length) + sample) - begin
    if length <= 0:
        return
    row = tl.load(tl.where(is_text, text.start, visual.start) + sample) + begin
    n = tl.arange(0, OWN)
    keys = Place(row.to(tl.int64), group, n, 0, n < length)
    k = load_rows(choose(is_text, visual.k, text.k), keys, D)
    v = load_rows(choose(is_text, visual.v, text.v), keys, D)

    # The first key's first query is the tile's. The whole loop is masked: two loops, one of them
    # without a mask, had no fewer instructions, and on Triton 3.6 ptxas serialised their wgmma.
    first = tl.where(is_text, first_text, first_visual) + row
    low = tl.load(first) * GROUP
    first = tl.load(first + n, mask=keys.inside, other=0)
    start = tl.load(query.start + sample)
    end = tl.load(query.length + sample) * GROUP
    acc_k = zero_tile(OWN, D)
    acc_v = zero_tile(OWN, D)
    if low < end:
        for packed in range(low, end, STEP):
            queries = query_place(start, packed, end, group, GROUP, STEP)
            q_tile, do, row_lse, row_delta = load_queries(q, dout, lse, delta, queries,
                                                          groups * GROUP, D)
            p = tl.exp2(dot_rows(k, q_tile) * (scale * LOG2_E) - row_lse[None, :])
            p = tl.where(first[:, None] <= (queries.row - start + queries.r)[None, :], p, 0.0)
            acc_v = add_dot(acc_v, p, do)
            ds = p * (dot_rows(v, do) - row_delta[None, :])
            acc_k = add_dot(acc_k, ds, q_tile)
    store_rows(choose(is_text, d_visual[0], d_text[0]), keys, [x * scale for x in acc_k], D)
    store_rows(choose(is_text, d_visual[1], d_text[1]), keys, acc_v, D)


def launch_backward(dout, out, lse, q, keys, tables, max_lengths, scale, needed, grads,
                    query_tile=None, keys_tile=None):
    """The op `attend_backward` on a device: fills grads (of q, k_visual, v_visual, k_text, v_text),
    as far as needed (q, visual pair, text pair). Tiles override the choice."""
    (N, H, D), G, B = q.shape, keys[0].shape[1], len(tables[0])
    query_tile = query_tile or choose_tile(QUERY, q)
    keys_tile = keys_tile or choose_tile(KEYS, q)
    inputs, dout, delta = inputs_of(q, keys, tables), rows_of(dout), torch.empty_like(lse)
    dq, *d_keys = map(rows_of, grads)
    tiles = [triton.cdiv(length, keys_tile.own) if need else 0
             for length, need in zip(max_lengths[1:], needed[1:])]
    with torch.cuda.device_of(q):
        delta_kernel[triton.cdiv(N * H, 32),](rows_of(out), dout, delta, N, H, D=D, ROWS=32)
        if needed[0]:
            tiles_of_queries = triton.cdiv(max_lengths[0] * (H // G), query_tile.own)
            query_kernel[max(1, tiles_of_queries), G, B + 1](
                *inputs, dout, lse, delta, dq, N, B, scale, **sizes(query_tile, D, H // G))
        if needed[1] or needed[2]:  # one layer zeroes the rows in no run, so there is a tile
            keys_kernel[max(1, sum(tiles)), G, B + 1](
                *inputs, *tables[8:10], dout, lse, delta, tuple(d_keys[:2]), tuple(d_keys[2:]),
                len(grads[1]), len(grads[3]), B, tiles[0], scale, **sizes(keys_tile, D, H // G))
