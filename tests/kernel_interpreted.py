"""The Triton kernels under Triton's interpreter, on a CPU, against the rule in float64.

Triton decides when it is imported whether kernels are interpreted or compiled, so test_kernel.py runs this file in a
process of its own. To see its tests one by one: TRITON_INTERPRET=1 python -m pytest tests/kernel_interpreted.py
"""

import math
import random

import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from kernel_cases import (NAMES, WIDTHS, Layout, Span, distances, int32, layout_of, of_kernel, random_case, reference,
                          true_values, with_gradients)
from nanoeemllm import kernels
from nanoeemllm.kernels import composite_attention, first_queries, forward, tiles

# log2(0) = -inf is meant, and NaN is planted
pytestmark = [pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
              pytest.mark.filterwarnings("ignore:All-NaN slice encountered")]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Float32 has small tiles on a GPU; the interpreter's time goes by the number of blocks."""
    monkeypatch.setattr(tiles, "SMALL", tiles.SMALL._replace(own=64, step=64))


def nothing(samples: int) -> Span:
    return Span(torch.zeros(samples, dtype=torch.int32), torch.zeros(samples, dtype=torch.int32), 0)


def causal(rows: int) -> Layout:
    span = Span(int32(0), int32(rows), rows)
    return Layout(span, nothing(1), span, torch.zeros(rows, dtype=torch.int32), int32(*range(1, rows + 1)))


# ---- 200 random layouts, each head width 25 times ----

