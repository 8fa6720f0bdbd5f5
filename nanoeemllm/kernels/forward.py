"""Composite attention as a Triton kernel: training, prefill, and decoding with split keys.

WHAT IS COMPUTED. Every sample owns rows of queries and two runs of keys and values, visual and
text, each a (start, length) in its own packed tensor. A query sees a prefix of its sample's visual
run and a prefix of its text run, two numbers that come with the query row. Two words, an image of
three, two words, another image of three, two words:

              visual keys      text keys        sees_visual  sees_text
    query 0   . . .  . . .     : .  . .  . .         0           1     |
    query 1   . . .  . . .     : #  . .  . .         0           2     |  one tile of queries
    query 2   # # #  . . .     : #  # .  . .         3           3     |
    query 3   # # #  . . .     : #  # #  . .         3           4     |
    query 4   : : :  : : :     : :  : :  : .         6           5        |  the next
    query 5   : : :  : : :     : :  : :  : #         6           6        |

HOW. A program owns a tile of queries and walks the keys, a block at a time. Counts never fall
within a sample: every row of the tile sees what its first row sees (`:`, no mask), and none sees
more than its last row (the staircase in between, `#`, is masked). Beyond that nothing is loaded.
One loop takes the full blocks of both runs, a second one the masked blocks of both. The running
softmax is FlashAttention's (Dao 2023, algorithm 1), in base 2:

    m' = max(m, max(s))     l' = 2^(m - m') l + sum(2^(s - m'))     o' = 2^(m - m') o + 2^(s - m') v

Grouped heads: the H // G query heads that share a key head are rows of one tile (query 0 head 0,
query 0 head 1, ..., query 1 head 0, ...), so that one load of a key block serves them all.

FEW QUERIES, MANY KEYS. Tiles x G x B programs would leave most of the GPU idle, so `splits`
programs share the blocks of one tile. Each leaves a normalised partial result and the log2 of its
softmax sum, and `combine_kernel` weighs them together. What sizes a launch is known to the host;
starts, lengths and counts stay on the device: nothing waits, and decoding from a cache that grows
in place can be recorded in a CUDA graph.
"""

import math
from collections import namedtuple

import torch
import triton
import triton.language as tl
from triton.language import constexpr

from .tiles import FEW, FORWARD, FORWARD_FEW, choose_tile, columns, parts, sizes, splits_for

LOG2_E = constexpr(1 / math.log(2))
LOWEST = constexpr(-3.0e38)  # "no key yet": unlike -inf it can be subtracted from itself

# A packed tensor (rows, heads, D), its strides in units of 8 numbers: so the compiler knows that
# rows start at multiples of 16 bytes, and copies 16 bytes at a time.
Rows = namedtuple("Rows", "x row head")
# Some of its rows: row + r, head + h, as far as inside. r and h are 32-bit offsets from one 64-bit
# row, which keeps the pointers cheap.
Place = namedtuple("Place", "row head r h inside")
# Runs of all samples: (B,) start and length. Of keys: also k, v, and (N,) how many each query sees.
Span = namedtuple("Span", "start length")
Keys = namedtuple("Keys", "start length sees k v")
# What a tile of queries sees of a run: k and v from its first row on, how many keys the tile's last
# row sees, and how many blocks of them are full and masked.
Blocks = namedtuple("Blocks", "k v sees seen full masked")


# ---- a tile (rows, D) is one part or, where D is no power of two, two: 64 + 16 columns for 72 ----

@triton.jit
def pointers(x, place, PART: constexpr, D: constexpr):
    """-> (rows, columns) pointers to one part, and a mask of those that exist."""
    base = x.x + (place.row * x.row + place.head * x.head) * 8
    offsets = (place.r * x.row + place.h * x.head) * 8
    d = PART * columns(D, 0) + tl.arange(0, columns(D, PART))[None, :]
    mask = place.inside[:, None]
    if PART * columns(D, 0) + columns(D, PART) > D:
        mask = mask & (d < D)
    return base + offsets[:, None] + d, mask


@triton.jit
def load_rows(x, place, D: constexpr):
    tile = ()
    for PART in tl.static_range(parts(D)):
        p, mask = pointers(x, place, PART, D)
        tile += (tl.load(p, mask=mask, other=0.0),)
    return tile


@triton.jit
def store_rows(x, place, tile, D: constexpr):
    for PART in tl.static_range(parts(D)):
        p, mask = pointers(x, place, PART, D)
        tl.store(p, tile[PART].to(x.x.dtype.element_ty), mask=mask)


@triton.jit
def zero_tile(ROWS: constexpr, D: constexpr):
    tile = ()
    for PART in tl.static_range(parts(D)):
        tile += (tl.zeros((ROWS, columns(D, PART)), tl.float32),)
    return tile


@triton.jit
def dot_rows(a, b):
    """a b^T, contracted over D."""
    s = tl.dot(a[0], b[0].T, input_precision="ieee")
    if len(a) == 2:
        s = tl.dot(a[1], b[1].T, s, input_precision="ieee")
    return s


