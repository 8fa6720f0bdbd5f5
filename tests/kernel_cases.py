"""Random packed layouts for the kernel tests, and what they are held against: the rule written down, in float64."""

import random

import torch

from nanoeemllm.attention import Run, attention_reference

WIDTHS = (16, 32, 64, 72, 80, 96, 128, 256)
NAMES = ("out", "dq", "dk_visual", "dv_visual", "dk_text", "dv_text")


def random_run(positions: list[list[int]], rng: random.Random) -> Run:
    """One run a sample, laid out in random order with rows of nobody between them."""
    start, length = [0] * len(positions), [len(p) for p in positions]
    rows = []
    for b in rng.sample(range(len(positions)), len(positions)):
        rows += [0] * rng.choice([0, 0, 1, 7])
        start[b] = len(rows)
        rows += positions[b]
    rows += [0] * rng.choice([0, 5])
    return Run(*(torch.tensor(x, dtype=torch.int32) for x in (start, length, rows)), max(length))


def random_runs(rng: random.Random, longest: int) -> tuple[Run, Run, Run]:
    """Query, visual and text runs of 1-5 samples: 0-4 pictures anywhere in the text; sometimes the visual rows are
    queries too (`llava`), sometimes only the last few rows ask (a turn of a chat, decoding)."""
    def length():
        return rng.choice([0, 1, rng.randint(2, 40), rng.randint(2, 40), rng.randint(2, longest)])
    who_asks = rng.choice(["text", "text", "all", "last"])
    query, visual, text = [], [], []
    for _ in range(rng.randint(1, 5)):
        kinds = ["text"] * length()
        rest = length()  # visual rows, over the pictures
        for picture in reversed(range(rng.choice([0, 1, 2, 4]))):
            rows = rng.randint(0, rest) if picture else rest
            at = rng.randint(0, len(kinds))
            kinds[at:at] = ["visual"] * rows
            rest -= rows
        here = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in ("visual", "text")}
        visual.append(here["visual"])
        text.append(here["text"])
        query.append(list(range(len(kinds))) if who_asks == "all" else
                     here["text"][-rng.randint(1, 4):] if who_asks == "last" else here["text"])
    return random_run(query, rng), random_run(visual, rng), random_run(text, rng)


def random_case(seed: int, D: int, dtype: torch.dtype, longest: int = 300, device="cpu"):
    """-> q, k_visual, v_visual, k_text, v_text in strides of all kinds, the three runs, a gradient of the output."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    runs = random_runs(rng, longest)
    G = rng.choice([1, 1, 2, 3])
    H = G * rng.choice([1, 1, 2, 3, 4])
    tensors = []
    for run, heads in zip((runs[0], runs[1], runs[1], runs[2], runs[2]), (H, G, G, G, G)):
        x = torch.randn(len(run.position), heads + 1, D, generator=generator).to(device, dtype)
        tensors.append(x[:, 1:] if rng.random() < 0.5 else x[:, 1:].transpose(0, 1).contiguous().transpose(0, 1))
    gradient = torch.randn(tensors[0].shape, generator=generator).to(device, dtype)
    return tensors, [Run(*(x.to(device) for x in run[:3]), run.max_length) for run in runs], gradient


def with_gradients(attend, tensors, runs, gradient) -> list[torch.Tensor]:
    """-> out and the gradients of the five inputs, in float64."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attend(*tensors, *runs)
    grads = torch.autograd.grad(out, tensors, gradient, materialize_grads=True)
    return [x.detach().double() for x in (out, *grads)]


def true_values(tensors, runs, gradient) -> list[torch.Tensor]:
    return with_gradients(attention_reference, [x.double() for x in tensors], runs, gradient.double())


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
