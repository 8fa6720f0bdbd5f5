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

import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence

from nanoeemllm.attention import Keys, Span, Visibility, attention, attention_reference
from nanoeemllm.bench.clock import take_turns
from nanoeemllm.border.command import Parser, positive
from nanoeemllm.border.table import print_table
from nanoeemllm.config import IMAGE_TOKEN, UserError
from nanoeemllm.layout import build_layout
from nanoeemllm.vision import whole_images

CALLS = 10   # in one graph
ROUNDS = 15


class Case(NamedTuple):
    """samples: lengths of text, picture, text, picture, ... All text rows are queries; decoding,
    one new row a sample that sees everything; in an encoder all rows, which see their sample."""
    name: str
    samples: list[tuple[int, ...]]
    decode: bool = False
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
    *(Case(f"decode-{B}", [(0, 4900, 256)] * B, decode=True) for B in (1, 8, 64)),
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
    packed: list[Tensor]   # q, k_visual, v_visual, k_text, v_text
    sees: Visibility
    padded: list[Tensor]   # q (B, H, T, D), k and v (B, G, S, D): visual keys, then text keys
    mask: Tensor           # (B, T, S) bool; all False for padding


def visibility(case: Case, device: torch.device) -> Visibility:
    """Who sees whom, as the model has it in such a pass."""
    if case.encoder:
        return whole_images([sum(sample) for sample in case.samples], device)
    pieces = [[[IMAGE_TOKEN] if i % 2 else [1] * n for i, n in enumerate(sample)]
              for sample in case.samples]
    grids = [[(1, n) for n in sample[1::2]] for sample in case.samples]
    layout = build_layout([sum(sample, []) for sample in pieces], grids)[1].to(device)
    if not case.decode:
        return layout.text_queries
    row = torch.arange(len(grids), dtype=torch.int32, device=device)
    return Visibility(Span(row, torch.ones_like(row), 1), layout.visual, layout.text,
                      layout.visual.length, layout.text.length)


def build(case: Case, G: int, device="cuda", dtype=torch.bfloat16) -> Inputs:
    sees = visibility(case, torch.device(device))
    packed = [torch.randn(int(span.length.sum()), heads, case.D, device=device, dtype=dtype)
              for span, heads in ((sees.query, case.H), (sees.visual, G), (sees.visual, G),
                                  (sees.text, G), (sees.text, G))]

    def pad(x: Tensor, span: Span) -> Tensor:
        return pad_sequence(x.split(span.length.tolist()), batch_first=True)

    q, *keys = packed
    k, v = (torch.cat([pad(visual, sees.visual), pad(text, sees.text)], dim=1)
            for visual, text in zip(keys[:2], keys[2:]))
    visual, text = (pad(counts, sees.query)[..., None]                     # (B, T, 1)
                    for counts in (sees.sees_visual, sees.sees_text))
    n, V = torch.arange(k.shape[1], device=device), sees.visual.max_length
    mask = torch.where(n < V, n < visual, n - V < text)
    padded = [x.transpose(1, 2) for x in (pad(q, sees.query), k, v)]
    return Inputs(packed, sees, padded, mask)


# ---- contestants: (B, H, T, D), (B, G, S, D) -> (B, H, T, D) ----

def contestants(case: Case, inputs: Inputs) -> dict[str, Callable]:
    mask, V = inputs.mask, inputs.sees.visual.max_length
    B, T, S = mask.shape
    whole = bool(mask.all())
    bias = None if whole else bias_of(mask, torch.bfloat16)
    torch._dynamo.reset()  # or the ninth shape would run uncompiled
    flex = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    rule = create_block_mask(lambda b, h, q, k: mask[b, q, k], B, None, T, S, device=mask.device)
    found = {"cuDNN": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION, bias),
             "efficient": functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION, bias),
             "flex": functools.partial(flex, block_mask=rule, enable_gqa=True)}
    if whole or case.is_rectangle:
        causal = None if whole else causal_lower_right(T, S)
        found["flash"] = functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, causal)
        if importlib.util.find_spec("flash_attn"):
            flash_attn = importlib.import_module("flash_attn").flash_attn_func
            found["flash-attn"] = lambda *qkv: flash_attn(
                *(x.transpose(1, 2) for x in qkv), causal=not whole).transpose(1, 2)
    if case.is_rectangle and V and not case.backward:
        found["two flash calls"] = functools.partial(two_calls, V)
    return found


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, S) -> (B, 1, T, S), 0 or -inf. Padding sees everything, since a softmax over nothing
    is NaN."""
    seen = mask | ~mask.any(-1, keepdim=True)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None]


def sdpa(backend: SDPBackend, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


def two_calls(V: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flash attention over the visual keys and over the text keys, merged by log-sum-exp."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    visual, visual_lse = flash(q, k[:, :, :V], v[:, :, :V], 0.0, False)[:2]
    text, text_lse = flash(q, k[:, :, V:], v[:, :, V:], 0.0, q.shape[2] > 1)[:2]
    weight = torch.sigmoid(visual_lse - text_lse)[..., None]
    return (weight * visual + (1 - weight) * text).to(q.dtype)


# ---- the clock ----

def record(call: Callable, inputs: list[Tensor], backward: bool = False) -> Callable[[], float]:
    """CALLS calls in one graph, over rotating copies of the inputs -> what replays it."""
    size = sum(x.nbytes for x in inputs)
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    copies = min(CALLS, 2 * cache // max(size, 1) + 2)
    sets = [[x.detach().clone().requires_grad_(backward) for x in inputs] for _ in range(copies)]
    gradient = torch.randn_like(call(*inputs)) if backward else None

    def run(given: list[Tensor]):
        out = call(*given)
        if backward:
            torch.autograd.grad(out, given, gradient)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, which may not happen while recording
        for _ in range(3):
            run(sets[0])
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _, given in zip(range(CALLS), itertools.cycle(sets)):
            run(given)

    return functools.partial(replay, graph, sets)


def replay(graph: torch.cuda.CUDAGraph, sets: list[list[Tensor]]) -> float:
    """-> milliseconds of a call. sets: held here, since the graph reads them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def median_times(replays: dict[str, Callable]) -> dict[str, tuple[float, float]]:
    """-> median milliseconds, half the distance between the quartiles as a part of it."""
    found = {}
    for name, times in take_turns(replays, ROUNDS, warm_up=2).items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        found[name] = median, (high - low) / 2 / median
    return found


