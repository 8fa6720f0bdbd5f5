"""Operations and memory counted twice: by running the model on the meta device (data/cost.py), and by the formulas of
the papers, from sizes alone, which stand only here."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from layouts import random_samples
from nanoeemllm.attention import attention_reference, use_attention
from nanoeemllm.bench import operations as bench_operations
from nanoeemllm.bench.__main__ import main
from nanoeemllm.cache import KVCache
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, LlamaConfig, ModelConfig, VisionConfig
from nanoeemllm.data import cost
from nanoeemllm.layout import build_layout
from nanoeemllm.model import EEMLLM, Batch
from nanoeemllm.paths import PATHS, make
from nanoeemllm.training.config import freeze
from nanoeemllm.weights.initialize import initialize

LLAMA = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, max_position_embeddings=512)
VISION = VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=2,
                      image_size=24, min_image_size=2, resize="native")
CLIP = dataclasses.replace(VISION, architecture="clip", num_hidden_layers=3)
UNEVEN = make("yopo", window=3, last_visual_layer=3, kept_heads=((0, 1, 2, 3), (1,), (0, 2), (3,)))
VARIANTS = {name: path.published(LLAMA) for name, path in PATHS.items()}
VARIANTS |= {"yopo-uneven": UNEVEN, "flamingo-1": make("flamingo", every=1), "eemllm-vo": make("eemllm", aligner="vo"),
             "eemllm-v": make("eemllm", aligner="v"), "eemllm-of": make("eemllm", aligner="of")}


# ---- the formulas: n rows through a matrix a x b are 2 n a b; attention of n queries over m keys 4 n m H D ----

def by_formula(config: ModelConfig, samples: list, rectangles: bool) -> Counter:
    """Operations by term; samples as cost.operations takes them: images in front, one row of logits."""
    llama, vision, total = config.llama, config.vision, Counter()
    for text, visual in samples:
        total["logits"] += 2 * llama.hidden_size * llama.vocab_size
        # of each image: its patches, the text rows before it, those from it to the next image
        images = [(n, 0, text if i == len(visual) - 1 else 0) for i, n in enumerate(visual)]
        for layer in range(llama.num_hidden_layers):
            total += of_layer(config, layer, text, images, rectangles)
        for n in visual:
            rows, width = n + (vision.architecture == "clip"), vision.hidden_size
            linear = 2 * rows * (4 * width ** 2 + 2 * width * vision.intermediate_size)
            total["encoder"] += 2 * n * vision.patch_dim * width
            total["encoder"] += vision.num_hidden_layers * (linear + 4 * rows ** 2 * width)
            if config.visual_path.name != "saisa":
                total["projector"] += 2 * n * llama.hidden_size * (width + llama.hidden_size)
    return total


def of_layer(config: ModelConfig, layer: int, T: int, images: list, rectangles: bool) -> Counter:
    llama, path = config.llama, config.visual_path
    C, F, L = llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers
    H, G, D = llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim
    query_out, key_value, ffn = 2 * (2 * C * H * D), 2 * (2 * C * G * D), 2 * (3 * C * F)      # a row
    pair, goes_on = 4 * D, layer < L - 1                                                       # pair: in one head

    V, before = sum(n for n, _, _ in images), sum(n * before for n, before, _ in images)
    text_text = T * T if rectangles else T * (T + 1) // 2
    text_visual = T * V if rectangles else T * V - before
    of_visual = V * (T + V) if rectangles else V * (V + 1) // 2 + before

    count = Counter({"text": T * (query_out + key_value + ffn), "text attention": H * pair * (text_text + text_visual),
                     "visual": V * key_value * visual_key_heads(config, layer) // G})
    name, aligner = path.name, getattr(path, "aligner", "vof")
    if name == "eemllm-f":
        name = "eemllm" if layer in path.composite_layers else "llava"

    if name == "llava" and goes_on:
        count["visual"] += V * (query_out + ffn)
        count["visual attention"] = H * pair * of_visual
    elif name == "eemllm" and goes_on:
        count["visual"] += V * (("o" in aligner) * query_out // 2 + ("f" in aligner) * ffn)
    elif name == "naavit" and goes_on:
        count["visual"] += V * ffn
    elif name == "saisa":
        count["own"] = 2 * V * C * (config.vision.hidden_size + C)
    elif name == "yopo":
        cut = path.visual_layers(llama)
        kept = len(path.heads(llama, layer)) if layer < cut else 0
        count["text attention"] = pair * (H * text_text + kept * text_visual)
        if layer < cut - 1:
            count["visual"] += V * (query_out * kept // H + 2 * 3 * C * (F // path.ffn_ratio))
            count["visual attention"] = pair * kept * (V * path.window ** 2 + before)
    elif name == "flamingo":
        block = (layer + 1) % path.every == 0
        count["own"] = block * T * (query_out + ffn) + count.pop("visual")
        count["text attention"] = H * pair * (text_text + block * sum(n * after for n, _, after in images))
    return count


def visual_key_heads(config: ModelConfig, layer: int) -> int:
    """How many of a layer's key heads have visual keys."""
    llama, path = config.llama, config.visual_path
    if path.name == "yopo":
        heads = path.heads(llama, layer) if layer < path.visual_layers(llama) else ()
        return len({head * llama.num_key_value_heads // llama.num_attention_heads for head in heads})
    return llama.num_key_value_heads * (path.name != "flamingo" or (layer + 1) % path.every == 0)


# ---- a forward pass ----

@pytest.mark.parametrize("rectangles", [True, False], ids=["rectangles", "visible"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_prefill_is_counted_as_the_formulas_do(name, rectangles):
    """To the operation, on every path: several samples, several images, text alone, CLIP's class token."""
    for vision, samples in ((VISION, [(20, [30, 12])]), (VISION, [(9, [40]), (5, []), (12, [8])]), (CLIP, [(9, [144])])):
        config = ModelConfig(LLAMA, vision, VARIANTS[name])
        want = by_formula(config, samples, rectangles)
        language, projector, encoder = cost.operations(config, samples, rectangles=rectangles)
        assert (projector, encoder) == (want["projector"], want["encoder"])
        assert language == want.total() - want["projector"] - want["encoder"]


@pytest.mark.parametrize("vision", [VISION, CLIP], ids=["siglip", "clip"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_prefill_is_counted_as_pytorch_sees_it(name, vision):
    """In a real pass with the rule as it is written down: every query with every key of its sample."""
    config = ModelConfig(LLAMA, vision, VARIANTS[name])
    model = EEMLLM(config)
    text, layout = build_layout([[1, IMAGE_TOKEN] + [1] * 29], [[(12, 12)]])
    with use_attention(attention_reference), FlopCounterMode(display=False) as seen, torch.no_grad():
        hidden = model.decoder(text, model.visual_tokens(torch.randn(144, VISION.patch_dim), [(12, 12)]), layout)
        model.decoder.logits(hidden[-1:])
    assert sum(cost.operations(config, [(30, [144])], rectangles=True)) == pytest.approx(seen.get_total_flops(), rel=0.01)


def test_text_alone_costs_the_same_on_every_path_without_blocks():
    configs = [ModelConfig(LLAMA, VISION, path) for name, path in VARIANTS.items() if "flamingo" not in name]
    assert len({sum(cost.operations(config, [(12, []), (5, [])])) for config in configs}) == 1


@pytest.mark.parametrize("seed", range(6))
def test_visible_pairs_are_those_of_the_rule(seed):
    """The two counts of a row, summed, are pairs counted one by one: of the text, and of llava's visual tokens."""
    ids, grids = random_samples(seed)
    _, layout = build_layout(ids, grids)
    T = pairs = 0
    for sample, its in zip(ids, grids):
        lengths = iter(h * w for h, w in its)
        merged = sum((["v"] * next(lengths) if i == IMAGE_TOKEN else ["t"] for i in sample), [])
        T += merged.count("t")
        pairs += sum(place + 1 for place in range(len(merged)))
    assert layout.num_text == T and int(layout.sees_text.sum() + layout.sees_visual.sum()) == pairs


@pytest.mark.parametrize("name", VARIANTS)
def test_visual_key_heads_are_those_of_the_cache(name):
    config = ModelConfig(LLAMA, VISION, VARIANTS[name])
    model = EEMLLM(config)
    initialize(model)
    text, layout = build_layout([[1, 1, IMAGE_TOKEN, 1]], [[(6, 8)]])
    cache = KVCache(LLAMA, layout, 1, torch.float32)
    with torch.inference_mode():
        model.decoder(text, model.visual_tokens(torch.randn(48, VISION.patch_dim), [(6, 8)]), layout, cache)
    for layer, k in enumerate(cache.k_visual):
        assert k.numel() == 48 * LLAMA.head_dim * visual_key_heads(config, layer)


# ---- a training step ----

@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", VARIANTS)
def test_training_is_counted_as_the_formulas_do(name, stage):
    """A product has two gradients, of its weights and of its rows; what is frozen has none of its weights, and the
    frozen encoder none at all. The first rows in the network need no gradient of their own, hence 10%; flamingo with one
    block, in the last layer, none in any layer before it."""
    if name == "flamingo":
        return
    config, samples = ModelConfig(LLAMA, VISION, VARIANTS[name]), [(61, [144])]
    count = by_formula(config, samples, rectangles=False)
    encoder, projector, logits = (count.pop(term, 0) for term in ("encoder", "projector", "logits"))
    learns = count["own"] + count["text attention"] + count["visual attention"]     # a score's product has two as well
    passes = 3 if stage == "finetune" else 2
    want = encoder + 3 * (projector + learns) + passes * (count.total() - learns + logits)
    assert cost.step(config, samples, stage, False, 1)[0] == pytest.approx(want, rel=0.1)


def leave_attention_aside(q, keys, sees):
    """Saves nothing for the backward pass, on a CPU and on meta."""
    return q + sum(x.sum() for x in keys)


@pytest.mark.parametrize("stage, checkpointed", [("pretrain", False), ("finetune", False), ("finetune", True)])
@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_saved_are_those_of_a_real_run(name, stage, checkpointed):
    """cost.step beside saved_tensors_hooks in the same model on a CPU, attention aside: each implements it in its own way."""
    config, samples, targets = ModelConfig(LLAMA, VISION, VARIANTS[name]), [(9, [12]), (5, [6, 4]), (7, [])], 6
    with use_attention(leave_attention_aside):
        _, forecast = cost.step(config, samples, stage, checkpointed, targets)
    model = EEMLLM(config).to(torch.bfloat16)
    initialize(model)
    freeze(model, stage)
    model.decoder.checkpoint_activations = checkpointed
    rows = torch.arange(targets)
    ids, layout = build_layout([[IMAGE_TOKEN] * len(visual) + [1] * text for text, visual in samples],
                               [[(1, n) for n in visual] for _, visual in samples])
    batch = Batch(ids, layout, torch.randn(layout.num_visual, VISION.patch_dim), rows, rows, [])
    weights, saved = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def save(x):
        if x.untyped_storage()._cdata not in weights:
            saved[x.untyped_storage()._cdata] = x
        return x

    with use_attention(leave_attention_aside), saved_tensors_hooks(save, lambda x: x):
        model(batch).backward()
    real = sum(x.untyped_storage().nbytes() for x in saved.values())
    assert forecast == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("name", VARIANTS)
def test_sample_cost_is_exact_on_other_sizes(name):
    for vision, sizes in ((VISION, [(7, 0), (33, 100), (5, 9)]), (CLIP, [(7, 144), (50, 144), (50, 288)])):
        config = ModelConfig(LLAMA, vision, VARIANTS[name])

        def work(text: int, visual: int) -> float:
            images = [144] * (visual // 144) if vision is CLIP else [visual] * bool(visual)
            language, projector, encoder = cost.operations(config, [(text, images)], logits=0)
            return 3 * (language + projector) + encoder

        for text, visual in sizes:
            if visual == 288 and "flamingo" in name:      # its text attends to the last image, and two are not told from one
                continue
            assert cost.sample_cost(config)(text, visual) == pytest.approx(work(text, visual) / work(1, 0), rel=1e-9)


# ---- what the papers state ----

def test_published_ratio_of_the_formula():
    """EE-MLLM's own formula, all layers alike: 77% at 4,900 visual and 256 text tokens."""
    d, ffn, T, V = 4096, 6 * 4096 * 11008, 256, 4900
    llava = (T + V) * (8 * d * d + ffn) + 4 * (T + V) ** 2 * d
    eemllm = T * 8 * d * d + V * 4 * d * d + 4 * T * (T + V) * d + (T + V) * ffn + 2 * V * d * d
    assert round(100 * eemllm / llava) == 77 == round(share(PRESETS["eemllm-7b-980"], make("eemllm"), T, V))


def share(config: ModelConfig, path, text: int, visual: int, terms=None) -> float:
    """Percent of llava's operations, by the formulas that the counts agree with; all terms of the language model or
    those named."""
    def total(path):
        count = by_formula(dataclasses.replace(config, visual_path=path), [(text, [visual])], rectangles=True)
        named = terms or set(count) - {"encoder", "projector"}
        return sum(count[term] for term in named)
    return 100 * total(path) / total(make("llava"))


def test_statements_of_the_papers():
    """The numbers of bench/README.md."""
    clip = PRESETS["llava-1.5-7b"]
    llama = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                        num_key_value_heads=40)
    thirteen, yopo = dataclasses.replace(clip, llama=llama), PATHS["yopo"].published(llama)
    assert round(share(PRESETS["eemllm-7b-980"], make("eemllm", aligner="vf"), 256, 4900)) == 71
    assert round(100 - share(clip, make("saisa"), 64, 576)) == 66
    everything = ["encoder", "projector", "text", "visual", "own", "text attention", "visual attention", "logits"]
    assert round(100 - share(clip, make("saisa"), 64, 576, everything)) == 63
    assert round(share(thirteen, yopo, 64, 576, ["visual", "visual attention"])) == 21
    assert round(share(thirteen, yopo, 64, 576)) == 29


def test_every_registered_path_is_in_the_table_of_operations(capsys, monkeypatch):
    monkeypatch.setattr(bench_operations, "CASES", [(4, [16])] * 5)
    main(["flops", "--preset", "tiny"])
    out = capsys.readouterr().out
    assert all(out.count(f"| {name} |") == 3 for name in PATHS)
    main(["operations", "--preset", "tiny", "--visual-path", "yopo", "--window", "3"])
    out = capsys.readouterr().out
    assert out.count("| llava |") == out.count("| yopo |") == 3 and "| saisa |" not in out
