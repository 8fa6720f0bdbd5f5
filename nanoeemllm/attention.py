"""The one rule of the model: a query sees a key of its own sample iff key position <= its own.

Positions never fall within a kind of token, so what a query sees is a prefix of its sample's visual
keys and a prefix of its text keys: two numbers a query row. A sample of two text tokens, an image
of three, two text tokens, an image of two, and one more text token:

    position     0  1  2  3  4  5  6  7  8  9     sees_visual   sees_text
                 t  t  v  v  v  t  t  v  v  t
    query 0      1  .  .  .  .  .  .  .  .  .          0            1
    query 1      1  1  .  .  .  .  .  .  .  .          0            2
    query 5      1  1  1  1  1  1  .  .  .  .          3            3
    query 6      1  1  1  1  1  1  1  .  .  .          3            4
    query 9      1  1  1  1  1  1  1  1  1  1          5            5

Rows of all samples lie packed in one tensor, without padding; a `Span` says which belong to which
sample. Three functions have one signature: `attention_reference` is the rule written down,
`attention_sdpa` is PyTorch's own attention, and kernels/ is the rule in Triton, for GPUs.
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
    def text_alone(self) -> "Visibility":
        """The same queries where there are no visual keys."""
        nothing = empty_span(self.query)
        return Visibility(self.query, nothing, self.text,
                          torch.zeros_like(self.sees_visual), self.sees_text)

    @cached_property
    def samples(self) -> list[tuple[int, int, int, int, int, int]]:
        """(start, length) of query, visual and text of every sample, on the host."""
        spans = (self.query, self.visual, self.text)
        columns = [x.tolist() for span in spans for x in (span.start, span.length)]
        return list(zip(*columns))

    @cached_property
    def rectangle(self) -> "Rectangle":
        return Rectangle(self)

    @cached_property
    def blocks(self) -> "list[Block]":
        return make_blocks(self)

    @cached_property
    def first_queries(self) -> tuple[Tensor, Tensor]:
        """For every visual and every text key the first query that sees it (kernels/)."""
        from nanoeemllm.kernels import first_queries
        return first_queries(self)


def empty_span(like: Span) -> Span:
    zero = torch.zeros_like(like.start)
    return Span(zero, zero, 0)


def attention(q: Tensor, keys: Keys, sees: Visibility, scale: float | None = None) -> Tensor:
    """Softmax attention of packed queries over each sample's visual and text keys.

    q (N, H, D); G divides H, and H // G query heads share a key head. scale: D^-0.5 by default.
    Returns (N, H, D); rows that see no key are zero.
    """
    if _instead:
        return _instead[-1](q, keys, sees, scale)
    return compute(q, keys, sees, scale)


def compute(q: Tensor, keys: Keys, sees: Visibility, scale: float | None = None) -> Tensor:
    """`attention` by the implementation for q's device."""
    if q.device.type in ("cuda", "meta"):
        from nanoeemllm.kernels import composite_attention
        first = sees.first_queries if q.is_cuda and torch.is_grad_enabled() else None
        return composite_attention(q, *keys, sees.query, sees.visual, sees.text,
                                   sees.sees_visual, sees.sees_text, first, scale)
    return attention_sdpa(q, keys, sees, scale)


_instead: list[Callable] = []


@contextlib.contextmanager
def use_attention(function: Callable):
    """Within it, function(q, keys, sees, scale) is called in place of `attention`, in every layer:
    for baselines, and for looking at what attention does. It may call `compute`."""
    _instead.append(function)
    try:
        yield
    finally:
        _instead.pop()


