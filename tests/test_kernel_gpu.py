"""The Triton kernels on a CUDA device, against the rule in float64: what kernel_interpreted.py shows of them in Triton's
interpreter, and bfloat16, which the interpreter cannot multiply."""

import os
import random

import pytest
import torch

from kernel_cases import NAMES, WIDTHS, distances, random_case, true_values, with_gradients
from nanoeemllm.attention import Run, attention_reference, composite_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
                                reason="needs a CUDA device, and TRITON_INTERPRET not set")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever a kernel leaves unwritten, and whatever it reads that nobody wrote, is NaN."""
    torch.cuda.empty_cache()
    torch.full((2 ** 28,), float("nan"), device="cuda")
    for size in (2 ** 9, 2 ** 12, 2 ** 16, 2 ** 19):  # the allocator keeps small blocks apart
        _ = [torch.full((size // 4,), float("nan"), device="cuda") for _ in range(16)]


@pytest.fixture
def fresh() -> int:
    """A seed that nobody has seen; a failure names it."""
    return random.SystemRandom().randrange(2 ** 31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", range(100))
def test_against_float64(number, dtype, fresh):
    D = WIDTHS[number % 8]
    case = random_case(fresh, D, dtype, longest=300 if number < 80 else 3000, device="cuda")
    want = true_values(*case)
    errors = distances(with_gradients(composite_attention, *case), want, case[2])
    eager = distances(with_gradients(attention_reference, *case), want, case[2])
    for name, error, bound in zip(NAMES, errors, eager):
        assert error <= (1e-5 if dtype == torch.float32 else max(2 * bound, 1e-5)), (fresh, D, name, error, bound)


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("D", WIDTHS)
def test_split_keys(D, splits, fresh, monkeypatch):
    from nanoeemllm import kernel
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    case = random_case(fresh, D, torch.float32, longest=2000, device="cuda")
    errors = distances(with_gradients(composite_attention, *case), true_values(*case), case[2])
    assert max(errors) <= 1e-5, (fresh, D, errors)


def test_other_samples_and_repeated_runs_keep_their_bits():
    tensors, runs, gradient = random_case(5, 128, torch.bfloat16, device="cuda")
    before, again = (with_gradients(composite_attention, tensors, runs, gradient) for _ in range(2))
    assert all(map(torch.equal, before, again))
    own = [slice(int(run.start[0]), int(run.start[0] + run.length[0])) for run in runs]
    for x, which in zip(tensors, (0, 1, 1, 2, 2)):
        x[own[which]] += 1
    after = with_gradients(composite_attention, tensors, runs, gradient)
    for a, b, which in zip(before, after, (0, 0, 1, 1, 2, 2)):
        others = torch.ones(len(a), dtype=torch.bool)
        others[own[which]] = False
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("B", [1, 8, 64])
def test_decoding_in_a_cuda_graph(B):
    """One recording, replayed while the cache grows."""
    room, G, H, D = 600, 2, 8, 128
    at = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(B * rows, heads, D, device="cuda", dtype=torch.bfloat16)
               for rows, heads in ((1, H), (room, G), (room, G)))
    rows = torch.arange(room, dtype=torch.int32, device="cuda").repeat(B)
    starts = at([b * room for b in range(B)])
    text = Run(starts, at([100 + b for b in range(B)]), rows, room)
    query = Run(at(list(range(B))), at([1] * B), text.length - 1, 1)
    visual = Run(starts, torch.zeros_like(starts), rows[:0], 0)
    step = lambda: composite_attention(q, k[:0], v[:0], k, v, query, visual, text)
    for _ in range(3):
        step()  # compiles and chooses tile sizes, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(5):
        text.length.add_(37)
        query.position.add_(37)
        out.fill_(float("nan"))
        graph.replay()
        want = attention_reference(*(x.double() for x in (q, k[:0], v[:0], k, v)), query, visual, text)
        assert float((out.double() - want).norm() / want.norm()) < 1e-2


def test_no_host_synchronisation():
    tensors, runs, gradient = random_case(4, 64, torch.bfloat16, device="cuda")
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            leaves = [x.detach().requires_grad_() for x in tensors]
            torch.autograd.grad(composite_attention(*leaves, *runs), leaves, gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_by_inductor():
    tensors, runs, gradient = random_case(4, 64, torch.bfloat16, device="cuda")
    layer = lambda *x: composite_attention(*(y * 2 for y in x), *runs)
    compiled = torch.compile(layer, fullgraph=True)
    got, want = (with_gradients(lambda *x: f(*x[:5]), tensors, runs, gradient) for f in (compiled, layer))
    assert max(distances(got, want, gradient)) < 1e-2
