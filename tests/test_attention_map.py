"""Attention maps against the definition of attention."""

import dataclasses

import pytest
import torch

from nanoeemllm.config import IMAGE_TOKEN as IMAGE
from nanoeemllm.data.images import prepare_image
from nanoeemllm.evaluation import attention_map
from nanoeemllm.llama import apply_rope, rope_cos_sin
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import make
from test_generation import make_model as wide_model
from test_model import picture


@pytest.mark.parametrize("path", ["eemllm", "llava", "flamingo", "yopo"])
def test_attention_is_that_of_the_rule(path):
    """Weights of a picture's tokens and of text sum to 1; a picture that stands behind gets nothing."""
    model = wide_model(path)
    images, ids = [picture(1), picture(2, 30, 48)], [1, IMAGE, 5, IMAGE, 6]
    answer = list(model.generate(ids, images, max_new_tokens=4))
    heat = attention_map.attention_to_images(model, ids, images, answer)
    first, second = (len(prepare_image(image, model.config.vision)[0]) for image in images)
    assert heat.shape[1:] == (4, first + second) and (heat >= 0).all() and (heat.sum(-1) < 1 + 1e-5).all()
    assert len(heat) == {"flamingo": 2, "yopo": 3}.get(path, 4)
    early = attention_map.attention_to_images(model, [1, IMAGE, 5, 6], images[:1], answer)
    if path == "flamingo":
        assert (heat[..., :first] == 0).all()                                    # the last picture alone
        torch.testing.assert_close(early.sum(-1), torch.ones(2, 4))           # and nothing but pictures
    else:
        assert (heat.sum(-1) < 1).all() and (heat[..., :first].sum(-1) > 0).all()


def test_pruned_heads_pay_nothing():
    """The mean is over all heads: what two kept heads pay is the sum of what each alone pays."""
    model = wide_model("yopo")
    llama = model.config.llama
    ids, images = [1, IMAGE, 5, 6], [picture(1)]
    heat = {}
    for kept in ((0,), (1,), (0, 1)):
        path = make("yopo", last_visual_layer=1, kept_heads=(kept,) * llama.num_hidden_layers)
        pruned = EEMLLM(dataclasses.replace(model.config, visual_path=path))
        pruned.load_state_dict(model.state_dict())
        heat[kept] = attention_map.attention_to_images(pruned, ids, images, [9])
    torch.testing.assert_close(heat[0, 1], heat[0,] + heat[1,])


def test_attention_by_hand():
    """One layer, one head group: softmax of q . k over everything before the row that produced the word."""
    model = wide_model(layers=1, dtype=torch.float64)
    llama, ids, image = model.config.llama, [1, IMAGE, 5, 6], picture(1)
    V = len(prepare_image(image, model.config.vision)[0])
    layer, rows = model.decoder.layers[0], {}
    layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: rows.setdefault("q", out))
    layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: rows.setdefault("k", out))
    heat = attention_map.attention_to_images(model, ids, [image], [9])
    position = torch.tensor([0, V + 1, V + 2, *range(1, V + 1)])                  # text, then visual rows
    cos, sin = rope_cos_sin(position, llama, rows["k"])
    heads, key_heads = llama.num_attention_heads, llama.num_key_value_heads
    q = apply_rope(rows["q"].unflatten(-1, (heads, -1)), (cos[:3], sin[:3]))[-1]                       # (H, D)
    k = apply_rope(rows["k"].unflatten(-1, (key_heads, -1)), (cos, sin)).repeat_interleave(heads // key_heads, 1)
    weights = (torch.einsum("hd,khd->hk", q, k) * q.shape[-1] ** -0.5).softmax(-1).mean(0)
    torch.testing.assert_close(heat[0, 0], weights[3:].float(), rtol=1e-4, atol=1e-6)


def test_words_are_put_together_from_tokens():
    class Pieces:
        def decode(self, ids):
            return "".join("a| cat| s|at|.| \n|on".split("|")[i] for i in ids)
    assert attention_map.words_of(Pieces(), list(range(7))) == [("a", [0]), ("cat", [1]), ("sat.", [2, 3, 4]), ("on", [6])]
