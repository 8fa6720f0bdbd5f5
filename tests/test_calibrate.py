"""The choice of heads against its definition, and the command that makes it."""

import base64
import dataclasses
import io
import json
import math

import pytest
import torch

from layouts import seeded
from nanoeemllm import load
from nanoeemllm.paths import make
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.toy.backbones import tiny_tokenizer
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, UserError
from nanoeemllm.decoder import Context
from nanoeemllm.evaluation.__main__ import main
from nanoeemllm.layout import build_layout
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths.yopo import attention_ratio, choose_heads, measure_ratios
from nanoeemllm.weights.folder import save
from test_model import picture


@pytest.mark.parametrize("text, patches", [(3, 4), (70, 230)])
def test_ratio_is_that_of_the_attention_matrix(text, patches):
    """The rows of one sample: text first, then the image's, which stands behind the first word."""
    _, layout = build_layout([[1, IMAGE_TOKEN, *[2] * (text - 1)]], [[(1, patches)]])
    rows, order = text + patches, layout.position.argsort()
    q, k = seeded(rows, 2, 4), seeded(rows, 2, 4, seed=1)
    found = attention_ratio(q, k, Context(text, None, layout.text_queries, layout))
    is_visual, later = order >= text, torch.ones(rows, rows).triu(1).bool()
    for head in range(2):
        scores = q[order, head] @ k[order, head].T / math.sqrt(4)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        expected = weights[:, is_visual].sum() / weights[:, ~is_visual].sum()
        assert found[head].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("samples, cut", [(1, 6), (4, 6), (9, 4), (3, 2)])
def test_most_samples_are_under_the_threshold_where_a_head_is_pruned(samples, cut):
    ratios = torch.rand(samples, 6, 8, generator=torch.Generator().manual_seed(samples))
    kept, threshold = choose_heads(ratios, 5, cut)
    assert kept[0] == kept[1] == tuple(range(8)) and sum(8 - len(heads) for heads in kept) == 5 * (cut - 2)
    assert all(heads == tuple(range(8)) for heads in kept[cut:])                 # no pictures there, nothing to save
    for layer in range(2, cut):
        for head in range(8):
            pruned = (ratios[:, layer, head] < threshold).sum() > samples / 2
            assert pruned == (head not in kept[layer])


def test_every_layer_keeps_a_head():
    ratios = torch.rand(3, 5, 4) + torch.tensor([0, 0, 0, 9, 9])[:, None]
    assert all(choose_heads(ratios, 3, 5)[0])


def tiny_folder(tmp_path):
    torch.manual_seed(0)
    tiny = PRESETS["tiny"]
    config = dataclasses.replace(tiny, visual_path=make("llava"),
                                 llama=dataclasses.replace(tiny.llama, num_hidden_layers=4))
    tokenizer = tiny_tokenizer(config)
    model = EEMLLM(config, tokenizer)
    initialize(model)
    save(model.state_dict(), config, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_command_writes_the_heads_that_yopo_then_uses(tmp_path, capsys):
    folder, rows = tiny_folder(tmp_path), ["index\timage\tquestion\tanswer"]
    for i in range(3):
        file = io.BytesIO()
        picture(i).save(file, "PNG")
        rows.append(f"{i}\t{base64.b64encode(file.getvalue()).decode()}\twhat is it?\tcat")
    (tmp_path / "set.tsv").write_text("\n".join(rows))
    command = ["--weights", str(folder), "--tsv", str(tmp_path / "set.tsv"), "--calibrate", "--visual-path", "yopo"]
    with pytest.raises(UserError, match="--prune-heads"):
        main(command)
    with pytest.raises(UserError, match="nothing can be pruned"):
        main([*command, "--prune-heads", "2"])
    main([*command, "--prune-heads", "2", "--last-visual-layer", "4"])
    kept = json.loads((folder / "config.json").read_text())["other_paths"][0]["kept_heads"]
    assert [len(heads) for heads in kept[:2]] == [4, 4] and sum(map(len, kept[2:])) == 4
    assert load(folder, "cpu").config.visual_path.name == "llava"
    path = load(folder, "cpu", visual_path="yopo").config.visual_path
    assert path.name == "yopo" and [list(heads) for heads in path.kept_heads] == kept


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    model = load(tiny_folder(tmp_path), "cpu")
    prompts = [(model.encode("<image> a cat"), [picture(1)])]
    before = model.logits(*prompts[0])
    ratios = measure_ratios(model, prompts)
    assert ratios.shape == (1, 4, 4) and (ratios > 0).all()
    torch.testing.assert_close(model.logits(*prompts[0]), before, rtol=0, atol=0)
