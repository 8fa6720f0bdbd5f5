"""PyTorch's attention against the rule written down, in float64."""

import pytest
import torch

import nanoeemllm.attention as attention
from layouts import random_layout, seeded
from nanoeemllm.attention import Keys, Span, Visibility, attention_reference

WAYS = {"sdpa": attention.attention_sdpa, "reference": attention_reference}


def inputs(seed, H=4, G=2, D=8):
    _, layout, V = random_layout(seed)
    T = layout.num_text
    shapes = [(T, H, D), (V, G, D), (V, G, D), (T, G, D), (T, G, D)]
    tensors = [seeded(*s, seed=seed * 9 + i).requires_grad_() for i, s in enumerate(shapes)]
    return tensors, layout


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize("visual", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_equals_the_rule(seed, visual, block, monkeypatch):
    """Output and all gradients; visual: the visual rows are the queries (`llava`). Blocks small,
    and few queries fewer, in turns, so that every way is taken."""
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "FEW", (2, 16)[seed % 2])
    tensors, layout = inputs(seed)
    sees = layout.text_queries
    if visual:
        T = layout.num_text
        sees = Visibility(layout.visual, layout.visual, layout.text, layout.sees_visual[T:],
                          layout.sees_text[T:])
        tensors[0] = seeded(layout.num_visual, 4, 8, seed=seed).requires_grad_()
    weight = seeded(*tensors[0].shape, seed=seed + 100)
    results = []
    for function in (attention.attention_sdpa, attention_reference):
        out = function(tensors[0], Keys(*tensors[1:]), sees)
        grads = torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True) \
            if out.requires_grad else [None] * 5
        results.append([out, *grads])
    for got, want, like in zip(*results, [tensors[0], *tensors]):
        zero = torch.zeros_like(like)
        torch.testing.assert_close(zero if got is None else got, zero if want is None else want,
                                   rtol=1e-10, atol=1e-10)


def test_gradcheck():
    tensors, layout = inputs(0, H=2, G=1, D=4)
    assert torch.autograd.gradcheck(
        lambda q, *keys: attention.attention(q, Keys(*keys), layout.text_queries), tensors)


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def span(start, length):
    return Span(ints(*start), ints(*length), max(length))


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_see_nothing_are_zero_and_rows_in_no_span_too(way):
    q, k = seeded(5, 2, 4).requires_grad_(), seeded(3, 2, 4, seed=1).requires_grad_()
    sees = Visibility(span((0, 3), (3, 1)), span((0, 3), (3, 0)), span((0, 0), (0, 0)),
                      ints(0, 1, 2, 0, 3), ints(0, 0, 0, 0, 0))       # row 4 is in no span
    out = WAYS[way](q, Keys(k, k, k[:0], k[:0]), sees)
    assert out[[0, 3, 4]].eq(0).all() and out[[1, 2]].ne(0).all()
    torch.testing.assert_close(out[1], k[0])                          # sees one key alone
    for grad in torch.autograd.grad(out.square().sum(), [q, k]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_rubbish_in_a_cache_beyond_its_length_does_not_matter(way):
    q, k = seeded(2, 2, 4), seeded(12, 2, 4, seed=1)
    sees = Visibility(span((0, 1), (1, 1)), span((0, 0), (0, 0)), span((0, 6), (2, 4)),
                      ints(0, 0), ints(2, 4))
    clean = WAYS[way](q, Keys(k[:0], k[:0], k, k), sees)
    k[[2, 3, 4, 5, 10, 11]] = float("nan")
    assert torch.equal(clean, WAYS[way](q, Keys(k[:0], k[:0], k, k), sees))


def test_like_images_of_an_encoder_are_one_block_and_others_are_not():
    from nanoeemllm.vision import whole_images
    assert [b.count for b in whole_images([4, 4, 4, 6, 6, 2], torch.device("cpu")).blocks] == [3, 2, 1]
    q, k = seeded(26, 2, 4), seeded(26, 2, 4, seed=1)
    sees = whole_images([4, 4, 4, 6, 6, 2], torch.device("cpu"))
    keys = Keys(k[:0], k[:0], k, k)
    torch.testing.assert_close(attention.attention_sdpa(q, keys, sees),
                               attention_reference(q, keys, sees))
