"""Operations counted twice: from sizes, and by PyTorch in a real forward pass."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanoeemllm.config import IMAGE_TOKEN, LlamaConfig, ModelConfig, VisionConfig, VisualPathConfig
from nanoeemllm.decoder import KVCache
from nanoeemllm.flops import forward_operations, main, published_paths, training_operations, visual_key_heads
from nanoeemllm.layout import build_layout
from nanoeemllm.model import EEMLLM

LLAMA = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, max_position_embeddings=512)
VISION = VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=2,
                      image_size=24, min_image_size=2, resize="native")
CLIP = dataclasses.replace(VISION, architecture="clip", num_hidden_layers=3)
UNEVEN = VisualPathConfig("yopo", window=3, last_visual_layer=3, kept_heads=((0, 1, 2, 3), (1,), (0, 2), (3,)))
PATHS = {**published_paths(LLAMA), "yopo-uneven": UNEVEN, "flamingo-1": VisualPathConfig("flamingo", every=1),
         "eemllm-v": VisualPathConfig("eemllm", "v"), "eemllm-of": VisualPathConfig("eemllm", "of")}


def seen_and_counted(path, vision, ids, grids):
    """One sample of under 256 rows: there the PyTorch attention is one rectangle of all queries and keys. Of its ways
    through, FlopCounterMode knows on a CPU the one made of plain products alone (MATH)."""
    config = ModelConfig(LLAMA, vision, path)
    model = EEMLLM(config)
    text, layout = build_layout([ids], [grids])
    patches = torch.randn(sum(h * w for h, w in grids), vision.patch_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen, torch.no_grad():
        hidden = model.decoder(text, model.visual_tokens(patches, grids), layout)
        model.decoder.logits(hidden[-1:])
    return seen.get_total_flops(), forward_operations(config, layout, 1)


@pytest.mark.parametrize("vision", [VISION, CLIP], ids=["siglip", "clip"])
@pytest.mark.parametrize("name", PATHS)
def test_count_agrees_with_what_pytorch_sees(name, vision):
    ids = [1] * 9 + [IMAGE_TOKEN] + [1] * 20
    seen, count = seen_and_counted(PATHS[name], vision, ids, [(12, 12)])
    assert count.total() == pytest.approx(seen, rel=0.01)


@pytest.mark.parametrize("name", PATHS)
def test_count_with_several_pictures(name):
    """Of as many patches, and as many words after each: with unequal ones PyTorch pads to the greatest."""
    ids = [1, 1, IMAGE_TOKEN, 1, 1, 1, IMAGE_TOKEN, 1, 1, 1]
    seen, count = seen_and_counted(PATHS[name], VISION, ids, [(6, 8), (8, 6)])
    assert count.total() == pytest.approx(seen, rel=0.01)


def test_text_alone_costs_the_same_on_every_path_without_blocks():
    _, layout = build_layout([[1] * 12, [1] * 5], [[], []])
    totals = {forward_operations(ModelConfig(LLAMA, VISION, path), layout, 2).total() for path in PATHS.values()
              if path.name != "flamingo"}
    assert len(totals) == 1


@pytest.mark.parametrize("name", PATHS)
def test_seen_pairs_are_those_of_the_rule(name):
    """Counted one by one: text sees what does not stand behind it, llava's visual tokens likewise in all layers but the
    last; flamingo's blocks see the picture that stands last; yopo's heads and layers are counted singly."""
    path, L, H = PATHS[name], LLAMA.num_hidden_layers, LLAMA.num_attention_heads
    ids = [[IMAGE_TOKEN, 1, 1], [1, 1, IMAGE_TOKEN, 1, IMAGE_TOKEN, IMAGE_TOKEN, 1, 1, 1], [1, 1, 1, 1]]
    grids = [[(3, 4)], [(2, 2), (5, 3), (4, 4)], []]
    text = visual = 0
    for one, its in zip(ids, grids):
        layout = build_layout([one], [its])[1]
        pairs = lambda queries, keys: sum((keys.position <= p).sum().item() for p in queries.position)
        of_text, of_pictures = pairs(layout.text, layout.text), pairs(layout.text, layout.visual)
        of_visual = pairs(layout.visual, layout.text) + pairs(layout.visual, layout.visual)
        blocks = sum((p.rows.stop - p.rows.start) * (p.after.stop - p.after.start) for p in layout.pictures)
        for layer in range(L):
            like_llava = path.name == "llava" or path.name == "eemllm-f" and layer not in path.composite_layers
            kept = len(path.heads(LLAMA, layer)) if path.name == "yopo" and layer < path.visual_layers(LLAMA) else 0
            text += H * of_text + {"flamingo": H * blocks * ((layer + 1) % path.every == 0),
                                   "yopo": kept * of_pictures}.get(path.name, H * of_pictures)
            visual += H * of_visual * (like_llava and layer < L - 1)
    count = forward_operations(ModelConfig(LLAMA, VISION, path), build_layout(ids, grids)[1], 3, seen=True)
    assert count["text attention"] == 4 * LLAMA.head_dim * text
    if path.name != "yopo":
        assert count["visual attention"] == 4 * LLAMA.head_dim * visual


@pytest.mark.parametrize("name", PATHS)
def test_visual_key_heads_are_those_of_the_cache(name):
    config = ModelConfig(LLAMA, VISION, PATHS[name])
    model = EEMLLM(config)
    model.initialize()
    ids, grid = [1, 1, IMAGE_TOKEN, 1], (6, 8)
    text, layout = build_layout([ids], [[grid]])
    cache = KVCache(LLAMA, layout, 1, torch.float32)
    with torch.inference_mode():
        model.decoder(text, model.visual_tokens(torch.randn(48, VISION.patch_dim), [grid]), layout, cache)
    for layer, k in enumerate(cache.k_visual):
        assert k.numel() == 48 * LLAMA.head_dim * visual_key_heads(config, layer)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["llava", "eemllm", "saisa", "flamingo-1"])
def test_training_is_counted_as_pytorch_sees_it(name, stage):
    """Forward and backward of a stage. The first rows in the network need no gradient of their own, hence 10%."""
    from nanoeemllm.training import freeze_for
    config = ModelConfig(LLAMA, VISION, PATHS[name])
    model = EEMLLM(config)
    model.initialize()
    freeze_for(model, stage)
    text, layout = build_layout([[1, IMAGE_TOKEN] + [1] * 60], [[(12, 12)]])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
        hidden = model.decoder(text, model.visual_tokens(torch.randn(144, VISION.patch_dim), [(12, 12)]), layout)
        model.decoder.logits(hidden[-20:]).sum().backward()
    assert training_operations(config, layout, 20, stage) == pytest.approx(seen.get_total_flops(), rel=0.1)


def test_published_ratio_of_the_formula(capsys):
    """EE-MLLM's own formula, all layers alike: 77% at 4,900 visual and 256 text tokens."""
    d, ffn, T, V = 4096, 6 * 4096 * 11008, 256, 4900
    llava = (T + V) * (8 * d * d + ffn) + 4 * (T + V) ** 2 * d
    eemllm = T * 8 * d * d + V * 4 * d * d + 4 * T * (T + V) * d + (T + V) * ffn + 2 * V * d * d
    main(["--preset", "eemllm-7b-980"])
    out = capsys.readouterr().out
    assert f"counted {100 * eemllm / llava:.0f}%" in out and all(f"| {name} " in out for name in published_paths(LLAMA))
