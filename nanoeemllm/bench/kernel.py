"""The attention kernel beside the best of what PyTorch has for the same result, and beside what the
GPU can do at most.

    python -m nanoeemllm.bench kernel --cases prefill,decode --minutes 8       needs a CUDA device

Contestants: `scaled_dot_product_attention` on its flash, cuDNN and memory-efficient backends, two
flash calls (visual, text) merged by their log-sum-exp, FlexAttention with max-autotune, and
flash-attn where it is installed. They get padded batches, concatenated keys, prebuilt masks and
biases, and repeated key heads where they cannot share them, all outside the clock. Each is held
against the rule in float64 first. A CUDA graph holds 10 calls over rotating inputs that are larger
than the L2 cache; contestants take turns, and figures are medians over the rounds, with the spread
between the first and the third quartile. bfloat16.
"""

import argparse
import functools
import importlib.util
import itertools
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanoeemllm.attention import Span
from nanoeemllm.kernels import composite_attention, first_queries

CALLS = 10   # in one graph
ROUNDS = 15


class Case(NamedTuple):
    """samples: lengths of text, picture, text, picture, ...; queries: the last text rows of each
    sample, None: all. An encoder's queries are the picture's rows, and see all of them."""
    name: str
    samples: list[tuple[int, ...]]
    queries: int | None = None
    backward: bool = False
    encoder: bool = False
    H: int = 32
    D: int = 128
    groups: tuple[int, ...] = (32, 8)

    @property
    def is_rectangle(self) -> bool:
        """One picture, then the text, in equal samples: a lower-right causal mask says it all."""
        return len(set(self.samples)) == 1 and len(self.samples[0]) == 3 and not self.samples[0][0]


CASES = [
    *(Case(f"prefill-{B}", [(0, 4900, 256)] * B) for B in (1, 4, 16)),
    *(Case(f"decode-{B}", [(0, 4900, 256)] * B, queries=1) for B in (1, 8, 64)),
    Case("train-4900", [(0, 4900, 512)] * 8, backward=True),
    Case("train-576", [(0, 576, 512)] * 8, backward=True),
    Case("llava-prefill", [(0, 0, 5156)]),
    Case("encoder", [(0, 4900)], encoder=True, H=16, D=72, groups=(16,)),
    Case("encoder-train", [(0, 729)] * 16, encoder=True, backward=True, H=16, D=72, groups=(16,)),
    Case("ragged", [(8, 4900, 200), (30, 576, 400), (0, 2304, 64), (60, 729, 900)], backward=True),
    Case("pictures", [(20, 576, 30, 576, 30, 576, 200)] * 4, backward=True),
    Case("text-only", [(0, 576, 300), (512,), (0, 576, 100), (800,)], backward=True),
]


class Inputs(NamedTuple):
    padded: list[Tensor]   # q (B, T, H, D), k and v (B, S, G, D): visual keys, then text keys
    packed: list[Tensor]   # q, k_visual, v_visual, k_text, v_text
    layout: tuple          # the rest of composite_attention's arguments
    mask: Tensor           # (B, T, S) bool; all False for padding
    real: Tensor           # (B, T) bool: queries that are not padding


def build(case: Case, G: int, device="cuda", dtype=torch.bfloat16) -> Inputs:
    sees, totals = [], []
    for sample in case.samples:
        is_visual = torch.cat([torch.full((n,), i % 2 == 1) for i, n in enumerate(sample)])
        counts = torch.stack([is_visual, ~is_visual], dim=1).cumsum(0)  # keys up to each position
        totals.append(counts[-1])
        rows = counts[is_visual == case.encoder][-(case.queries or 0):]
        sees.append(counts[-1:].expand_as(rows) if case.encoder else rows)
    queries = torch.tensor([len(rows) for rows in sees])
    visual, text = torch.stack(totals).T
    V, T, B = int(visual.max()), int(queries.max()), len(sees)
    S = V + int(text.max())
    limits = torch.nn.utils.rnn.pad_sequence(sees, batch_first=True)[..., None].to(device)
    n = torch.arange(S, device=device)
    mask = torch.where(n < V, n < limits[:, :, 0], n - V < limits[:, :, 1])
    padded = [torch.randn(B, rows, heads, case.D, device=device, dtype=dtype)
              for rows, heads in ((T, case.H), (S, G), (S, G))]
    q, k, v = padded
    real, of_visual, of_text = (torch.arange(length) < lengths[:, None] for lengths, length in
                                ((queries, T), (visual, V), (text, S - V)))
    packed = [q[real], k[:, :V][of_visual], v[:, :V][of_visual], k[:, V:][of_text],
              v[:, V:][of_text]]
    spans = [Span((length.cumsum(0) - length).int().to(device), length.int().to(device),
                  int(length.max())) for length in (queries, visual, text)]
    counts = [x.contiguous() for x in torch.cat(sees).int().to(device).T]
    first = [first_queries(spans[0], spans[i], counts[i - 1], len(packed[2 * i]))
             for i in (1, 2)]
    return Inputs(padded, packed, (*spans, *counts, first), mask, real.to(device))