# ---- the command ----

class Session(NamedTuple):
    """What a command on a GPU begins with."""
    cases: list[Case]
    deadline: float        # by time.monotonic(); nothing new is started after it
    matmul: float          # operations a second of a large matrix product
    copy: float            # bytes a second of a large copy, read and written

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline


def begin(command: str, about: str, minutes: int, argv: list[str]) -> Session:
    """Reads the flags and prints what the GPU can do."""
    parser = Parser(about, f"python -m nanoeemllm.bench {command}")
    parser.add_argument("--minutes", type=positive(float), default=minutes,
                        help=f"start nothing new after so many ({minutes})")
    known = ", ".join(case.name for case in CASES)
    parser.add_argument("--cases", default="", metavar="A,B",
                        help=f"beginnings of names; default: all of {known}")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if case.name.startswith(tuple(args.cases.split(",")))]
    if not cases:
        raise UserError(f"--cases: {args.cases} fits none of {known}")
    if not torch.cuda.is_available():
        raise UserError("no CUDA device found: run it on a machine that has one")
    deadline, n = time.monotonic() + 60 * args.minutes, 8192
    matrices = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    source = torch.empty(2 ** 30, device="cuda", dtype=torch.uint8)
    times = median_times({"matmul": record(torch.matmul, matrices),
                          "copy": record(torch.clone, [source])})
    matmul, copy = 2e3 * n ** 3 / times["matmul"][0], 2e3 * len(source) / times["copy"][0]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; matmul {matmul / 1e12:.0f} "
          f"TFLOP/s, copy {copy / 1e12:.2f} TB/s\n", flush=True)
    return Session(cases, deadline, matmul, copy)


def main(command: str, argv: list[str]):
    print_table(lines(begin(command, __doc__, 8, argv)))


def lines(session: Session) -> Iterator[dict[str, str]]:
    for case, G in [(case, G) for case in session.cases for G in case.groups]:
        row = {"case": case.name, "key heads": str(G)}
        if session.is_over:
            yield row | {"ours, ms": "no time left"}
        else:
            yield row | compare(case, G, session)
            torch.cuda.empty_cache()


def compare(case: Case, G: int, session: Session) -> dict[str, str]:
    inputs = build(case, G)
    group, sees = case.H // G, inputs.sees
    # one key head and its query heads by the rule, with every score in memory
    q, *keys = (x[:, :n] for x, n in zip(inputs.packed, (group, 1, 1, 1, 1)))
    want = attention_reference(q.double(), Keys(*(x.double() for x in keys)), sees)
    bound = 2 * (attention_reference(q, Keys(*keys), sees) - want).norm()

    def is_right(out: Tensor) -> bool:
        return bool((out[:, :group] - want).norm() <= bound)     # NaN is not

    def ours(q: Tensor, *keys: Tensor) -> Tensor:
        return attention(q, Keys(*keys), sees)

    replays = {"ours": record(ours, inputs.packed, case.backward)}
    others = {} if is_right(ours(*inputs.packed)) else {"ours": "WRONG"}
    real, (q, *keys) = inputs.mask.any(-1), inputs.padded                # (B, T): no padding
    repeated = [x.repeat_interleave(group, dim=1) for x in keys]  # for who cannot share key heads
    for name, call in contestants(case, inputs).items():
        for given in ([q, *keys], [q, *repeated]):
            try:
                if session.is_over:
                    others[name] = "no time left"
                elif not is_right(call(*given).transpose(1, 2)[real]):
                    others[name] = "wrong"
                else:
                    replays[name] = record(call, given, case.backward)
                    break
            except Exception as reason:  # a backend refuses a shape in many ways
                others[name] = type(reason).__name__
    times = median_times(replays)
    ms, spread = times.pop("ours")
    others |= {name: f"{other:.3f} ±{part:.0%}" for name, (other, part) in times.items()}
    fastest = min((other for other, _ in times.values()), default=float("nan"))
    pairs = int(sees.sees_visual.sum() + sees.sees_text.sum())
    operations = pairs * case.H * 4 * case.D * (3.5 if case.backward else 1)
    size = sum(x.nbytes for x in (*inputs.packed, inputs.packed[0]))
    return {"ours, ms": f"{ms:.3f} ±{spread:.0%}",
            "best other, ms": f"{fastest:.3f}",
            "times faster": f"{fastest / ms:.2f}",
            "of matmul": f"{operations / ms * 1e3 / session.matmul:.0%}",
            "of copy": f"{size / ms * 1e3 / session.copy:.0%}",
            "others, ms": ", ".join(f"{name}: {what}" for name, what in others.items())}
