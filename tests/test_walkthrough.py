"""The walkthrough on a random model: what it prints is what the model computes, and its signposts lead somewhere."""

import re
import sys
from pathlib import Path

import pytest

from nanoeemllm import UserError, walkthrough

PACKAGE = Path(walkthrough.__file__).parent


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path) -> str:
    monkeypatch.chdir(tmp_path)                                      # no trained model is here
    monkeypatch.setattr(sys, "argv", ["walkthrough", "--prompt", "what colour is the cat?"])
    walkthrough.main()
    return capsys.readouterr().out


def test_steps_shapes_and_mask(printed):
    """A picture of 6 x 6 patches between two and eight text tokens, under the tiny preset: C = 128, three layers."""
    assert re.findall(r"^(\d)\. ", printed, re.MULTILINE) == list("12345678")
    assert "random" in printed
    for line in ("192 x 192 pixels -> 6 x 6 patches of 3 x 8 x 8 numbers: (36, 192)",
                 "ViT (36, 128) -> projector (36, 128): V = 36 visual tokens",
                 "T = 10 text rows first, then V = 36 visual rows",
                 "(46, 128) -> 3 layers -> text rows alone (10, 128)",
                 "keys, values: visual (36, 4, 32), text (10, 4, 32)"):
        assert line in printed, line
    lists = {name: [int(n) for n in numbers.split()] for name, numbers in
             re.findall(r"^   (position|sees_\w+) +([\d ]+)$", printed, re.MULTILINE)}
    assert lists == {"position": [0, 1, *range(38, 46)], "sees_visual": [0, 0] + 8 * [36],
                     "sees_text": list(range(1, 11))}
    rows = re.findall(r"visual ([01]+)   text ([01]+)$", printed, re.MULTILINE)
    assert rows == [((36 * "1" if row > 1 else 36 * "0"), ((row + 1) * "1").ljust(10, "0")) for row in range(10)]


def test_the_layer_under_both_paths(printed):
    """Text rows are eemllm's queries, all rows llava's; they see as many keys as the rule says."""
    pattern = r"^   (\w+) +\(46, 128\) -> \(46, 128\)   (\d+) queries, 46 keys, ([\d,]+) pairs; ([\d.]+)"
    found = re.findall(pattern, printed, re.MULTILINE)
    (_, queries, pairs, work), (_, llava_queries, llava_pairs, llava_work) = found
    assert [name for name, *_ in found] == ["eemllm", "llava"]
    assert (queries, llava_queries) == ("10", "46")
    assert (pairs, llava_pairs) == (f"{8 * 36 + 55:,}", f"{46 * 47 // 2:,}")
    assert 0 < float(work) < float(llava_work)


def test_likeliest_tokens_and_an_answer(printed):
    shares = [float(share) for share in re.findall(r"^ +([\d.]+)%  \S", printed, re.MULTILINE)]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True)
    assert "answer:" in printed


def test_every_file_and_function_in_brackets_exists(printed):
    places = re.findall(r"^\d\. .+?   \[(.+)\]$", printed, re.MULTILINE)
    assert len(places) == 8
    for place in "; ".join(places).split("; "):
        file, _, names = place.partition(": ")
        source = (PACKAGE / file).read_text()
        for part in re.findall(r"\w+", names):
            assert re.search(rf"\b(class|def) {part}\b", source), place


def test_a_folder_that_is_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["walkthrough", "--weights", str(tmp_path)])
    with pytest.raises(UserError):
        walkthrough.main()