def by_mask(q, k, v, mask):
    """The rule with every score in memory: (B, T, H, D), (B, S, G, D), mask (B, T, S)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], torch.finfo(q.dtype).min).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights * mask[:, None], v)


# ---- contestants: (B, T, H, D), (B, S, G, D) -> (B, T, H, D) ----

def contestants(case: Case, inputs: Inputs) -> dict:
    mask = inputs.mask
    B, T, S = mask.shape
    whole, bias = bool(mask.all()), None
    if not whole:  # padding sees everything, since a softmax over nothing is NaN
        bias = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)
        bias = bias.masked_fill(~mask.any(-1, keepdim=True), 0)[:, None]
    found = {"cuDNN": by_sdpa(bias, SDPBackend.CUDNN_ATTENTION),
             "efficient": by_sdpa(bias, SDPBackend.EFFICIENT_ATTENTION)}
    torch._dynamo.reset()  # or the ninth shape would run uncompiled
    flex = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    rule = create_block_mask(lambda b, h, q, k: mask[b, q, k], B, None, T, S, device=mask.device)
    found["flex"] = heads_first(functools.partial(flex, block_mask=rule))
    if whole or case.is_rectangle:
        causal = None if whole else causal_lower_right(T, S)
        found["flash"] = by_sdpa(causal, SDPBackend.FLASH_ATTENTION)
        if importlib.util.find_spec("flash_attn"):
            flash_attn = importlib.import_module("flash_attn")
            found["flash-attn"] = functools.partial(flash_attn.flash_attn_func, causal=not whole)
    if case.is_rectangle and case.samples[0][1] and not case.backward:
        found["two flash calls"] = functools.partial(two_calls, case.samples[0][1])
    return found


def heads_first(attend):
    """attend takes (B, heads, rows, D), and must be told if query heads share key heads."""
    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, enable_gqa=k.shape[1] < q.shape[1]).transpose(1, 2)
    return call


def by_sdpa(bias, backend):
    def attend(*args, **kwargs):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*args, attn_mask=bias, **kwargs)
    return heads_first(attend)


def two_calls(V: int, q, k, v):
    """Flash attention over the visual keys and over the text keys, merged by log-sum-exp."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    visual, visual_lse = flash(q, k[:, :, :V], v[:, :, :V], 0.0, False)[:2]
    text, text_lse = flash(q, k[:, :, V:], v[:, :, V:], 0.0, q.shape[2] > 1)[:2]
    weight = torch.sigmoid(visual_lse - text_lse)[..., None]
    return (weight * visual + (1 - weight) * text).to(q.dtype).transpose(1, 2)


# ---- the clock ----

