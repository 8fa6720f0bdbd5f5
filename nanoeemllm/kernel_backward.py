"""The gradients of the attention of kernel.py, deterministic: every row is written by one program, without atomics.

With s = scale q k^T, p = softmax(s), o = p v and a gradient do of o (FlashAttention-2, Dao 2023, algorithm 2):

    dv = p^T do     dp = do v^T     ds = p (dp - delta), delta = rowsum(do o)     dq = scale ds k     dk = scale ds^T q

p is not kept: s and the forward's log2 of each softmax sum give it back. `delta_kernel` comes first, then
`backward_query_kernel`, a tile of queries that walks the keys as the forward does, and `backward_keys_kernel`, a tile
of keys that walks the queries, once for the visual run and once for the text run. As the keys that a query sees are a
prefix of their run, the queries that see a key are a suffix of theirs: those before it are never loaded, the mask
ends at the first query that sees the tile's last key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from nanoeemllm.kernel import (FAR, LOG2_E, Tile, block_width, count_visible, dense_rows, kernel_runs, key_range,
                               load_keys, load_tile, packed_rows, query_tile, tuned, visible)


@triton.jit(do_not_specialize=["rows_heads"])
def delta_kernel(out, dout, delta, rows_heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta = rowsum(do o) = rowsum(p dp): what the softmax's normalisation takes back from ds."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = load_tile(out, at * D, at < rows_heads, D, BLOCK_D, True).to(tl.float32)
    do = load_tile(dout, at * D, at < rows_heads, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta + at, tl.sum(o * do, 1), mask=at < rows_heads)


@triton.jit
def see_run_backward(q, do, lse, delta, q_position, first, last, dq, keys, sample, group, scale_log2,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    start, low, middle, high = key_range(keys, sample, first, last, 0, 1, BLOCK_N)
    for MASKED in tl.static_range(2):
        for n in range(middle if MASKED else low, high if MASKED else middle, BLOCK_N):
            k, v = load_keys(keys, start + n, group, high - n, D, BLOCK_D, BLOCK_N, MASKED)
            s = tl.dot(q, k.T, input_precision="ieee")
            p = tl.exp2(s * scale_log2 - lse[:, None])                                  # p = softmax(s)
            if MASKED:
                p = tl.where(visible(keys, start + n, high - n, q_position, BLOCK_N), p, 0.0)
            dp = tl.dot(do, v.T, input_precision="ieee")                                # dp = do v^T
            ds = p * (dp - delta[:, None])                                              # ds = p (dp - delta)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")                  # dq = ds k, scaled at the end
    return dq


@triton.jit
def backward_query_kernel(q, q_row, q_head, query, visual, text, dout, lse, delta, dq, scale, scale_log2,
                          D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq (N, H, D), on the forward's walk."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
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
def backward_keys_kernel(q, q_row, q_head, query, keys, dout, lse, delta, dk, dv, scale, scale_log2,
                         D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk, dv (rows, G, D) of one run of keys: a tile of keys, and every query that sees any of it. Scores are
    transposed, (keys, queries)."""
    group = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2)
    begin = tl.program_id(0) * BLOCK_N
    length = tl.load(keys.length + sample) - begin
    if length <= 0:
        return
    key_row = tl.load(keys.start + sample) + begin
    n = tl.arange(0, BLOCK_N)
    k, v = load_keys(keys, key_row, group, length, D, BLOCK_D, BLOCK_N, True)
    k_position = tl.load(keys.position + key_row + n, mask=n < length, other=FAR)
    first = tl.load(keys.position + key_row)
    last = tl.load(keys.position + key_row + tl.minimum(BLOCK_N, length) - 1)

    # the first `none` queries see no key of the tile, those up to `some` perhaps a part of it, the rest all of it
    start = tl.load(query.start + sample)
    queries = tl.load(query.length + sample)
    none = count_visible(query.position + start, 0, queries, first - 1)
    some = count_visible(query.position + start, none, queries, last - 1)
    low, end = none * GROUP, queries * GROUP
    middle = low + tl.cdiv(some * GROUP - low, BLOCK_M) * BLOCK_M

    heads = tl.num_programs(1) * GROUP
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for FULL in tl.static_range(2):
        for packed in range(middle if FULL else low, end if FULL else middle, BLOCK_M):
            row, r, h, inside = packed_rows(start, packed, end, GROUP, BLOCK_M)
            q_tile = load_tile(q + row * q_row + group * GROUP * q_head, r * q_row + h * q_head, inside,
                               D, BLOCK_D, True)
            at, offsets = row * heads + group * GROUP, r * heads + h
            row_lse = tl.load(lse + at + offsets, mask=inside, other=float("inf"))      # p = 0 where there is no row
            s = tl.dot(k, q_tile.T, input_precision="ieee")
            p = tl.exp2(s * scale_log2 - row_lse[None, :])                              # p^T = softmax(s)^T
            if not FULL:
                q_position = tl.load(query.position + row + r, mask=inside, other=-1)
                p = tl.where(k_position[:, None] <= q_position[None, :], p, 0.0)
            do = load_tile(dout + at * D, offsets * D, inside, D, BLOCK_D, True)
            acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision="ieee")           # dv = p^T do
            dp = tl.dot(v, do.T, input_precision="ieee")                                # dp^T = v do^T
            row_delta = tl.load(delta + at + offsets, mask=inside, other=0.0)
            ds = p * (dp - row_delta[None, :])                                          # ds^T = p^T (dp^T - delta)
            acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")  # dk = ds^T q, scaled at the end

    d = tl.arange(0, BLOCK_D)
    at = (key_row.to(tl.int64) * tl.num_programs(1) + group) * D
    offsets = (n * tl.num_programs(1) * D)[:, None] + d[None, :]
    mask = (n < length)[:, None] & (d < D)[None, :]
    tl.store(dk + at + offsets, (acc_k * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at + offsets, acc_v.to(dv.dtype.element_ty), mask=mask)


# ---- launches ----

QUERY = [Tile(8, 64, 32, 4, 3), Tile(8, 64, 32, 4, 2), Tile(9, 128, 64, 8, 2)]
KEYS = [Tile(8, 64, 64, 8, 2), Tile(8, 16, 64, 4, 3), Tile(9, 32, 128, 8, 3)]
backward_query = tuned(backward_query_kernel, QUERY, lambda tile: 2 * tile.BLOCK_M + 2 * tile.stages * tile.BLOCK_N)
backward_keys = tuned(backward_keys_kernel, KEYS, lambda tile: 2 * tile.BLOCK_N + 2 * tile.stages * tile.BLOCK_M)


@library.custom_op("nanoeemllm::attend_backward", mutates_args=())
def attend_backward(dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k_visual: Tensor, v_visual: Tensor,
                    k_text: Tensor, v_text: Tensor, runs: list[Tensor], max_lengths: list[int], scale: float,
                    needed: list[bool]) -> list[Tensor]:
    """Gradients of q, k_visual, v_visual, k_text, v_text. needed: of q, of the visual pair, of the text pair (k and v
    cost hardly more than one of them); what is not needed comes as an empty tensor."""
    (N, H, D), G, B = q.shape, k_text.shape[1], len(runs[0])
    longest_query, *longest_keys = max_lengths
    grads = _empty_grads(q, k_visual, v_visual, k_text, v_text, needed)
    grads = [grad.zero_() for grad in grads]  # for rows in no run
    if not B or not longest_query:
        return grads

    q = dense_rows(q)
    query, *keys = kernel_runs(k_visual, v_visual, k_text, v_text, runs)
    sizes = dict(D=D, BLOCK_D=block_width(D))
    dout, delta = dout.contiguous(), torch.empty_like(lse)
    delta_kernel[(triton.cdiv(N * H, 32),)](out, dout, delta, N * H, BLOCK_M=32, **sizes)
    given, sizes = (dout, lse, delta), dict(scale=scale, scale_log2=scale * LOG2_E, GROUP=H // G, **sizes)
    if needed[0]:
        grid = lambda meta: (triton.cdiv(longest_query * (H // G), meta["BLOCK_M"]), G, B)
        backward_query[grid](*q, query, *keys, *given, grads[0], **sizes)
    for run, longest, need, pair in zip(keys, longest_keys, needed[1:], (grads[1:3], grads[3:5])):
        if need and longest:
            grid = lambda meta: (triton.cdiv(longest, meta["BLOCK_N"]), G, B)
            backward_keys[grid](*q, query, run, *given, *pair, **sizes)
    return grads


@attend_backward.register_fake
def _(dout, out, lse, q, k_visual, v_visual, k_text, v_text, runs, max_lengths, scale, needed):
    return _empty_grads(q, k_visual, v_visual, k_text, v_text, needed)


def _empty_grads(q, k_visual, v_visual, k_text, v_text, needed) -> list[Tensor]:
    q_needed, visual, text = needed
    needs = ((q, q_needed), (k_visual, visual), (v_visual, visual), (k_text, text), (v_text, text))
    return [x.new_empty(x.shape if need else 0) for x, need in needs]