@triton.jit
def add_dot(acc, p, x):
    """acc + p x, contracted over rows."""
    tile = ()
    for PART in tl.static_range(len(x)):
        tile += (tl.dot(p.to(x[0].dtype), x[PART], acc[PART], input_precision="ieee"),)
    return tile


# ---- the walk ----

@triton.jit
def query_place(start, packed, end, group, GROUP: constexpr, ROWS: constexpr):
    """The packed query rows (row and head of one group) from `packed` on, as far as `end`."""
    m = packed % GROUP + tl.arange(0, ROWS)
    inside = packed + tl.arange(0, ROWS) < end
    row = (start + packed // GROUP).to(tl.int64)
    return Place(row, group * GROUP, m // GROUP, m % GROUP, inside)


@triton.jit
def begin_at(x, row, head):
    return Rows(x.x + (row.to(tl.int64) * x.row + head * x.head) * 8, x.row, x.head)


@triton.jit
def key_blocks(keys, sample, group, first, last, BLOCK: constexpr):
    """Of the run that the query rows first to last see."""
    start = tl.load(keys.start + sample)
    seen = tl.load(keys.sees + last)
    full = tl.load(keys.sees + first) // BLOCK
    return Blocks(begin_at(keys.k, start, group), begin_at(keys.v, start, group), keys.sees,
                  seen, full, tl.cdiv(seen, BLOCK) - full)


@triton.jit
def begin_walk(query, visual, text, sample, group, packed, end, GROUP: constexpr,
               OWN: constexpr, STEP: constexpr):
    """-> the place of a tile of queries, and the visual and text blocks that it sees."""
    start = tl.load(query.start + sample)
    last = start + (tl.minimum(packed + OWN, end) - 1) // GROUP
    place = query_place(start, packed, end, group, GROUP, OWN)
    return (place, key_blocks(visual, sample, group, place.row, last, STEP),
            key_blocks(text, sample, group, place.row, last, STEP))


@triton.jit
def choose(is_text, visual, text):
    return Rows(tl.where(is_text, text.x, visual.x), tl.where(is_text, text.row, visual.row),
                tl.where(is_text, text.head, visual.head))


@triton.jit
def load_block(i, queries, visual, text, D: constexpr, STEP: constexpr, MASKED: constexpr):
    """Block i of the full or of the masked ones -> k, v, and which query sees which key."""
    before = visual.masked if MASKED else visual.full
    is_text = i >= before
    block = i - tl.where(is_text, before, 0)
    inside = tl.full((STEP,), True, tl.int1)
    mask = inside[None, :]
    if MASKED:
        block += tl.where(is_text, text.full, visual.full)
        n = block * STEP + tl.arange(0, STEP)
        inside = n < tl.where(is_text, text.seen, visual.seen)
        sees = tl.where(is_text, text.sees, visual.sees) + queries.row + queries.r
        mask = n[None, :] < tl.load(sees, mask=queries.inside, other=0)[:, None]
    place = Place((block * STEP).to(tl.int64), 0, tl.arange(0, STEP), 0, inside)
    k = load_rows(choose(is_text, visual.k, text.k), place, D)
    v = load_rows(choose(is_text, visual.v, text.v), place, D)
    return k, v, mask


@triton.jit
def row_heads(place, heads):
    """Where the rows' numbers lie in (rows, heads)."""
    return place.row * heads + place.head + place.r * heads + place.h


@triton.jit
def zero_rows_in_no_run(tensors, lse, rows, copies, heads, span, samples, D: constexpr):
    """In all tensors (copies * rows, heads, D), and -inf in lse, if any. All programs of one grid
    layer share the rows. Most have nothing to write."""
    ROWS: constexpr = 32
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for first in range(program * ROWS, copies * rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        found = tl.zeros((ROWS,), tl.int32)
        for b in range(0, samples, 64):  # at once, or their loads would wait for each other
            sample = b + tl.arange(0, 64)
            start = tl.load(span.start + sample, mask=sample < samples, other=0)
            length = tl.load(span.length + sample, mask=sample < samples, other=0)
            n = (row % rows)[:, None] - start[None, :]
            found |= tl.max(((n >= 0) & (n < length[None, :])).to(tl.int32), 1)
        for head in range(heads):
            place = Place(0, head, row.to(tl.int64), 0, (row < copies * rows) & (found == 0))
            for i in tl.static_range(len(tensors)):
                store_rows(tensors[i], place, zero_tile(ROWS, D), D)
            if lse is not None:
                tl.store(lse + row_heads(place, heads), -float("inf"), mask=place.inside)


# ---- forward ----

@triton.jit(do_not_specialize=["rows", "samples", "splits"])
def forward_kernel(q, query, visual, text, out, lse, rows, samples, splits, scale,
                   D: constexpr, GROUP: constexpr, OWN: constexpr, STEP: constexpr):
    """out (splits, rows, H, D); lse (splits, rows, H), log2 of each row's softmax sum."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see most keys: they go first
    group = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    sample = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    if sample == samples:
        zero_rows_in_no_run((out,), lse, rows, splits, heads, query, samples, D)
        return
    end = tl.load(query.length + sample) * GROUP
    if tile * OWN >= end:
        return
    queries, of_visual, of_text = begin_walk(query, visual, text, sample, group, tile * OWN, end,
                                             GROUP, OWN, STEP)
    q_tile = load_rows(q, queries, D)
    scale_log2 = scale * LOG2_E

    # Blocks are counted over both runs: first all full ones, then the masked ones.
    full = of_visual.full + of_text.full
    blocks = full + of_visual.masked + of_text.masked
    begin, stop = split * blocks // splits, (split + 1) * blocks // splits
    acc = zero_tile(OWN, D)
    top = tl.full((OWN,), LOWEST, tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    for MASKED in tl.static_range(2):
        low = tl.maximum(begin, full) - full if MASKED else begin
        high = stop - full if MASKED else tl.minimum(stop, full)
        if low < high:  # a pipelined loop that may run zero times makes ptxas serialise wgmma
            for i in range(low, high):
                k, v, mask = load_block(i, queries, of_visual, of_text, D, STEP, MASKED)
                s = dot_rows(q_tile, k)
                if MASKED:
                    s = tl.where(mask, s, -float("inf"))
                new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
                p = tl.exp2(s * scale_log2 - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(p, 1)
                acc = add_dot([x * shrink[:, None] for x in acc], p, v)
                top = new_top

    weight = 1 / tl.where(total > 0, total, 1)[:, None]  # a row that saw nothing: 0, and lse -inf
    to = Place(queries.row + split.to(tl.int64) * rows, queries.head, queries.r, queries.h,
               queries.inside)
    store_rows(out, to, [x * weight for x in acc], D)
    tl.store(lse + row_heads(to, heads), top + tl.log2(total), mask=to.inside)


@triton.jit(do_not_specialize=["row_heads", "splits"])
def combine_kernel(partial, partial_lse, out, lse, row_heads, splits, D: constexpr,
                   BLOCK_D: constexpr, SPLITS: constexpr, ROWS: constexpr):
    """out = sum of 2^(lse_s - lse) partial_s, with lse = log2 of the sum of 2^lse_s."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(at, row_heads - 1)  # what lies beyond the last row computes the last row too
    split = tl.arange(0, SPLITS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    places = split * row_heads.to(tl.int64) + at[None, :]
    each = tl.load(partial_lse + places, mask=split < splits, other=-float("inf"))  # (SPLITS, ROWS)
    top = tl.maximum(tl.max(each, 0), LOWEST)
    weight = tl.exp2(each - top[None, :])
    total = tl.sum(weight, 0)
    x = tl.load(partial + places[:, :, None] * D + d[None, :, :],
                mask=(split < splits)[:, :, None] & (d < D)[None, :, :], other=0.0)
    result = tl.sum(x * weight[:, :, None], 0) / tl.where(total > 0, total, 1)[:, None]
    tl.store(out + at[:, None] * D + d, result.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + at, top + tl.log2(total))


# ---- launch ----

def rows_of(x):
    """Any strides of rows and heads will do, but for those that would split 8 numbers."""
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    return Rows(x, x.stride(0) // 8, x.stride(1) // 8)


def inputs_of(q, keys, tables):
    """-> q, query, visual, text as the kernels take them."""
    k_visual, v_visual, k_text, v_text = map(rows_of, keys)
    return (rows_of(q), Span(*tables[:2]), Keys(*tables[2:4], tables[6], k_visual, v_visual),
            Keys(*tables[4:6], tables[7], k_text, v_text))


def launch_forward(q, keys, tables, max_lengths, scale, tile=None, splits=None):
    """The op `attend` on a device; tile and splits override the choice."""
    (N, H, D), G, B = q.shape, keys[0].shape[1], len(tables[0])
    packed = max_lengths[0] * (H // G)
    tile = tile or choose_tile(FORWARD_FEW if packed <= FEW else FORWARD, q)
    tiles = max(1, triton.cdiv(packed, tile.own))
    splits = splits or splits_for(tile, q, tiles * G * max(1, B), max_lengths[1:])

    def results(rows, dtype):
        return (q.new_empty((rows, H, D), dtype=dtype),
                q.new_empty((rows, H), dtype=torch.float32))
    out, lse = results(splits * N, torch.float32 if splits > 1 else q.dtype)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[tiles, G, B * splits + 1](
            *inputs_of(q, keys, tables), rows_of(out), lse, N, B, splits, scale,
            **sizes(tile, D, H // G))
        if splits > 1:
            partial, (out, lse) = (out, lse), results(N, q.dtype)
            SPLITS = triton.next_power_of_2(splits)
            ROWS = max(1, 32 // SPLITS)
            combine_kernel[triton.cdiv(N * H, ROWS),](
                *partial, out, lse, N * H, splits, D=D, BLOCK_D=triton.next_power_of_2(D),
                SPLITS=SPLITS, ROWS=ROWS)
    return out, lse