def attention_reference(q: Tensor, keys: Keys, sees: Visibility, scale=None) -> Tensor:
    """The rule, sample by sample, with every score in memory."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // keys.k_text.shape[1]
    out = torch.zeros_like(q)
    for q_start, Q, v_start, V, t_start, T in sees.samples:
        rows = slice(q_start, q_start + Q)
        visual, text = slice(v_start, v_start + V), slice(t_start, t_start + T)
        k = torch.cat([keys.k_visual[visual], keys.k_text[text]]).repeat_interleave(group, dim=1)
        v = torch.cat([keys.v_visual[visual], keys.v_text[text]]).repeat_interleave(group, dim=1)
        mask = visible(sees, rows, V, T)                                          # (Q, V + T)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k) * scale
        weights = scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights * mask, v)           # rows without keys
    return out


def visible(sees: Visibility, rows: slice, V: int, T: int) -> Tensor:
    """The two prefixes as a mask (rows, V + T) over the first V visual and T text keys."""
    device = sees.sees_text.device
    visual = torch.arange(V, device=device) < sees.sees_visual[rows, None]
    text = torch.arange(T, device=device) < sees.sees_text[rows, None]
    return torch.cat([visual, text], dim=1)


# ---- PyTorch's own attention ----

_BLOCK = 256             # query rows at a time in `blocks`
_RECTANGLE = 2 ** 25     # scores up to which a batch goes as one padded rectangle
_FEW = 16                # up to so many query rows, keys of both kinds are not concatenated


def attention_sdpa(q: Tensor, keys: Keys, sees: Visibility, scale=None) -> Tensor:
    """Many small samples go as one padded rectangle, since a loop over them would cost more than
    the arithmetic; long ones, and a cache, which is not to be copied, go block by block, each with
    the keys that it can see."""
    length = sees.visual.max_length + sees.text.max_length
    B, Q = len(sees.query.start), sees.query.max_length
    if B * Q * length == 0:
        return torch.zeros_like(q)
    if 1 < B and 1 < Q and B * Q * length * q.shape[1] <= _RECTANGLE:
        return _in_one_rectangle(q, keys, sees.rectangle, scale)
    return _in_blocks(q, keys, sees.blocks, scale)


class Rectangle:
    """A batch as (B, Q) queries over (B, K) keys. Padding repeats a sample's last row."""

    def __init__(self, sees: Visibility):
        self.query, q_real = padded_rows(sees.query)
        self.visual, v_real = padded_rows(sees.visual)
        self.text, t_real = padded_rows(sees.text)
        self.q_real, N = q_real, len(sees.sees_text)
        self.rows = self.query[q_real]
        self.is_whole = len(self.rows) == N and bool((self.rows.diff() == 1).all())
        mask = visible(sees, self.query.flatten(), v_real.shape[1], t_real.shape[1])
        mask = mask.unflatten(0, self.query.shape) & torch.cat([v_real, t_real], 1)[:, None]
        self.mask, self.blind = split_blind(mask)


def padded_rows(span: Span) -> tuple[Tensor, Tensor]:
    """Row numbers (B, max_length), and which of them are real."""
    place = torch.arange(span.max_length, device=span.start.device, dtype=torch.int32)
    last = (span.length[:, None] - 1).clamp(min=0)
    rows = span.start[:, None] + torch.minimum(place, last)
    end = int((span.start + span.length).max()) if len(span.start) else 0
    return rows.clamp(max=max(0, end - 1)), place < span.length[:, None]


