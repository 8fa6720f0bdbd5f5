"""The attention kernel beside the best of what PyTorch has for the same result, and beside what the GPU can do at most.

    python -m nanoeemllm.bench kernel        needs a CUDA device; bfloat16, head width 128, 32 heads, 32 and 8 key heads

Every sample is one picture and then its text, so that a lower-right causal bias over concatenated keys is the same
rule and every contestant can take part: `scaled_dot_product_attention` on its flash, cuDNN and memory-efficient
backends, FlexAttention, and flash-attn where it is installed. They get their keys concatenated, their masks built,
and key heads repeated where they cannot share them, all outside the clock. Before it is timed, each is held against
the rule in float64. A call is recorded as a CUDA graph, so the clock sees the GPU and not Python; the L2 cache is
flushed between calls; figures are medians.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanoeemllm.attention import Run, attention_reference, composite_attention
from nanoeemllm.command_line import Parser
from nanoeemllm.config import UserError

H, D, DEVICE = 32, 128, "cuda"


class Case(NamedTuple):
    name: str
    batch: int
    queries: int        # the last rows of each sample
    visual: int
    text: int
    backward: bool = False

    @property
    def keys(self) -> int:
        return self.visual + self.text

    def operations(self) -> float:
        """Multiplications and additions of the products over pairs that see each other: 2 forward, 5 more backward."""
        pairs = self.queries * self.keys - self.queries * (self.queries - 1) / 2
        return self.batch * H * pairs * 2 * 2 * D * (3.5 if self.backward else 1)

    def bytes(self, G: int) -> float:
        """Forward: q, k and v read once, the output written once."""
        return 2 * D * self.batch * 2 * (self.queries * H + self.keys * G)


CASES = [*(Case("prefill", batch, 256, 4900, 256) for batch in (1, 4, 16)),
         *(Case("decode", batch, 1, 4900, 256) for batch in (1, 8, 64)),
         Case("train", 8, 512, 4900, 512, True), Case("train", 8, 512, 576, 512, True),
         Case("llava prefill", 1, 5156, 0, 5156)]


def main(argv: list[str]):
    Parser(__doc__, "python -m nanoeemllm.bench kernel").parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("bench kernel times a GPU and found no CUDA device: run it on a machine that has one")
    import triton
    matmul, copy = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
          f"matmul {matmul / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s\n")
    columns = ("case", "batch", "queries x keys", "key heads", "ours, ms", "best other, ms", "times faster",
               "of matmul", "of copy", "others, ms")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case in CASES:
        for G in (32, 8):
            print(row(case, G, matmul, copy), flush=True)


def row(case: Case, G: int, matmul: float, copy: float) -> str:
    tensors, runs = inputs(case, G)
    gradient = torch.randn_like(tensors[0])
    want, bound = checked(case, tensors, runs, gradient, G)
    ours = contest(lambda *x: composite_attention(*x, *runs), tensors, gradient, case, want[0], bound)
    if isinstance(ours, str):
        raise UserError(f"bench kernel: {ours} from the kernel itself at {case}, {G} key heads: please report it")
    rectangle = [x.detach().unflatten(0, (case.batch, -1)) for x in (gradient, *tensors)]
    padded = [rectangle[1], torch.cat(rectangle[2::2], 1), torch.cat(rectangle[3::2], 1)]
    others = {name: contest(attend, padded, rectangle[0], case, want[0], bound)
              for name, attend in contestants(case, G).items()}
    best = min((t for t in others.values() if not isinstance(t, str)), default=float("nan"))
    listed = ", ".join(f"{name} {t if isinstance(t, str) else f'{t:.3f}'}" for name, t in others.items())
    return (f"| {case.name} | {case.batch} | {case.queries} x {case.keys} | {G} | {ours:.3f} | {best:.3f} "
            f"| {best / ours:.2f} | {case.operations() / ours * 1e3 / matmul:.0%} "
            f"| {case.bytes(G) / ours * 1e3 / copy:.0%} | {listed} |")


def checked(case: Case, tensors, runs, gradient, G: int) -> tuple[list[Tensor], float]:
    """The float64 truth of the heads that share key head 0, and how far off an output may be: twice what eager bfloat16
    is. Raises if one of the kernel's gradients is further off than twice the eager one."""
    group = H // G

    def of_first_heads(attend, dtype):
        part = [x.detach()[:, :heads].to(dtype).requires_grad_() for x, heads in zip(tensors, (group, 1, 1, 1, 1))]
        out = attend(*part, *runs)
        grads = torch.autograd.grad(out, part, gradient[:, :group].to(dtype)) if case.backward else []
        return [out.detach(), *grads]
    want = of_first_heads(attention_reference, torch.float64)
    eager = of_first_heads(attention_reference, torch.bfloat16)
    ours = of_first_heads(composite_attention, torch.bfloat16)
    for name, w, e, o in zip(("out", "dq", "dk_visual", "dv_visual", "dk_text", "dv_text"), want, eager, ours):
        if not distance(o, w) <= 2 * distance(e, w):
            raise UserError(f"bench kernel: {name} at {case} is off by {distance(o, w):.1e}, eager PyTorch by "
                            f"{distance(e, w):.1e}: please report it")
    return want, 2 * distance(eager[0], want[0])


