"""The Triton kernels on a CUDA device, against the rule in float64: every entry of the tile tables that this GPU can run,
and what kernel_interpreted.py shows of them in Triton's interpreter. With pytest-xdist: -n 16."""

import os
import random

import pytest
import torch

from kernel_cases import NAMES, WIDTHS, Layout, Span, distances, of_kernel, random_case, reference, true_values, with_gradients
from nanoeemllm.kernels import composite_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
                                reason="needs a CUDA device, and TRITON_INTERPRET not set")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever a kernel leaves unwritten, and whatever it reads that nobody wrote, is NaN."""
    torch.cuda.empty_cache()
    torch.full((2 ** 26,), float("nan"), device="cuda")
    for size in (2 ** 9, 2 ** 12, 2 ** 16, 2 ** 19):  # the allocator keeps small blocks apart
        _ = [torch.full((size // 4,), float("nan"), device="cuda") for _ in range(16)]


@pytest.fixture
def fresh() -> int:
    """A seed that nobody has seen; a failure names it."""
    return random.SystemRandom().randrange(2 ** 31)


def compare(seed: int, case):
    """Errors against float64: 1e-5 in float32, else at most twice those of eager PyTorch in the same type."""
    want = true_values(*case)
    errors = distances(of_kernel(*case), want, case[2])
    eager = distances(with_gradients(reference, *case), want, case[2])
    for name, error, bound in zip(NAMES, errors, eager):
        limit = 1e-5 if case[0][0].dtype == torch.float32 else max(2 * bound, 1e-5)
        assert error <= limit, (seed, case[0][0].shape, name, error, bound)


def entries(table: str) -> list:
    """(table, number) of each tile of a table; which of them fit this GPU is known where it is."""
    try:
        from nanoeemllm.kernels import tiles
    except ImportError:  # no Triton here
        return []
    return [(table, n) for n in range(len(getattr(tiles, table)))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [72, 128])
@pytest.mark.parametrize("G", [32, 8])
@pytest.mark.parametrize("table, number", [entry for table in ("FORWARD", "FORWARD_FEW", "QUERY", "KEYS")
                                           for entry in entries(table)])
def test_every_entry(table, number, G, D, dtype, fresh, monkeypatch):
    from nanoeemllm.kernels import backward, forward, tiles
    module = forward if table.startswith("FORWARD") else backward
    tile = getattr(tiles, table)[number]
    case = random_case(fresh, D, dtype, longest=600, device="cuda", heads=(32, G))
    if not tiles.fits(tile, case[0][0]):
        pytest.skip("not for this GPU or head width")
    monkeypatch.setattr(module, table, [tile])
    if table == "FORWARD_FEW":  # whatever the number of queries
        monkeypatch.setattr(forward, "FEW", 2 ** 30)
    for splits in ((1, 3) if module is forward else (1,)):
        monkeypatch.setattr(tiles, "choose_splits", lambda *_: splits)
        compare(fresh, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(32))
def test_against_float64(number, dtype, fresh):
    D = WIDTHS[number % 8]
    compare(fresh, random_case(fresh, D, dtype, longest=300 if number < 24 else 3000, device="cuda"))


@pytest.mark.parametrize("splits", [3, 16])
@pytest.mark.parametrize("D", WIDTHS)
def test_split_keys(D, splits, fresh, monkeypatch):
    from nanoeemllm.kernels import tiles
    monkeypatch.setattr(tiles, "choose_splits", lambda *_: splits)
    compare(fresh, random_case(fresh, D, torch.float32, longest=2000, device="cuda"))


def test_other_samples_and_repeated_runs_keep_their_bits():
    for seed in range(100):
        tensors, layout, gradient = random_case(seed, 128, torch.bfloat16, device="cuda")
        if len(layout.query.start) > 1 and layout.query.length[0] and layout.text.length[0]:
            break
    before, again = (of_kernel(tensors, layout, gradient) for _ in range(2))
    assert all(map(torch.equal, before, again))
    own = [slice(int(span.start[0]), int(span.start[0] + span.length[0])) for span in layout[:3]]
    for x, which in zip(tensors, (0, 1, 1, 2, 2)):
        x[own[which]] += 1
    after = of_kernel(tensors, layout, gradient)
    for a, b, which in zip(before, after, (0, 0, 1, 1, 2, 2)):
        others = torch.ones(len(a), dtype=torch.bool)
        others[own[which]] = False
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("B", [1, 8, 64])
def test_decoding_in_a_cuda_graph(B):
    """One recording, replayed while the cache grows; nothing is tuned, so nothing needs a call before it but compiling."""
    room, G, H, D = 600, 2, 8, 128
    at = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(B * rows, heads, D, device="cuda", dtype=torch.bfloat16)
               for rows, heads in ((1, H), (room, G), (room, G)))
    starts, none = at([b * room for b in range(B)]), at([0] * B)
    text = Span(starts, at([100 + b for b in range(B)]), room)
    layout = Layout(Span(at(list(range(B))), at([1] * B), 1), Span(starts, none, 0), text, none, text.length)
    step = lambda: composite_attention(q, k[:0], v[:0], k, v, *layout)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(5):
        text.length.add_(37)
        out.fill_(float("nan"))
        graph.replay()
        want = reference(*(x.double() for x in (q, k[:0], v[:0], k, v)), *layout)
        assert float((out.double() - want).norm() / want.norm()) < 1e-2


def test_no_host_synchronisation():
    tensors, layout, gradient = random_case(4, 64, torch.bfloat16, device="cuda")
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            leaves = [x.detach().requires_grad_() for x in tensors]
            torch.autograd.grad(composite_attention(*leaves, *layout), leaves, gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_by_inductor():
    tensors, layout, gradient = random_case(4, 64, torch.bfloat16, device="cuda")
    layer = lambda *x: composite_attention(*(y * 2 for y in x), *layout)
    compiled = torch.compile(layer, fullgraph=True)
    got, want = (with_gradients(lambda *x: f(*x[:5]), tensors, layout, gradient) for f in (compiled, layer))
    assert max(distances(got, want, gradient)) < 1e-2
