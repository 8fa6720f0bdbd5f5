"""The fast PyTorch paths against the rule written down, in float64."""

import pytest
import torch

import nanoeemllm.attention as attention
from layouts import random_layout, seeded
from nanoeemllm.attention import Run, attention_reference, composite_attention

PATHS = {"dispatch": attention._in_pytorch, "rectangle": attention._one_rectangle, "blocks": attention._blocks}


def inputs(seed, H=4, G=2, D=8):
    _, layout, V = random_layout(seed)
    T = len(layout.text.position)
    shapes = [(T, H, D), (V, G, D), (V, G, D), (T, G, D), (T, G, D)]
    return [seeded(*s, seed=seed * 9 + i).requires_grad_() for i, s in enumerate(shapes)], layout


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_equals_the_rule(seed, merged, which, monkeypatch):
    """Output and all gradients; merged: visual rows are queries too (`llava`). Blocks small, and few queries fewer, in
    turns, so that every way is taken."""
    monkeypatch.setattr(attention, "_BLOCK", 4)
    monkeypatch.setattr(attention, "_FEW", (2, 16)[seed % 2])
    tensors, layout = inputs(seed)
    runs = (layout.text, layout.visual, layout.text)
    if merged:
        q, kv, vv, kt, vt = tensors
        rows = layout.merge
        q = seeded(len(rows), 4, 8, seed=seed).requires_grad_()
        tensors = [q, kv[:0].detach().requires_grad_(), vv[:0].detach().requires_grad_(),
                   torch.cat([kt, kv])[rows].detach().requires_grad_(), torch.cat([vt, vv])[rows].detach().requires_grad_()]
        nothing = Run(torch.zeros_like(layout.merged.start), torch.zeros_like(layout.merged.start),
                      torch.zeros(0, dtype=torch.int32), 0)
        runs = (layout.merged, nothing, layout.merged)
    weight = seeded(*tensors[0].shape, seed=seed + 100)
    results = []
    for function in (PATHS[which], attention_reference):
        out = function(*tensors, *runs, None)
        results.append([out, *torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True)])
    for got, want, like in zip(*results, [tensors[0], *tensors]):
        zero = torch.zeros_like(like)
        torch.testing.assert_close(zero if got is None else got, zero if want is None else want, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    tensors, layout = inputs(0, H=2, G=1, D=4)
    assert torch.autograd.gradcheck(
        lambda *t: composite_attention(*t, layout.text, layout.visual, layout.text), tensors)


@pytest.mark.parametrize("which", [*PATHS, "reference"])
def test_rows_that_see_nothing_are_zero_and_rows_in_no_run_too(which):
    function = PATHS.get(which, attention_reference)
    at = lambda *x: torch.tensor(x, dtype=torch.int32)
    q, k = seeded(5, 2, 4).requires_grad_(), seeded(3, 2, 4, seed=1).requires_grad_()
    query = Run(at(0, 3), at(3, 1), at(0, 1, 5, 0, 9), 3)               # row 4 is in no run
    visual = Run(at(0, 3), at(3, 0), at(1, 4, 6), 3)
    text = Run(at(0, 0), at(0, 0), at(), 0)
    out = function(q, k, k, k[:0], k[:0], query, visual, text, None)
    assert out[[0, 3, 4]].eq(0).all() and out[[1, 2]].ne(0).all()
    torch.testing.assert_close(out[1], k[0])                            # sees one key alone
    for grad in torch.autograd.grad(out.square().sum(), [q, k]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("which", PATHS)
def test_rubbish_in_a_cache_beyond_its_length_does_not_matter(which):
    at = lambda *x: torch.tensor(x, dtype=torch.int32)
    q, k = seeded(2, 2, 4), seeded(12, 2, 4, seed=1)
    text = Run(at(0, 6), at(2, 4), at(*range(6), *range(6)), 4)
    query, visual = Run(at(0, 1), at(1, 1), at(1, 3), 1), Run(at(0, 0), at(0, 0), at(), 0)
    clean = PATHS[which](q, k[:0], k[:0], k, k, query, visual, text, None)
    k[[2, 3, 4, 5, 10, 11]] = float("nan")
    assert torch.equal(clean, PATHS[which](q, k[:0], k[:0], k, k, query, visual, text, None))