@pytest.mark.parametrize("seed", range(200))
def test_float32(seed, monkeypatch):
    own, step = ((64, 64), (128, 64), (64, 32), (64, 128))[seed // 8 % 4]
    monkeypatch.setattr(tiles, "SMALL", tiles.SMALL._replace(own=own, step=step))
    case = random_case(seed, WIDTHS[seed % 8], torch.float32, longest=100)
    errors = distances(of_kernel(*case), true_values(*case), case[2])
    assert max(errors) <= 1e-5, dict(zip(NAMES, errors))


@pytest.mark.parametrize("seed", range(200, 248))
def test_float16_is_at_most_twice_as_far_off_as_eager_pytorch(seed):
    case = random_case(seed, WIDTHS[seed % 8], torch.float16, longest=100)
    want = true_values(*case)
    errors = distances(of_kernel(*case), want, case[2])
    eager = distances(with_gradients(reference, *case), want, case[2])
    for name, error, bound in zip(NAMES, errors, eager):
        assert error <= max(2 * bound, 1e-5), (name, error, bound)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_query_that_sees_a_key(seed):
    tensors, layout, _ = random_case(seed, 16, torch.float32, longest=40)
    for span, sees, rows in ((layout.visual, layout.sees_visual, len(tensors[1])),
                             (layout.text, layout.sees_text, len(tensors[3]))):
        first = first_queries(layout.query, span, sees, rows)
        assert first.dtype == torch.int32 and len(first) == rows
        for b in range(len(span.start)):
            start, length = int(layout.query.start[b]), int(layout.query.length[b])
            counts = sees[start:start + length].tolist()
            for n in range(int(span.length[b])):
                want = next((i for i, count in enumerate(counts) if count > n), length)
                assert first[int(span.start[b]) + n] == want


# ---- keys shared out over programs ----

@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("seed", range(300, 308))
def test_split_keys(seed, splits, monkeypatch):
    monkeypatch.setattr(tiles, "choose_splits", lambda *_: splits)
    case = random_case(seed, WIDTHS[seed % 8], torch.float32, longest=100)
    errors = distances(of_kernel(*case), true_values(*case), case[2])
    assert max(errors) <= 1e-5, dict(zip(NAMES, errors))


@pytest.mark.parametrize("splits", [1, 4])
def test_decoding_reads_the_cache_in_place_at_its_length_on_the_device(splits, monkeypatch):
    """The same arguments, one number in memory changed; what lies beyond is not read."""
    monkeypatch.setattr(tiles, "choose_splits", lambda *_: splits)
    B, G, D, room = 2, 2, 32, 200
    cache_k, cache_v, image_k, image_v = torch.randn(4, B * room, G, D)
    q = torch.randn(B, 4, D)
    text = Span(int32(0, room), int32(60, 3), room)
    layout = Layout(Span(int32(0, 1), int32(1, 1), 1), Span(int32(0, room), int32(70, 0), room), text,
                    int32(70, 0), text.length)
    for grown in (0, 1, 90):
        text.length.add_(grown)
        tensors = [x.clone() for x in (q, image_k, image_v, cache_k, cache_v)]
        want = reference(*(x.double() for x in tensors), *layout)
        for x in tensors[1:3]:
            x[70:] = float("nan")
        for x in tensors[3:]:
            x[text.length[0]:room] = x[room + text.length[1]:] = float("nan")
        torch.testing.assert_close(composite_attention(*tensors, *layout).double(), want, rtol=1e-5, atol=1e-6)


def test_samples_may_share_keys():
    q, k, v = torch.randn(4, 2, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    layout = Layout(Span(int32(0, 2), int32(2, 2), 2), Span(int32(0, 0), int32(9, 5), 9), nothing(2),
                    int32(3, 9, 1, 5), int32(0, 0, 0, 0))
    tensors = (q, k, v, k[:0], v[:0])
    torch.testing.assert_close(composite_attention(*tensors, *layout), reference(*tensors, *layout))


H100 = 132


@pytest.mark.parametrize("G", [8, 32])
def test_splits_are_balanced(G):
    """One answer over a picture of 4,900 tokens and 256 of text: no program does over 1 / 0.95 of the mean, and they
    fill one round of the GPU's places."""
    tile = tiles.choose_tile(tiles.FORWARD_FEW, torch.empty(1, 32, 128, dtype=torch.bfloat16))
    blocks = math.ceil(4900 / tile.step) + math.ceil(256 / tile.step)
    splits = tiles.choose_splits(G, blocks, 2 * H100)
    shares = [(split + 1) * blocks // splits - split * blocks // splits for split in range(splits)]
    assert sum(shares) == blocks and sum(shares) / splits >= 0.95 * max(shares)
    assert 0.95 * 2 * H100 <= G * splits <= 2 * H100


def test_how_many_splits():
    assert tiles.choose_splits(64, 41, H100) == 2        # prefill of 256 queries, 32 heads: 128 programs of 132
    assert tiles.choose_splits(2048, 41, H100) == 1      # enough work as it is
    assert tiles.choose_splits(32, 0, 2 * H100) == tiles.choose_splits(32, 1, 2 * H100) == 1


# ---- launches and fills ----

class Fills(TorchDispatchMode):
    """Names of the ATen operations that fill a tensor (the interpreter itself copies some)."""
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if any(word in name for word in ("zero", "fill", "full", "ones")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    names, run = [], InterpretedFunction.run

    def counted(self, *args, **meta):
        names.append(self.fn.__name__)
        return run(self, *args, **meta)
    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return names


@pytest.mark.parametrize("splits", [1, 3])
def test_launches_and_fills(splits, launched, monkeypatch):
    """Forward is one launch, or two with split keys, backward three, and nothing is filled to be overwritten."""
    monkeypatch.setattr(tiles, "choose_splits", lambda *_: splits)
    (*tensors, last), layout, gradient = random_case(4, 32, torch.float32, longest=60)
    tensors = [x.contiguous() for x in (*tensors, last)]
    tables = [x for span in layout[:3] for x in span[:2]] + [layout.sees_visual, layout.sees_text]
    tables += layout.first(len(tensors[1]), len(tensors[3]))
    lengths = [span.max_length for span in layout[:3]]
    assert min(lengths) > 0
    with Fills() as fills:
        out, lse = forward.launch_forward(tensors[0], tensors[1:], tables, lengths, 0.2)
        assert launched == ["forward_kernel"] + ["combine_kernel"] * (splits > 1)
        kernels.attend_backward(gradient, out, lse, *tensors, tables, lengths, 0.2, [True, True, True])
    assert launched[-3:] == ["delta_kernel", "query_kernel", "keys_kernel"] and len(launched) == 4 + (splits > 1)
    assert fills.seen == []


@pytest.mark.parametrize("wanted", [(1, 2), (0,), (3,), (2, 4), (0, 1, 2, 3, 4)])
def test_gradients_of_some_inputs_only(wanted, launched):
    """Frozen parts cost nothing: no kernel runs for them."""
    tensors, layout, gradient = random_case(4, 32, torch.float32, longest=60)
    want = true_values(tensors, layout, gradient)[1:]
    tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    composite_attention(*tensors, *layout).backward(gradient)
    for i, (x, w) in enumerate(zip(tensors, want)):
        assert (x.grad is not None) == (i in wanted)
        if x.grad is not None:
            torch.testing.assert_close(x.grad.double(), w, rtol=1e-4, atol=1e-5)
    assert launched == (["forward_kernel", "delta_kernel"] + ["query_kernel"] * (0 in wanted)
                        + ["keys_kernel"] * bool({1, 2, 3, 4} & {*wanted}))


# ---- what must hold exactly ----

def own_rows(layout: Layout) -> list[slice]:
    """Of the first sample: queries, visual keys, text keys."""
    return [slice(int(span.start[0]), int(span.start[0] + span.length[0])) for span in layout[:3]]


def test_changing_one_sample_moves_no_bit_of_another():
    seed = next(seed for seed in range(100) if (lambda layout: len(layout.query.start) > 1 and layout.text.length[0]
                and layout.query.length[0] and layout.query.length[1])(random_case(seed, 16, torch.float32, 100)[1]))
    tensors, layout, gradient = random_case(seed, 32, torch.float32, longest=100)
    before = of_kernel(tensors, layout, gradient)
    own = own_rows(layout)
    changed = [x.clone() for x in tensors]
    for x, which in zip(changed, (0, 1, 1, 2, 2)):
        x[own[which]] += 1
    after = of_kernel(changed, layout, gradient)
    assert not torch.equal(before[0], after[0])
    for a, b, which in zip(before, after, (0, 0, 1, 1, 2, 2)):
        others = torch.ones(len(a), dtype=torch.bool)
        others[own[which]] = False
        assert torch.equal(a[others], b[others])


def test_the_same_inputs_give_the_same_bits():
    case = random_case(3, 64, torch.float16, longest=150)
    first, second = (of_kernel(*case) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_see_nothing_are_zero_and_rows_in_no_run_too(splits, monkeypatch):
    monkeypatch.setattr(tiles, "choose_splits", lambda *_: splits)
    q, k = torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    layout = Layout(Span(int32(0, 3), int32(3, 1), 3), Span(int32(1, 4), int32(3, 0), 3), nothing(2),
                    int32(0, 1, 2, 0, 9), int32(0, 0, 0, 0, 9))
    tensors = [q, k, k, k[:0], k[:0]]
    out, dq, *dkv = of_kernel(tensors, layout, torch.ones_like(q))
    assert out[[0, 3, 4]].eq(0).all() and dq[[0, 3, 4]].eq(0).all()
    assert all(x[[0, 4]].eq(0).all() for x in dkv[:2])
    torch.testing.assert_close(out[1].float(), k[1])
    assert all(x.isfinite().all() for x in (dq, *dkv))
    tables = [x for span in layout[:3] for x in span[:2]] + [layout.sees_visual, layout.sees_text]
    _, lse = kernels.attend(*tensors, tables, [3, 3, 0], 0.25)
    assert lse[[0, 3, 4]].eq(-math.inf).all() and lse[[1, 2]].isfinite().all()


def test_keys_after_a_tile_are_never_loaded():
    """300 queries are five tiles; NaN in the keys after the first two must not reach these, nor their gradients."""
    q, k, v = (torch.randn(300, 1, 16) for _ in range(3))
    k[128:] = v[128:] = float("nan")
    gradient = torch.randn(300, 1, 16)
    gradient[128:] = 0
    out, dq, *_ = of_kernel([q, k[:0], v[:0], k, v], causal(300), gradient)
    assert out[:128].isfinite().all() and dq[:128].isfinite().all() and out[128:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(shape):
    queries, keys = shape
    zeros = torch.zeros(queries, dtype=torch.int32)
    layout = Layout(Span(int32(0), int32(queries), queries), nothing(1), Span(int32(0), int32(keys), keys), zeros, zeros)
    tensors = [torch.randn(n, 1, 16) for n in (queries, 0, 0, keys, keys)]
    results = of_kernel(tensors, layout, tensors[0])
    assert [len(x) for x in results] == [queries, queries, 0, 0, keys, keys] and not any(x.any() for x in results)


# ---- as a part of PyTorch ----

def test_operator_checks():
    tensors, layout, _ = random_case(4, 16, torch.float32, longest=40)
    tensors = [x.detach().requires_grad_() for x in tensors]
    tables = [x for span in layout[:3] for x in span[:2]] + [layout.sees_visual, layout.sees_text]
    tables += layout.first(len(tensors[1]), len(tensors[3]))
    library.opcheck(kernels.attend, (*tensors, tables, [span.max_length for span in layout[:3]], 0.25))


@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_compile_and_checkpoint_pass_through(how):
    tensors, layout, gradient = random_case(4, 16, torch.float32, longest=40)

    def layer(*tensors):
        return composite_attention(*(x * 2 for x in tensors), *layout).sin()

    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(layer, *tensors, use_reentrant=False)
    other = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compile" else checkpointed
    got, want = (with_gradients(lambda *args: f(*args[:5]), tensors, layout, gradient) for f in (other, layer))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- bad input ----

def good_input():
    span = lambda n: Span(int32(0), int32(n), n)
    q, k = torch.randn(4, 4, 16), torch.randn(3, 2, 16)
    return dict(q=q, k_visual=k, v_visual=k, k_text=q[:, :2], v_text=q[:, 2:], query=span(4), visual=span(3),
                text=span(4), sees_visual=int32(0, 0, 3, 3), sees_text=int32(1, 2, 3, 4))


BAD = {
    "q: number of dimensions is 2, expected 3": dict(q=torch.randn(4, 16)),
    "k_visual: dtype is torch.float64, expected torch.float32": dict(k_visual=torch.randn(3, 2, 16).double()),
    "v_text: device is meta, expected cpu": dict(v_text=torch.empty(4, 2, 16, device="meta")),
    "k_text: head width is 8, expected 16": dict(k_text=torch.randn(4, 2, 8)),
    "v_visual: number of heads is 1, expected 2": dict(v_visual=torch.randn(3, 1, 16)),
    "v_text: number of rows is 5, expected 4": dict(v_text=torch.randn(5, 2, 16)),
    "q: number of heads is 3, expected a multiple of k_text's 2": dict(q=torch.randn(4, 3, 16)),
    "scale: is -1.0, expected a positive number": dict(scale=-1.0),
    "query.start: dtype is torch.int64, expected torch.int32": dict(query=Span(torch.tensor([0]), int32(4), 4)),
    "query.start: shape is (1, 1), expected (1,)": dict(query=Span(int32([0]), int32(4), 4)),
    "text.length: shape is (2,), expected (1,)": dict(text=Span(int32(0), int32(2, 2), 4)),
    "text.start: shape is (2,), expected (1,)": dict(text=Span(int32(0, 0), int32(2, 2), 4)),
    "sees_text: shape is (3,), expected (4,)": dict(sees_text=int32(1, 2, 3)),
    "sees_visual: contiguous is False, expected True": dict(sees_visual=int32(*range(8))[::2]),
    "first_text: shape is (1,), expected (4,)": dict(first=(int32(2, 2, 2), int32(0))),
    "query: range of sample 0 is 2 to 6, expected within 0 to 4": dict(query=Span(int32(2), int32(4), 4)),
    "text: max_length is 3, expected at least 4, sample 0's length": dict(text=Span(int32(0), int32(4), 3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    composite_attention(**good_input())
    with pytest.raises(ValueError) as error:
        composite_attention(**{**good_input(), **BAD[message]})
    assert str(error.value) == message


@pytest.mark.parametrize("field", ["start", "length"])
@pytest.mark.parametrize("name", ["query", "visual", "text"])
def test_tables_that_are_not_contiguous_are_refused(name, field):
    """They were read as if they were, once."""
    rng = random.Random(0)
    layout, rows = layout_of([([0, 1], [], [0, 1]), ([2], [0, 1], [2])], rng)
    tensors = [torch.randn(n, 1, 16) for n in (rows[0], rows[1], rows[1], rows[2], rows[2])]
    strided = torch.stack([getattr(getattr(layout, name), field)] * 2, dim=1)[:, 0]
    bad = layout._replace(**{name: getattr(layout, name)._replace(**{field: strided})})
    composite_attention(*tensors, *layout)
    with pytest.raises(ValueError, match=f"{name}.{field}: contiguous is False, expected True"):
        composite_attention(*tensors, *bad)


def test_the_kernel_has_no_float64():
    bad = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
           for name, x in good_input().items()}
    with pytest.raises(ValueError, match="q: dtype is torch.float64, expected bfloat16, float16 or float32"):
        composite_attention(**bad)