class Clock:
    """CALLS calls in one graph, over rotating copies of the inputs."""

    def __init__(self, call, inputs: list[Tensor], backward: bool):
        size = sum(x.numel() * x.element_size() for x in inputs)
        cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
        copies = min(CALLS, 2 * cache // max(size, 1) + 2)
        self.sets = [[x.detach().clone().requires_grad_(backward) for x in inputs]
                     for _ in range(copies)]
        gradient = torch.randn_like(call(*inputs)) if backward else None

        def run(given):
            out = call(*given)
            if backward:
                torch.autograd.grad(out, given, gradient)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # compiles, which may not happen while recording
            for _ in range(3):
                run(self.sets[0])
        side.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _, given in zip(range(CALLS), itertools.cycle(self.sets)):
                run(given)
        self.times = []

    def round(self):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.times.append(begin.elapsed_time(end) / CALLS)

    def result(self) -> tuple[float, float]:
        """-> median milliseconds, half the distance between the quartiles as a part of it."""
        quartiles = torch.tensor([0.25, 0.5, 0.75])
        low, middle, high = torch.tensor(self.times).quantile(quartiles).tolist()
        return middle, (high - low) / 2 / middle


def take_turns(clocks: dict, rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    for number in range(rounds + 2):
        for clock in clocks.values():
            clock.round()
            if number == 1:
                clock.times.clear()  # the first two warm up
    return {name: clock.result() for name, clock in clocks.items()}


def ceilings() -> tuple[float, float]:
    """-> operations a second of a large matrix product, bytes a second of a large copy."""
    matrices = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    source = torch.empty(2 ** 30, device="cuda", dtype=torch.uint8)
    times = take_turns({"matmul": Clock(torch.matmul, matrices, False),
                        "copy": Clock(torch.clone, [source], False)})
    return (2 * 8192 ** 3 / times["matmul"][0] * 1e3, 2 * len(source) / times["copy"][0] * 1e3)


# ---- the command ----

def row(case: Case, G: int, matmul: float, copy: float, deadline: float) -> str:
    inputs = build(case, G)
    group = case.H // G
    heads = [x[:, :, :n] for x, n in zip(inputs.padded, (group, 1, 1))]
    want = by_mask(*(x.double() for x in heads), inputs.mask)[inputs.real]

    def error(out: Tensor) -> float:
        return float((out[:, :group].double() - want).norm())
    bound = 2 * error(by_mask(*heads, inputs.mask)[inputs.real])

    def ours(*packed):
        return composite_attention(*packed, *inputs.layout)
    if not error(ours(*inputs.packed)) <= bound:
        return f"| {case.name} | {G} | WRONG: {error(ours(*inputs.packed)):.1e} > {bound:.1e} |"
    clocks, failed = {"ours": Clock(ours, inputs.packed, case.backward)}, {}
    for name, attend in contestants(case, inputs).items():
        for repeats in sorted({1, group}):  # who cannot share key heads gets them repeated
            if name in clocks:
                continue
            keys = [x.repeat_interleave(repeats, 2) for x in inputs.padded[1:]]
            given = [inputs.padded[0], *keys]
            try:
                if time.monotonic() > deadline:
                    failed[name] = "no time left"
                elif not error(attend(*given)[inputs.real]) <= bound:
                    failed[name] = "wrong"
                else:
                    clocks[name] = Clock(attend, given, case.backward)
            except Exception as reason:  # a backend refuses a shape in many ways
                failed[name] = type(reason).__name__
    times = take_turns(clocks)
    best, spread = times.pop("ours")
    fastest = min((ms for ms, _ in times.values()), default=float("nan"))
    operations = int(inputs.mask.sum()) * case.H * 4 * case.D * (3.5 if case.backward else 1)
    size = sum(x.numel() * 2 for x in (*inputs.packed, inputs.packed[0]))
    others = [f"{name} {ms:.3f} ±{part:.0%}" for name, (ms, part) in times.items()]
    others += [f"{name}: {reason}" for name, reason in failed.items() if name not in times]
    cells = (case.name, G, f"{best:.3f} ±{spread:.0%}", f"{fastest:.3f}", f"{fastest / best:.2f}",
             f"{operations / best * 1e3 / matmul:.0%}", f"{size / best * 1e3 / copy:.0%}",
             ", ".join(others))
    return f"| {' | '.join(map(str, cells))} |"


def make_parser(name: str, doc: str, minutes: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m nanoeemllm.bench {name}", description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=minutes,
                        help="start nothing new after so many")
    return parser


def begin(parser: argparse.ArgumentParser, minutes: float) -> tuple[float, float, float]:
    """Prints what the GPU can do -> time to end at, operations and copied bytes a second."""
    if not torch.cuda.is_available():
        parser.error("no CUDA device found: run it on a machine that has one")
    deadline = time.monotonic() + 60 * minutes
    matmul, copy = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; matmul {matmul / 1e12:.0f} "
          f"TFLOP/s, copy {copy / 1e12:.2f} TB/s", flush=True)
    return deadline, matmul, copy


def main(argv: list[str]):
    parser = make_parser("kernel", __doc__, 8)
    parser.add_argument("--cases", help="beginnings of names, by commas; default: all of "
                        + ", ".join(case.name for case in CASES))
    args = parser.parse_args(argv)
    wanted = tuple(args.cases.split(",")) if args.cases else ("",)
    cases = [case for case in CASES if case.name.startswith(wanted)]
    if not cases:
        parser.error(f"--cases: {args.cases} fits none of {', '.join(c.name for c in CASES)}")
    deadline, matmul, copy = begin(parser, args.minutes)
    columns = ("case", "key heads", "ours, ms", "best other, ms", "times faster", "of matmul",
               "of copy", "others, ms")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case in cases:
        for G in case.groups:
            if time.monotonic() > deadline:
                print(f"| {case.name} | {G} | no time left |", flush=True)
            else:
                print(row(case, G, matmul, copy, deadline), flush=True)
                torch.cuda.empty_cache()
