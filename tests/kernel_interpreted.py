"""The Triton kernels under Triton's interpreter, on a CPU, against the rule in float64.

Triton decides when it is imported whether kernels are interpreted or compiled, so test_kernel.py runs this file in a
process of its own. To see its tests one by one: TRITON_INTERPRET=1 python -m pytest tests/kernel_interpreted.py
"""

import pytest
import torch
from torch import library

from kernel_cases import NAMES, WIDTHS, distances, random_case, true_values, with_gradients
from nanoeemllm import kernel, kernel_backward
from nanoeemllm.attention import Run, attention_reference, composite_attention
from nanoeemllm.kernel import choose_splits, composite_attention_kernel

# log2(0) = -inf is meant, and NaN is planted
pytestmark = [pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
              pytest.mark.filterwarnings("ignore:All-NaN slice encountered")]


def at(*x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


def nothing(samples: int) -> Run:
    return Run(torch.zeros(samples, dtype=torch.int32), torch.zeros(samples, dtype=torch.int32), at(), 0)


# ---- 200 random layouts, each head width 25 times ----

@pytest.mark.parametrize("seed", range(200))
def test_float32(seed):
    case = random_case(seed, WIDTHS[seed % 8], torch.float32)
    errors = distances(with_gradients(composite_attention_kernel, *case), true_values(*case), case[2])
    assert max(errors) <= 1e-5, dict(zip(NAMES, errors))


@pytest.mark.parametrize("seed", range(200, 248))
def test_float16_is_at_most_twice_as_far_off_as_eager_pytorch(seed):
    case = random_case(seed, WIDTHS[seed % 8], torch.float16)
    want = true_values(*case)
    errors = distances(with_gradients(composite_attention_kernel, *case), want, case[2])
    eager = distances(with_gradients(attention_reference, *case), want, case[2])
    for name, error, bound in zip(NAMES, errors, eager):
        assert error <= max(2 * bound, 1e-5), (name, error, bound)


# ---- keys shared out over programs ----

@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("seed", range(300, 308))
def test_split_keys(seed, splits, monkeypatch):
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    case = random_case(seed, WIDTHS[seed % 8], torch.float32, longest=100)
    errors = distances(with_gradients(composite_attention_kernel, *case), true_values(*case), case[2])
    assert max(errors) <= 1e-5, dict(zip(NAMES, errors))


@pytest.mark.parametrize("splits", [1, 4])
def test_decoding_reads_the_cache_in_place_at_its_length_on_the_device(splits, monkeypatch):
    """The same arguments, one number in memory changed; what lies beyond is not read."""
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    B, G, D, room = 2, 2, 32, 200
    cache_k, cache_v, image_k, image_v = torch.randn(2, 2, B * room, G, D).flatten(0, 1)
    q = torch.randn(B, 4, D)
    query = Run(at(0, 1), at(1, 1), at(129, 300), 1)
    visual = Run(at(0, room), at(70, 0), torch.arange(2 * room, dtype=torch.int32), room)
    text = Run(at(0, room), at(60, 3), torch.cat([torch.arange(70, 70 + room), torch.arange(room)]).int(), room)
    for grown in (0, 1, 90):
        text.length.add_(grown)
        query.position.add_(grown)
        tensors = [x.clone() for x in (q, image_k, image_v, cache_k, cache_v)]
        want = attention_reference(*(x.double() for x in tensors), query, visual, text)
        for x in tensors[1:3]:
            x[70:] = float("nan")
        for x in tensors[3:]:
            x[text.length[0]:room] = x[room + text.length[1]:] = float("nan")
        torch.testing.assert_close(composite_attention_kernel(*tensors, query, visual, text).double(), want,
                                   rtol=1e-5, atol=1e-6)


def test_how_many_splits():
    h100 = 2 * 132
    assert choose_splits(32, 20, h100) == 8            # one answer, 32 heads: 256 places of 264
    assert choose_splits(8, 20, h100) >= 18            # 8 key heads: nearly as many as the keys allow
    assert choose_splits(128, 20, h100) == 2           # prefill of 256 queries, 32 heads
    assert choose_splits(2048, 20, h100) == 1          # enough work as it is
    assert choose_splits(32, 0, h100) == choose_splits(32, 1, h100) == 1


# ---- what must hold exactly ----

def test_changing_one_sample_moves_no_bit_of_another():
    tensors, runs, gradient = random_case(5, 32, torch.float32, longest=100)
    before = with_gradients(composite_attention_kernel, tensors, runs, gradient)
    assert len(runs[0].start) > 1 and runs[2].length[0] and runs[0].length[1]
    own = [slice(int(run.start[0]), int(run.start[0] + run.length[0])) for run in runs]
    changed = [x.clone() for x in tensors]
    for x, which in zip(changed, (0, 1, 1, 2, 2)):
        x[own[which]] += 1
    after = with_gradients(composite_attention_kernel, changed, runs, gradient)
    assert not torch.equal(before[0], after[0])
    for a, b, which in zip(before, after, (0, 0, 1, 1, 2, 2)):
        others = torch.ones(len(a), dtype=torch.bool)
        others[own[which]] = False
        assert torch.equal(a[others], b[others])


def test_the_same_inputs_give_the_same_bits():
    case = random_case(3, 64, torch.float16, longest=150)
    first, second = (with_gradients(composite_attention_kernel, *case) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_see_nothing_are_zero_and_rows_in_no_run_too(splits, monkeypatch):
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    q, k = torch.randn(5, 2, 16), torch.randn(3, 2, 16)
    query, visual = Run(at(0, 3), at(3, 1), at(0, 1, 5, 0, 9), 3), Run(at(0, 3), at(3, 0), at(1, 4, 6), 3)
    out, dq, *dkv = with_gradients(composite_attention_kernel, [q, k, k, k[:0], k[:0]], (query, visual, nothing(2)),
                                   torch.ones_like(q))
    assert out[[0, 3, 4]].eq(0).all() and dq[[0, 3, 4]].eq(0).all()
    torch.testing.assert_close(out[1].float(), k[0])
    assert all(x.isfinite().all() for x in (dq, *dkv))


def test_keys_after_a_tile_are_never_loaded():
    """300 queries are five tiles; NaN in the keys after the first two must not reach these, nor their gradients."""
    q, k, v = (torch.randn(300, 1, 16) for _ in range(3))
    run = Run(at(0), at(300), torch.arange(300, dtype=torch.int32), 300)
    k[128:] = v[128:] = float("nan")
    gradient = torch.randn(300, 1, 16)
    gradient[128:] = 0
    out, dq, *_ = with_gradients(composite_attention_kernel, [q, k[:0], v[:0], k, v], (run, nothing(1), run), gradient)
    assert out[:128].isfinite().all() and dq[:128].isfinite().all() and out[128:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(shape):
    queries, keys = shape
    run = lambda n: Run(at(0), at(n), torch.arange(n, dtype=torch.int32), n)
    tensors = [torch.randn(n, 1, 16) for n in (queries, 0, 0, keys, keys)]
    results = with_gradients(composite_attention_kernel, tensors, (run(queries), run(0), run(keys)), tensors[0])
    assert [len(x) for x in results] == [queries, queries, 0, 0, keys, keys] and not any(x.any() for x in results)


# ---- as a part of PyTorch ----

@pytest.mark.parametrize("wanted", [(1, 2), (0,), (3,), (2, 4), (0, 1, 2, 3, 4)])
def test_gradients_of_some_inputs_only(wanted, monkeypatch):
    """Frozen parts cost nothing: no kernel runs for them."""
    tensors, runs, gradient = random_case(4, 32, torch.float32, longest=60)
    launched = []
    for name in ("query", "keys"):
        tuner = getattr(kernel_backward, "backward_" + name)
        monkeypatch.setattr(tuner, "run", lambda *args, name=name, run=tuner.run, **meta: (launched.append(name),
                                                                                           run(*args, **meta)))
    want = true_values(tensors, runs, gradient)[1:]
    tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    composite_attention_kernel(*tensors, *runs).backward(gradient)
    for i, (x, w) in enumerate(zip(tensors, want)):
        assert (x.grad is not None) == (i in wanted)
        if x.grad is not None:
            torch.testing.assert_close(x.grad.double(), w, rtol=1e-4, atol=1e-5)
    pairs = bool({1, 2} & {*wanted}) + bool({3, 4} & {*wanted})
    assert launched == ["query"] * (0 in wanted) + ["keys"] * pairs


def test_operator_checks():
    tensors, runs, _ = random_case(4, 16, torch.float32, longest=40)
    tensors = [x.detach().requires_grad_() for x in tensors]
    library.opcheck(kernel.attend, (*tensors, [x for run in runs for x in run[:3]],
                                    [run.max_length for run in runs], 0.25))


@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_compile_and_checkpoint_pass_through(how):
    tensors, runs, gradient = random_case(4, 16, torch.float32, longest=40)

    def layer(*tensors):
        return composite_attention_kernel(*(x * 2 for x in tensors), *runs).sin()
    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(layer, *tensors, use_reentrant=False)
    other = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compile" else checkpointed
    got, want = (with_gradients(lambda *args: f(*args[:5]), tensors, runs, gradient) for f in (other, layer))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- bad input: the kernel and PyTorch say the same ----

def good_input():
    run = lambda n: Run(at(0), at(n), torch.arange(n, dtype=torch.int32), n)
    q, k = torch.randn(4, 4, 16), torch.randn(3, 2, 16)
    return dict(q=q, k_visual=k, v_visual=k, k_text=q[:, :2], v_text=q[:, 2:], query=run(4), visual=run(3), text=run(4))


BAD = {
    "q: number of dimensions is 2, expected 3": dict(q=torch.randn(4, 16)),
    "k_visual: dtype is torch.float64, expected torch.float32": dict(k_visual=torch.randn(3, 2, 16).double()),
    "v_text: device is meta, expected cpu": dict(v_text=torch.empty(4, 2, 16, device="meta")),
    "k_text: head width is 8, expected 16": dict(k_text=torch.randn(4, 2, 8)),
    "v_visual: number of heads is 1, expected 2": dict(v_visual=torch.randn(3, 1, 16)),
    "v_text: number of rows is 5, expected 4": dict(v_text=torch.randn(5, 2, 16)),
    "q: number of heads is 3, expected a multiple of k_text's 2": dict(q=torch.randn(4, 3, 16)),
    "scale: is -1.0, expected a positive number": dict(scale=-1.0),
    "query.start: is 1-dimensional torch.int64, expected 1-dimensional torch.int32":
        dict(query=Run(torch.tensor([0]), at(4), at(0, 1, 2, 3), 4)),
    "text.length: has 2 entries, expected 1": dict(text=Run(at(0), at(2, 2), at(0, 1, 2, 3), 4)),
    "visual.position: has 2 entries, expected 3": dict(visual=Run(at(0), at(2), at(0, 1), 2)),
    "text.start: number of samples is 2, expected 1": dict(text=Run(at(0, 0), at(2, 2), at(0, 1, 2, 3), 4)),
    "query: sample 0 has rows 2 to 6, expected within 0 to 4": dict(query=Run(at(2), at(4), at(0, 1, 2, 3), 4)),
    "text.max_length: is 3, expected at least 4, sample 0's length": dict(text=Run(at(0), at(4), at(0, 1, 2, 3), 3)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("which", ["pytorch", "reference", "kernel"])
def test_bad_input(message, which):
    function = (composite_attention_kernel if which == "kernel" else
                attention_reference if which == "reference" else composite_attention)
    function(**good_input())
    with pytest.raises(ValueError) as error:
        function(**{**good_input(), **BAD[message]})
    assert str(error.value) == message


def test_the_kernel_has_no_float64():
    bad = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in good_input().items()}
    with pytest.raises(ValueError, match="q: dtype is torch.float64, expected bfloat16, float16 or float32 on a GPU"):
        composite_attention_kernel(**bad)
