"""What bench/kernel.py times is the same thing for all contestants: packed rows and padded ones say the same rule."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from kernel_cases import reference
from nanoeemllm.bench import experiments
from nanoeemllm.bench.kernel import Case, bias_of, build, sdpa

SMALL = [Case("prefill", [(0, 30, 7)] * 2), Case("decode", [(0, 30, 7)], decode=True), Case("ragged", [(3, 9, 5), (2, 4, 20)]),
         Case("pictures", [(2, 5, 3, 4, 6)]), Case("text-only", [(0, 5, 4), (8,)]),
         Case("encoder", [(0, 12), (0, 12)], encoder=True)]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_packed_and_padded_are_the_same_question(case):
    torch.manual_seed(0)
    inputs = build(case._replace(H=4, D=16), 2, device="cpu", dtype=torch.float64)
    padded = sdpa(SDPBackend.MATH, bias_of(inputs.mask, torch.float64), *inputs.padded).transpose(1, 2)[inputs.mask.any(-1)]
    torch.testing.assert_close(padded, reference(*inputs.packed, *list(vars(inputs.sees).values())[:5]))
    last = inputs.mask[:, -1] if case.is_rectangle else inputs.mask.any(1)
    assert last.all() or len(set(case.samples)) > 1


def test_verdict():
    a_is_fine = {"x": {"a": 1.02, "b": 1.0}, "y": {"a": 1.0, "b": 1.5}}
    assert experiments.verdict(a_is_fine) == "a first, at worst 1.02 of the fastest: keep it alone"
    two = {"x": {"a": 1.2, "b": 1.0}, "y": {"a": 1.0, "b": 1.5}}
    assert experiments.verdict(two) == "a first, at worst 1.20 of the fastest; x wants b"
    assert experiments.verdict({}) == "no time left"
