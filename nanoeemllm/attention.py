"""The one rule of the model: a query sees a key of its own sample iff key position <= its own.

Positions never fall within a kind of token, so what a query sees is a prefix of its sample's visual
keys and a prefix of its text keys: two numbers a query row. Two text tokens, an image of three, two
text tokens, an image of two, and one more text token:

    position     0  1  2  3  4  5  6  7  8  9     sees_visual   sees_text
                 t  t  v  v  v  t  t  v  v  t
    query 0      1  .  .  .  .  .  .  .  .  .          0            1
    query 5      1  1  1  1  1  1  .  .  .  .          3            3
    query 6      1  1  1  1  1  1  1  .  .  .          3            4
    query 9      1  1  1  1  1  1  1  1  1  1          5            5

Rows of all samples lie packed in one tensor, without padding; a `Span` says which belong to which
sample. `attention_reference` is the rule written down, `attention_sdpa` is PyTorch's own attention,
and kernels/ is the rule in Triton, for GPUs.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Span(NamedTuple):
    """Where the rows of B samples lie in one packed tensor. Samples may share rows of keys, but not
    where those need gradients."""
    start: Tensor      # (B,) int32: first row of each sample
    length: Tensor     # (B,) int32: rows of each sample, 0 allowed
    max_length: int    # no length is greater; sizes a launch without asking the device


class Keys(NamedTuple):
    """What queries attend to, (rows, G, D) each."""
    k_visual: Tensor
    v_visual: Tensor
    k_text: Tensor
    v_text: Tensor


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom, for N query rows of B samples."""
    query: Span
    visual: Span
    text: Span
    sees_visual: Tensor    # (N,) int32: the row sees so many of its sample's visual keys
    sees_text: Tensor      # (N,) int32: and so many of its text keys

    @cached_property
    def text_alone(self) -> "Visibility":    # the same queries where there are no visual keys
        none = torch.zeros_like(self.sees_visual)
        return Visibility(self.query, empty_span(self.query), self.text, none, self.sees_text)

    @cached_property
    def blocks(self) -> "list[Block]":         # of attention_sdpa, once for all layers
        return make_blocks(self)

    @cached_property
    def first_queries(self) -> dict:           # of kernels/, likewise, by the numbers of key rows
        return {}


def empty_span(like: Span) -> Span:
    return Span(like.start * 0, like.start * 0, 0)


