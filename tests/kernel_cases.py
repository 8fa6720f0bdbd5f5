"""Random packed layouts for the kernel tests, and what they are held against: the rule written down, in float64."""

import random
from bisect import bisect_right
from typing import NamedTuple

import torch

from nanoeemllm.kernels import composite_attention, first_queries

WIDTHS = (16, 32, 64, 72, 80, 96, 128, 256)
NAMES = ("out", "dq", "dk_visual", "dv_visual", "dk_text", "dv_text")


class Span(NamedTuple):
    start: torch.Tensor
    length: torch.Tensor
    max_length: int


class Layout(NamedTuple):
    """The arguments of composite_attention after the five tensors."""
    query: Span
    visual: Span
    text: Span
    sees_visual: torch.Tensor
    sees_text: torch.Tensor

    def to(self, device) -> "Layout":
        spans = [Span(span.start.to(device), span.length.to(device), span.max_length) for span in self[:3]]
        return Layout(*spans, *(x.to(device) for x in self[3:]))

    def first(self, visual_rows: int, text_rows: int):
        return (first_queries(self.query, self.visual, self.sees_visual, visual_rows),
                first_queries(self.query, self.text, self.sees_text, text_rows))


def int32(*x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


def pack(lengths: list[int], rng: random.Random) -> tuple[Span, int]:
    """One run a sample, laid out in random order with rows of nobody between them -> span, rows."""
    start, rows = [0] * len(lengths), 0
    for b in rng.sample(range(len(lengths)), len(lengths)):
        rows += rng.choice([0, 0, 1, 7])
        start[b] = rows
        rows += lengths[b]
    return Span(int32(*start), int32(*lengths), max(lengths)), rows + rng.choice([0, 5])


def layout_of(positions: list[tuple[list[int], list[int], list[int]]], rng: random.Random):
    """Per sample the positions of its queries, visual and text keys -> Layout, rows of each kind. A query sees the keys
    at positions up to its own; rows of nobody have counts that would be wrong for anybody."""
    (query, rows), *keys = (pack([len(run) for run in kind], rng) for kind in zip(*positions))
    sees = [torch.full((rows,), 12345, dtype=torch.int32) for _ in range(2)]
    for start, (queries, *runs) in zip(query.start.tolist(), positions):
        for counts, run in zip(sees, runs):
            counts[start:start + len(queries)] = int32(*(bisect_right(run, q) for q in queries))
    return Layout(query, keys[0][0], keys[1][0], *sees), (rows, keys[0][1], keys[1][1])


def random_layout(rng: random.Random, longest: int):
    """1-5 samples: 0-4 pictures anywhere in the text; sometimes the visual rows are queries too (`llava`), sometimes only
    the last few rows ask (a turn of a chat, decoding), sometimes every row sees all (an encoder)."""
    def length():
        return rng.choice([0, 1, rng.randint(2, 40), rng.randint(2, 40), rng.randint(2, longest)])
    who_asks = rng.choice(["text", "text", "text", "all", "all", "last", "last", "encoder"])
    samples = []
    for _ in range(rng.randint(1, 5)):
        kinds = ["text"] * length()
        rest = length()  # visual rows, over the pictures
        for picture in reversed(range(rng.choice([0, 1, 2, 4]))):
            rows = rng.randint(0, rest) if picture else rest
            at = rng.randint(0, len(kinds))
            kinds[at:at] = ["visual"] * rows
            rest -= rows
        visual = [i for i, kind in enumerate(kinds) if kind == "visual"]
        text = [i for i, kind in enumerate(kinds) if kind == "text"]
        queries = {"text": text, "all": list(range(len(kinds))), "last": text[-rng.randint(1, 4):],
                   "encoder": [len(kinds)] * len(kinds)}[who_asks]
        samples.append((queries, visual, text))
    return layout_of(samples, rng)


def random_case(seed: int, D: int, dtype: torch.dtype, longest: int = 300, device="cpu", heads=None):
    """-> q, k_visual, v_visual, k_text, v_text in strides of all kinds, the Layout, a gradient of the output."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layout, (queries, visual, text) = random_layout(rng, longest)
    G = rng.choice([1, 1, 2, 3])
    H, G = heads or (G * rng.choice([1, 1, 2, 3, 4]), G)
    tensors = []
    for rows, n in ((queries, H), (visual, G), (visual, G), (text, G), (text, G)):
        x = torch.randn(rows, n + 1, D, generator=generator).to(device, dtype)
        tensors.append(x[:, 1:] if rng.random() < 0.5 else x[:, 1:].transpose(0, 1).contiguous().transpose(0, 1))
    gradient = torch.randn(tensors[0].shape, generator=generator).to(device, dtype)
    return tensors, layout.to(device), gradient


def reference(q, k_visual, v_visual, k_text, v_text, query, visual, text, sees_visual, sees_text):
    """The rule, sample by sample, with every score in memory."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_text.shape[1]
    for b in range(len(query.start)):
        q_rows, v_rows, t_rows = (slice(int(span.start[b]), int(span.start[b] + span.length[b]))
                                  for span in (query, visual, text))
        k = torch.cat([k_visual[v_rows], k_text[t_rows]]).repeat_interleave(group, dim=1)
        v = torch.cat([v_visual[v_rows], v_text[t_rows]]).repeat_interleave(group, dim=1)
        n_visual, n_text = (torch.arange(int(span.length[b]), device=q.device) for span in (visual, text))
        mask = torch.cat([n_visual < sees_visual[q_rows, None], n_text < sees_text[q_rows, None]], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[q_rows], k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) * mask
        out[q_rows] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def with_gradients(attend, tensors, layout, gradient) -> list[torch.Tensor]:
    """-> out and the gradients of the five inputs, in float64."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attend(*tensors, *layout)
    grads = torch.autograd.grad(out, tensors, gradient, materialize_grads=True)
    return [x.detach().double() for x in (out, *grads)]


def of_kernel(*case) -> list[torch.Tensor]:
    return with_gradients(composite_attention, *case)


def true_values(tensors, layout, gradient) -> list[torch.Tensor]:
    return with_gradients(reference, [x.double() for x in tensors], layout, gradient.double())


def distances(got, want, gradient) -> list[float]:
    """|got - want| / |want| of out and the five gradients. Where a query sees one key its weight is 1 whatever the
    score: dq and dk are true zeros, the difference of two equal sums in the kernel. A gradient's error is therefore
    measured against no less than a tenth of the gradient that came in. NaN is infinitely far."""
    least = float(gradient.double().norm()) / 10
    result = []
    for name, a, b in zip(NAMES, got, want):
        size = float(b.norm()) if name == "out" else max(float(b.norm()), least)
        error = float((a - b).norm())
        result.append(error / size if size else error if error == error else float("inf"))
    return [x if x == x else float("inf") for x in result]