def split_blind(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A softmax over nothing is NaN, so that rows that see no key are let see all, and are zeroed
    afterwards. (B, Q, K) -> mask (B, 1, Q, K) and rows to zero (B, Q, 1), None where not needed."""
    blind = ~mask.any(-1, keepdim=True)
    mask = mask | blind
    return None if mask.all() else mask[:, None], blind if blind.any() else None


def _in_one_rectangle(q: Tensor, keys: Keys, r: Rectangle, scale) -> Tensor:
    parts = [(k[rows], v[rows]) for k, v, rows in ((keys.k_visual, keys.v_visual, r.visual),
                                                   (keys.k_text, keys.v_text, r.text)) if rows.numel()]
    out = _softmax_attention(q[r.query], parts, r.mask, r.blind, scale)[r.q_real]     # (B, Q, H, D)
    return out if r.is_whole else torch.zeros_like(q).index_copy(0, r.rows.long(), out)


class Block(NamedTuple):
    """Some query rows of one sample, and the keys that the last of them sees."""
    rows: slice
    visual: slice
    text: slice
    mask: Tensor | None     # (1, 1, rows, keys); None: all see all
    blind: Tensor | None    # (1, rows, 1): rows that see no key
    is_causal: bool         # row i sees the first i + 1 keys


def make_blocks(sees: Visibility) -> list[Block]:
    blocks = []
    for q_start, Q, v_start, _, t_start, _ in sees.samples:
        end = q_start + Q
        text, visual = sees.sees_text[q_start:end].tolist(), sees.sees_visual[q_start:end].tolist()
        is_causal = Q > 1 and not visual[-1] and text == list(range(1, Q + 1))
        uniform = Q > 0 and text[0] == text[-1] and visual[0] == visual[-1]
        size = Q if is_causal or uniform else _BLOCK
        for first in range(q_start, end, max(1, size)):
            stop = min(first + size, end)
            V, T = visual[stop - 1 - q_start], text[stop - 1 - q_start]
            mask = blind = None
            if not is_causal and not uniform:
                mask, blind = split_blind(visible(sees, slice(first, stop), V, T)[None])
            if V + T:
                blocks.append(Block(slice(first, stop), slice(v_start, v_start + V),
                                    slice(t_start, t_start + T), mask, blind, is_causal))
    return blocks


def _in_blocks(q: Tensor, keys: Keys, blocks: list[Block], scale) -> Tensor:
    out = [q[:0]]
    for b in blocks:
        parts = [(k[None, rows], v[None, rows]) for k, v, rows in (
            (keys.k_visual, keys.v_visual, b.visual), (keys.k_text, keys.v_text, b.text))
            if rows.stop > rows.start]
        out.append(_softmax_attention(q[None, b.rows], parts, b.mask, b.blind, scale,
                                      b.is_causal)[0])
    out, rows = torch.cat(out), [row for b in blocks for row in (b.rows.start, b.rows.stop)]
    if len(out) == len(q) and rows[1:-1:2] == rows[2::2]:             # every row, in order
        return out
    index = [torch.arange(b.rows.start, b.rows.stop) for b in blocks] or [torch.zeros(0).long()]
    return torch.zeros_like(q).index_copy(0, torch.cat(index).to(q.device), out)


def _softmax_attention(q: Tensor, parts: list, mask, blind, scale, is_causal=False) -> Tensor:
    """q (B, Q, H, D) over keys and values (B, K, G, D) in one or two parts, mask (B, 1, Q, K in
    all) -> (B, Q, H, D)."""
    B, Q, H, D = q.shape
    group = H // parts[0][0].shape[2]
    if len(parts) > 1 and Q > _FEW:
        parts = [[torch.cat(kind, dim=1) for kind in zip(*parts)]]
    q = q.transpose(1, 2)
    if group > 1 and not is_causal:      # the query heads of a key head become rows of its queries
        q = q.reshape(B, H // group, group * Q, D)
        mask = mask if mask is None else mask.repeat(1, 1, group, 1)
    if len(parts) == 1:
        k, v = (x.transpose(1, 2) for x in parts[0])
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale,
                                             enable_gqa=group > 1 and is_causal)
    else:
        out = _in_parts(q * (D ** -0.5 if scale is None else scale), parts, mask)
    out = out.reshape(B, H, Q, D).transpose(1, 2)
    return out if blind is None else out.masked_fill(blind[..., None], 0)


def _in_parts(q: Tensor, parts: list, mask: Tensor | None) -> Tensor:
    """Few queries (B, G, rows, D) over keys in two tensors, neither of which is copied."""
    scores = [q @ k.permute(0, 2, 3, 1) for k, _ in parts]                  # (B, G, rows, K)
    scores = torch.cat(scores, dim=-1).to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(q.dtype).split([k.shape[1] for k, _ in parts], dim=-1)
    return sum(w @ v.transpose(1, 2) for w, (_, v) in zip(weights, parts))