def attention(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """Softmax attention, scaled by D^-0.5, of packed queries over their sample's two runs of keys.

    q (N, H, D); G divides H, and H // G query heads share a key head. Returns (N, H, D); rows that
    see no key are zero."""
    return (_instead[-1] if _instead else compute)(q, keys, sees)


def compute(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """`attention` by the implementation for q's device."""
    if q.device.type not in ("cuda", "meta"):
        return attention_sdpa(q, keys, sees)
    from nanoeemllm import kernels
    V, T = len(keys.k_visual), len(keys.k_text)
    if torch.is_grad_enabled() and (V, T) not in sees.first_queries:
        sees.first_queries[V, T] = (
            kernels.first_queries(sees.query, sees.visual, sees.sees_visual, V),
            kernels.first_queries(sees.query, sees.text, sees.sees_text, T))
    return kernels.composite_attention(q, *keys, sees.query, sees.visual, sees.text,
                                       sees.sees_visual, sees.sees_text,
                                       sees.first_queries.get((V, T)))


_instead: list[Callable] = []


@contextlib.contextmanager
def use_attention(function: Callable):
    """Within it, function(q, keys, sees) is called in place of `attention`, in every layer: for
    baselines, and for looking at what attention does. It may call `compute`."""
    _instead.append(function)
    try:
        yield
    finally:
        _instead.pop()


def attention_reference(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """The rule, sample by sample, with every score in memory."""
    group = q.shape[1] // keys.k_text.shape[1]
    out = torch.zeros_like(q)
    for (q_start, Q), (v_start, V), (t_start, T) in samples_of(sees):
        rows = slice(q_start, q_start + Q)
        visual, text = slice(v_start, v_start + V), slice(t_start, t_start + T)
        k = torch.cat([keys.k_visual[visual], keys.k_text[text]]).repeat_interleave(group, dim=1)
        v = torch.cat([keys.v_visual[visual], keys.v_text[text]]).repeat_interleave(group, dim=1)
        mask = visible(sees, rows, V, T)                                          # (Q, V + T)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights * mask, v)           # rows without keys
    return out


def visible(sees: Visibility, rows: slice, V: int, T: int) -> Tensor:
    """The two prefixes as a mask (rows, V + T) over the first V visual and T text keys."""
    place = torch.arange(max(V, T), device=sees.sees_text.device)
    visual, text = place[:V] < sees.sees_visual[rows, None], place[:T] < sees.sees_text[rows, None]
    return torch.cat([visual, text], dim=1)


def samples_of(sees: Visibility) -> list[tuple]:
    """(start, length) of every sample's queries, visual and text keys, on the host."""
    return list(zip(*(zip(span.start.tolist(), span.length.tolist())
                      for span in (sees.query, sees.visual, sees.text))))


# ---- PyTorch's own attention ----

_BLOCK = 256             # query rows at a time
_FEW = 16                # up to so many query rows, keys of both kinds are not concatenated


class Block(NamedTuple):
    """Query rows of a sample, and keys that the last of them sees; or of `count` like samples."""
    rows: slice
    visual: slice
    text: slice
    count: int
    mask: Tensor | None     # (1, 1, rows, keys); None: all see all
    blind: Tensor | None    # (1, rows, 1, 1): rows that see no key
    is_causal: bool         # row i sees the first i + 1 keys


def make_blocks(sees: Visibility) -> list[Block]:
    blocks: list[Block] = []
    text_counts, visual_counts = sees.sees_text.tolist(), sees.sees_visual.tolist()
    for (q_start, Q), (v_start, _), (t_start, _) in samples_of(sees):
        text, visual = text_counts[q_start:q_start + Q], visual_counts[q_start:q_start + Q]
        if not Q or not text[-1] + visual[-1]:
            continue
        is_causal = Q > 1 and not visual[-1] and text == list(range(1, Q + 1))
        uniform = text[0] == text[-1] and visual[0] == visual[-1]
        size = Q if is_causal or uniform else _BLOCK
        for first in range(0, Q, size):
            stop = min(first + size, Q)
            rows, V, T = slice(q_start + first, q_start + stop), visual[stop - 1], text[stop - 1]
            masked = not (is_causal or uniform)
            mask, blind = split_blind(visible(sees, rows, V, T)) if masked else (None, None)
            block = Block(rows, slice(v_start, v_start + V), slice(t_start, t_start + T), 1, mask,
                          blind, is_causal)
            if V + T and not (blocks and uniform and merge(blocks, block)):
                blocks.append(block)
    return blocks


def split_blind(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A softmax over nothing is NaN: rows that see no key are let see all, and zeroed afterwards.
    (Q, K) -> mask (1, 1, Q, K) and the rows to zero (1, Q, 1, 1), if any."""
    blind = ~mask.any(-1, keepdim=True)
    return (mask | blind)[None, None], blind[None, :, :, None] if blind.any() else None


def merge(blocks: list[Block], new: Block) -> bool:
    """Joins a block to the one before, if both see all of their keys, are of one size and follow
    one another: all images of an encoder's batch in one call."""
    last, joined = blocks[-1], []
    for before, after in zip(last[:3], new[:3]):
        n = after.stop - after.start
        if before.stop != after.start or before.stop - before.start != n * last.count:
            return False
        joined.append(slice(before.start, after.stop))
    if last.mask is not None or last.is_causal:
        return False
    blocks[-1] = Block(*joined, last.count + 1, None, None, False)
    return True


def attention_sdpa(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """Sample by sample, and block by block of its queries, each with the keys that it can see."""
    blocks, out = sees.blocks, [q[:0]]
    k_visual, v_visual = (pieces(x, [b.visual for b in blocks]) for x in keys[:2])
    k_text, v_text = (pieces(x, [b.text for b in blocks]) for x in keys[2:])
    for i, (b, rows) in enumerate(zip(blocks, pieces(q, [b.rows for b in blocks]))):
        parts = [(k.unflatten(0, (b.count, -1)), v.unflatten(0, (b.count, -1)))
                 for k, v in ((k_visual[i], v_visual[i]), (k_text[i], v_text[i])) if len(k)]
        rows = softmax_attention(rows.unflatten(0, (b.count, -1)), parts, b.mask, b.is_causal)
        out.append((rows if b.blind is None else rows.masked_fill(b.blind, 0)).flatten(0, 1))
    if is_partition([b.rows for b in blocks], len(q)):
        return torch.cat(out)
    rows = [row for b in blocks for row in range(b.rows.start, b.rows.stop)]
    rows = torch.tensor(rows, dtype=torch.long, device=q.device)
    return torch.zeros_like(q).index_copy(0, rows, torch.cat(out))


def is_partition(slices: list[slice], rows: int) -> bool:    # one behind the other, all rows
    ends = [0, *(s.stop for s in slices)]
    return [*(s.start for s in slices), rows] == ends


def pieces(x: Tensor, slices: list[slice]) -> list[Tensor]:
    """The slices of x; by one split where that can be, whose gradient is one concatenation."""
    if is_partition(slices, len(x)):
        return x.split([s.stop - s.start for s in slices]) if slices else []
    return [x[s] for s in slices]


def softmax_attention(q: Tensor, parts: list, mask: Tensor | None, is_causal: bool) -> Tensor:
    """q (B, Q, H, D) over keys and values (B, K, G, D) in one or two parts -> (B, Q, H, D)."""
    B, Q, H, D = q.shape
    group = H // parts[0][0].shape[2]
    if len(parts) > 1 and Q > _FEW:
        parts = [[torch.cat(kind, dim=1) for kind in zip(*parts)]]
    q = q.transpose(1, 2)
    if group > 1 and not is_causal:      # the query heads of a key head become rows of its queries
        q = q.reshape(B, H // group, group * Q, D)
        mask = None if mask is None else mask.repeat(1, 1, group, 1)
    if len(parts) == 1:
        k, v = (x.transpose(1, 2) for x in parts[0])
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal,
                                             enable_gqa=group > 1 and is_causal)
    else:                                # few queries: the keys of both kinds stay where they are
        scores = torch.cat([q @ k.permute(0, 2, 3, 1) for k, _ in parts], dim=-1)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * D ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(q.dtype).split([k.shape[1] for k, _ in parts], dim=-1)
        out = sum(w @ v.transpose(1, 2) for w, (_, v) in zip(weights, parts))
    return out.reshape(B, H, Q, D).transpose(1, 2)
