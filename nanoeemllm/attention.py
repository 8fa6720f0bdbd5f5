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
from dataclasses import dataclass, replace
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
    """What queries attend to, (rows, G, D) each. Where there is only one run of keys (the encoder's
    patches, LLaVA's merged rows) it takes the text's place, and the visual one is empty."""
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
    sees_visual: Tensor            # (N,) int32: the row sees so many of its sample's visual keys
    sees_text: Tensor              # (N,) int32: and so many of its text keys
    # Decoding: rows reserved for each sample's text keys, sample b's from row b * capacity on.
    # attention_sdpa then serves all samples in one call.
    capacity: int | None = None

    @cached_property
    def text_alone(self) -> "Visibility":    # the same queries where there are no visual keys
        return replace(self, visual=empty_span(self.query), sees_visual=self.sees_visual * 0)

    @cached_property
    def blocks(self) -> "list[Block]":       # of attention_sdpa, once for all layers
        return make_blocks(self)

    @cached_property
    def padding(self) -> Tensor | None:      # of attend_in_cache, a mask (B, 1, 1, keys)
        place = torch.arange(self.text.max_length, device=self.text.length.device)
        mask = (place < self.text.length[:, None])[:, None, None]
        return None if mask.all() else mask

    @cached_property
    def first_queries(self) -> dict:         # of kernels/, backward: {(V, T): who first sees a key}
        return {}


def empty_span(like: Span) -> Span:
    return Span(like.start * 0, like.start * 0, 0)


_instead: list[Callable] = []            # of use_attention


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

BLOCK = 256     # query rows at a time
FEW = 16        # up to so many query rows, keys of both kinds are not concatenated


class Block(NamedTuple):
    """Some query rows of a sample, and the keys that the last of them sees. Images of equal size in
    a row (the encoder's), `count` of them, are one block, so that one call serves them."""
    rows: slice
    visual: slice
    text: slice
    count: int
    mask: Tensor | None     # (rows, keys); None: all see all, or is_causal
    is_causal: bool         # row i sees the first i + 1 keys


def make_blocks(sees: Visibility) -> list[Block]:
    blocks, shape = [], None        # shape: queries and keys of the last block, if others may join
    text_counts, visual_counts = sees.sees_text.tolist(), sees.sees_visual.tolist()
    for (row, Q), (v, _), (t, _) in samples_of(sees):
        text, visual = text_counts[row:row + Q], visual_counts[row:row + Q]
        is_causal = Q > 1 and not visual[-1] and text == list(range(1, Q + 1))
        is_uniform = Q > 0 and text[0] == text[-1] and visual[0] == visual[-1]
        step = Q if is_causal or is_uniform else BLOCK
        for first in range(0, Q, max(1, step)):
            stop = min(first + step, Q)
            V, T, rows = visual[stop - 1], text[stop - 1], slice(row + first, row + stop)
            before, shape = shape, (Q, T) if is_uniform and not V else None
            last = blocks[-1] if blocks and shape and shape == before else None
            if last and (last.rows.stop, last.text.stop) == (row, t):
                blocks[-1] = last._replace(rows=slice(last.rows.start, rows.stop),
                                           text=slice(last.text.start, t + T), count=last.count + 1)
                continue
            mask = None if is_causal or is_uniform else visible(sees, rows, V, T)
            blocks.append(Block(rows, slice(v, v + V), slice(t, t + T), 1, mask, is_causal))
    return blocks


def attention_sdpa(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """Sample by sample, and block by block of its queries, each with the keys that it can see."""
    if sees.capacity:
        return attend_in_cache(q, keys, sees)
    blocks, out, end = sees.blocks, [], 0
    k_visual, v_visual = (split(x, [b.visual for b in blocks]) for x in keys[:2])
    k_text, v_text = (split(x, [b.text for b in blocks]) for x in keys[2:])
    for i, (b, rows) in enumerate(zip(blocks, split(q, [b.rows for b in blocks]))):
        parts = [(k.unflatten(0, (b.count, -1)), v.unflatten(0, (b.count, -1)))
                 for k, v in ((k_visual[i], v_visual[i]), (k_text[i], v_text[i])) if len(k)]
        rows = rows.unflatten(0, (b.count, -1))
        rows = softmax_attention(rows, parts, b.mask, b.is_causal) if parts else rows * 0
        out += [q.new_zeros(b.rows.start - end, *q.shape[1:]), rows.flatten(0, 1)]
        end = b.rows.stop
    return torch.cat([*out, q.new_zeros(len(q) - end, *q.shape[1:])])


def split(x: Tensor, slices: list[slice]) -> list[Tensor]:
    """The slices of x; by one split where they do not overlap, whose gradient is one concatenation
    instead of one zero-filled tensor a slice."""
    sizes, end = [], 0
    for s in slices:
        if s.start < end:
            return [x[s] for s in slices]
        sizes += [s.start - end, s.stop - s.start]
        end = s.stop
    return list(x.split([*sizes, len(x) - end])[1::2])


def attend_in_cache(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """Decoding: a query a sample, and all samples' text keys at equal distances, in one call."""
    parts = [[x.unflatten(0, (-1, sees.capacity))[:len(q), :sees.text.max_length]
              for x in keys[2:]]]
    if sees.visual.max_length:
        parts.insert(0, [x[None] for x in keys[:2]])
    return softmax_attention(q[:, None], parts, sees.padding, False).squeeze(1)


def softmax_attention(q: Tensor, parts: list, mask: Tensor | None, is_causal: bool) -> Tensor:
    """q (B, Q, H, D) over keys and values (B, K, G, D) in one or two parts -> (B, Q, H, D)."""
    B, Q, H, D = q.shape
    group = H // parts[0][0].shape[2]
    if len(parts) > 1 and Q > FEW:
        parts = [[torch.cat(kind, dim=1) for kind in zip(*parts)]]
    q = q.transpose(1, 2)
    if group > 1 and not is_causal:      # the query heads of a key head become rows of its queries
        q = q.reshape(B, H // group, group * Q, D)
        mask = mask.repeat(group, 1) if mask is not None and Q > 1 else mask
    if len(parts) == 1:                  # a row that sees no key becomes 0
        k, v = (x.transpose(1, 2) for x in parts[0])
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal,
                                             enable_gqa=group > 1 and is_causal)
    else:                                # few queries: the keys of both kinds stay where they are
        scores = torch.cat([q @ k.permute(0, 2, 3, 1) for k, _ in parts], dim=-1)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * D ** -0.5
        weights = scores.softmax(-1)
        if mask is not None:
            weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
        weights = weights.to(q.dtype).split([k.shape[1] for k, _ in parts], dim=-1)
        out = sum(w @ v.transpose(1, 2) for w, (_, v) in zip(weights, parts))
    return out.reshape(B, H, Q, D).transpose(1, 2)