def distance(x: Tensor, want: Tensor) -> float:
    return float((x.double() - want).norm() / want.norm().clamp(min=1e-300))


def inputs(case: Case, G: int):
    B, numbers = case.batch, functools.partial(torch.arange, dtype=torch.int32, device=DEVICE)
    shapes = (case.queries, H), (case.visual, G), (case.visual, G), (case.text, G), (case.text, G)
    tensors = [torch.randn(B * rows, heads, D, device=DEVICE, dtype=torch.bfloat16) for rows, heads in shapes]

    def run(rows: int, first: int) -> Run:
        start = numbers(B) * rows
        return Run(start, torch.full_like(start, rows), numbers(first, first + rows).repeat(B), rows)
    return tensors, (run(case.queries, case.keys - case.queries), run(case.visual, 0), run(case.text, case.visual))


# ---- who takes part: (B, queries, H, D), (B, keys, G, D) -> (B, queries, H, D) ----

def contestants(case: Case, G: int) -> dict:
    T, S = case.queries, case.keys
    mask = torch.ones(T, S, dtype=torch.bool, device=DEVICE).tril(S - T)
    bias = None if T == 1 else causal_lower_right(T, S)
    rule = create_block_mask(lambda b, h, q, k: k <= q + (S - T), None, None, T, S, device=DEVICE)
    torch._dynamo.reset()  # or the ninth shape would run uncompiled
    flex = torch.compile(flex_attention, dynamic=False)

    def heads_first(attend, **how):
        return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=k.shape[2] < H,
                                      **how).transpose(1, 2)

    def sdpa(backend, bias):
        return sdpa_kernel(backend)(heads_first(F.scaled_dot_product_attention, attn_mask=bias))

    found = {"flash": sdpa(SDPBackend.FLASH_ATTENTION, bias),
             "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, bias if T == S or T == 1 else mask),
             "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION, bias), "flex": heads_first(flex, block_mask=rule)}
    try:
        from flash_attn import flash_attn_func
        found["flash-attn"] = functools.partial(flash_attn_func, causal=True)
    except ImportError:
        pass
    return found


def contest(attend, tensors: list[Tensor], gradient: Tensor, case: Case, want: Tensor, bound: float) -> float | str:
    """-> milliseconds, or a word on why there are none. Who cannot share key heads gets them repeated beforehand."""
    reason = ""
    for repeats in sorted({1, H // tensors[1].shape[-2]}):
        given = [x.detach().repeat_interleave(1 if x.shape[-2] == H else repeats, -2).requires_grad_(case.backward)
                 for x in tensors]
        try:
            out = attend(*given)
            if not distance(out.detach().reshape(-1, H, D)[:, :want.shape[1]], want) <= bound:
                return "wrong"
            return milliseconds((lambda: torch.autograd.grad(attend(*given), given, gradient)) if case.backward
                                else lambda: attend(*given))
        except Exception as error:  # a backend that does not take this shape says so in many ways
            reason = type(error).__name__
    return f"none ({reason})"


# ---- the clock ----

def milliseconds(call) -> float:
    from triton.testing import do_bench
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles and autotunes, which may not happen while recording
        for _ in range(3):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=50, rep=300, return_mode="median")


def ceilings() -> tuple[float, float]:
    """-> operations a second of a large bfloat16 matrix product, bytes a second (read and written) of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.empty(2 ** 30, device="cuda", dtype=torch.uint8) for _ in range(2))
    return 2 * 8192 ** 3 / milliseconds(lambda: a @ b) * 1e3, 2 * len(x) / milliseconds(lambda: y.copy_(x)) * 1e3
