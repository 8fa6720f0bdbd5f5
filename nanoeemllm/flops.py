"""Operations of a forward pass, counted from sizes alone, and what the papers say of them.

    python -m nanoeemllm.bench flops --preset eemllm-7b-980

A multiplication and its addition are two operations; only matrix products count, as in the papers and in PyTorch's
FlopCounterMode, which sees the same numbers (tests/test_flops.py). n rows through a matrix a x b: 2 n a b. Attention of
n queries over m keys in all heads: 4 n m H D, the whole rectangle, as the papers have it; kernels skip most of the
part that no query may see. Last layer's visual tokens are not carried further in any path; the papers' formulas do it.
"""

import dataclasses
from collections import Counter

from nanoeemllm.command_line import Parser, add_visual_path_flags, settings_from, visual_path_from
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, LlamaConfig, ModelConfig, VisualPathConfig
from nanoeemllm.layout import Layout, build_layout


def forward_operations(config: ModelConfig, layout: Layout, learned_rows: int, seen: bool = False) -> Counter:
    """A packed batch -> operations by term: encoder, projector, text, visual (linear layers), own (those with weights
    of the path's own), text attention, visual attention, logits (of learned_rows rows). Sum them with .total().
    seen: attention over the pairs alone of which the query may see the key, which is what kernels compute."""
    count = Counter({"logits": 2 * learned_rows * config.llama.hidden_size * config.llama.vocab_size})
    for text, pictures in _samples(layout):
        count += sample_operations(config, text, pictures, seen)
    return count


def sample_operations(config: ModelConfig, text: int, pictures: list[tuple[int, int, int]], seen: bool = False) -> Counter:
    """One sample, without logits. Of each picture: its patches, the text rows before it, those to the next picture."""
    count = Counter()
    for layer in range(config.llama.num_hidden_layers):
        count += _layer(config, layer, text, pictures, seen)
    for n, _, _ in pictures:
        count["encoder"] += _encoder(config.vision, n)
        if config.visual_path.name != "saisa":
            count["projector"] += 2 * n * config.llama.hidden_size * (config.vision.hidden_size + config.llama.hidden_size)
    return count


def training_operations(config: ModelConfig, layout: Layout, learned_rows: int, stage: str,
                        recomputed: bool = False) -> int:
    """Forward and backward of one step of a stage. A product has two gradients, of its weights and of its rows; what is
    frozen has none of its weights, and the frozen encoder none at all. (Rows in front of everything that learns need
    none either; they are a small part and counted.) recomputed: activation checkpointing."""
    count = forward_operations(config, layout, learned_rows)
    encoder, projector, logits = (count.pop(term, 0) for term in ("encoder", "projector", "logits"))
    learns = count["own"] + count["text attention"] + count["visual attention"]     # a score's product has two as well
    others = count.total() - learns
    passes = 3 if stage == "finetune" else 2
    return encoder + 3 * (projector + learns) + passes * (others + logits) + recomputed * count.total()


def _samples(layout: Layout):
    """Per sample what sample_operations asks for."""
    pictures = [[] for _ in range(layout.num_samples)]
    for p in layout.pictures:
        pictures[p.sample].append((p.grid[0] * p.grid[1], p.before.stop - p.before.start, p.after.stop - p.after.start))
    return zip(layout.text.length.tolist(), pictures)


def _layer(config: ModelConfig, layer: int, T: int, pictures: list[tuple[int, int, int]], seen: bool) -> Counter:
    """One layer and one sample of T text rows."""
    llama, path = config.llama, config.visual_path
    C, F, L = llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers
    H, G, D = llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim
    query_out, key_value, ffn = 2 * (2 * C * H * D), 2 * (2 * C * G * D), 2 * (3 * C * F)      # a row
    pair, goes_on = 4 * D, layer < L - 1                                                       # pair: in one head

    V, seen_before = sum(n for n, _, _ in pictures), sum(n * before for n, before, _ in pictures)
    text_text = T * (T + 1) // 2 if seen else T * T
    text_visual = T * V - seen_before if seen else T * V
    of_visual = V * (V + 1) // 2 + seen_before if seen else V * (T + V)

    count = Counter({"text": T * (query_out + key_value + ffn), "text attention": H * pair * (text_text + text_visual),
                     "visual": V * key_value * visual_key_heads(config, layer) // G})
    name, aligner = path.name, path.aligner
    if name == "eemllm-f":
        name, aligner = "eemllm" if layer in path.composite_layers else "llava", "vof"

    if name == "llava" and goes_on:
        count["visual"] += V * (query_out + ffn)
        count["visual attention"] = H * pair * of_visual
    elif name == "eemllm" and goes_on:
        count["visual"] += V * (("o" in aligner) * query_out // 2 + ("f" in aligner) * ffn)
    elif name == "naavit" and goes_on:
        count["visual"] += V * ffn
    elif name == "saisa" and V:
        count["own"] = 2 * V * C * (config.vision.hidden_size + C)
    elif name == "yopo":
        cut = path.visual_layers(llama)
        kept = len(path.heads(llama, layer)) if layer < cut else 0
        count["text attention"] = pair * (H * text_text + kept * text_visual)
        if layer < cut - 1:
            count["visual"] += V * (query_out * kept // H + 2 * 3 * C * (F // path.ffn_ratio))
            count["visual attention"] = pair * kept * (V * path.window ** 2 + seen_before)
    elif name == "flamingo":
        block = (layer + 1) % path.every == 0
        count["own"] = block * T * (query_out + ffn) + count.pop("visual")
        count["text attention"] = H * pair * (text_text + block * sum(n * after for n, _, after in pictures))
    return count


def visual_key_heads(config: ModelConfig, layer: int) -> int:
    """How many of a layer's key heads have visual keys."""
    llama, path = config.llama, config.visual_path
    if path.name == "yopo":
        heads = path.heads(llama, layer) if layer < path.visual_layers(llama) else ()
        return len({head * llama.num_key_value_heads // llama.num_attention_heads for head in heads})
    return llama.num_key_value_heads * (path.name != "flamingo" or (layer + 1) % path.every == 0)


def _encoder(vision, n: int) -> int:
    """One picture of n patches."""
    width, rows = vision.hidden_size, n + (vision.architecture == "clip")
    layer = 2 * rows * (4 * width ** 2 + 2 * width * vision.intermediate_size) + 4 * rows ** 2 * width
    return 2 * n * vision.patch_dim * width + vision.num_hidden_layers * layer


# ---- python -m nanoeemllm.bench flops ----

SIDES = {576: 24, 2304: 48, 4900: 70}                        # visual tokens -> patches along a side
TEXT_BEFORE = 35                                             # Vicuna's system prompt stands before the picture


def prompt(text: int, side: int, images: int = 1) -> Layout:
    """text tokens in all, and pictures of side x side patches after the first TEXT_BEFORE of them."""
    before = min(TEXT_BEFORE, text - 1)
    ids = [1] * before + [IMAGE_TOKEN] * images + [1] * (text - before)
    return build_layout([ids], [[(side, side)] * images])[1]


def published_paths(llama: LlamaConfig) -> dict[str, VisualPathConfig]:
    """Each path with the settings of its paper, scaled to this model's layers and heads."""
    L, H = llama.num_hidden_layers, llama.num_attention_heads
    return {"llava": VisualPathConfig("llava"), "eemllm": VisualPathConfig("eemllm"),
            "eemllm-f": VisualPathConfig("eemllm-f", composite_layers=tuple(range(L // 2, L))),
            "naavit": VisualPathConfig("naavit"), "saisa": VisualPathConfig("saisa"),
            "yopo": VisualPathConfig("yopo", window=5, ffn_ratio=2, last_visual_layer=max(1, L // 2),
                                     prune_heads=H * 3 // 4 or None),
            "flamingo": VisualPathConfig("flamingo", every=min(4, L))}


def paths_from(args, config: ModelConfig) -> dict[str, VisualPathConfig]:
    """All paths, as published or, the model's own, as it is, and as the flags change them; with --visual-path that one
    beside llava."""
    paths = published_paths(config.llama) | {config.visual_path.name: config.visual_path}
    if args.visual_path:
        paths = {"llava": paths["llava"], args.visual_path: visual_path_from(args, paths[args.visual_path])}
    else:
        paths = {name: dataclasses.replace(path, **settings_from(args, name)) for name, path in paths.items()}
    for path in paths.values():
        path.check(config.llama)
    return paths


def relative(config: ModelConfig, path: VisualPathConfig, layout: Layout, encoder: bool = False) -> tuple[float, int]:
    """(operations of `path` / those of llava, the operations) of a prefill; encoder: with it and the projector."""
    def total(path):
        count = forward_operations(dataclasses.replace(config, visual_path=path), layout, 1)
        return sum(n for term, n in count.items() if encoder or term not in ("encoder", "projector"))
    operations = total(path)
    return operations / total(VisualPathConfig("llava")), operations


def statements() -> list[str]:
    """What the papers say, beside what is counted here."""
    seven, clip = PRESETS["eemllm-7b-980"], PRESETS["llava-1.5-7b"]
    thirteen = dataclasses.replace(clip, llama=LlamaConfig(hidden_size=5120, intermediate_size=13824,
                                   num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40))
    percent = lambda *case: 100 * relative(*case)[0]
    eemllm, without_o = (percent(seven, VisualPathConfig("eemllm", a), prompt(256, 70)) for a in ("vof", "vf"))
    saisa, saisa_whole = (percent(clip, VisualPathConfig("saisa"), prompt(64, 24), whole) for whole in (False, True))
    yopo = published_paths(thirteen.llama)["yopo"]
    count = {path.name: forward_operations(dataclasses.replace(thirteen, visual_path=path), prompt(64, 24), 1)
             for path in (yopo, VisualPathConfig("llava"))}
    visual = {name: terms["visual"] + terms["visual attention"] for name, terms in count.items()}
    pruned, whole = 100 * visual["yopo"] / visual["llava"], percent(thirteen, yopo, prompt(64, 24))
    return [
        "EE-MLLM, 4,900 visual and 256 text tokens: v1 states 70% of LLaVA's operations, v3 24% fewer; counted "
        f"{eemllm:.0f}%, as v1's own formula gives term by term (without the aligner's W_O: {without_o:.0f}%).",
        f"SAISA on LLaVA-1.5-7B, 576 visual tokens: states 66% fewer; counted with 64 text tokens {100 - saisa:.0f}% "
        f"fewer in the language model, {100 - saisa_whole:.0f}% with the encoder, which both need.",
        f"YOPO on LLaVA-1.5-13B: states 25% of the computation; counted {pruned:.0f}% for visual tokens, {whole:.0f}% "
        "for the language model with 64 text tokens, whose own share is not saved."]


def main(argv: list[str]):
    parser = Parser(__doc__, "python -m nanoeemllm.bench flops")
    parser.add_argument("--preset", choices=[n for n in PRESETS if PRESETS[n].vision], default="eemllm-7b-980")
    add_visual_path_flags(parser)
    args = parser.parse_args(argv)
    config = PRESETS[args.preset]
    paths = paths_from(args, config)
    cases = [(side, T, images) for T in (64, 256) for side, images in ((24, 1), (48, 1), (70, 1), (70, 2))]

    for encoder, what in ((False, "the language model, as the papers count"), (True, "with encoder and projector")):
        print(f"\n{args.preset}, prefill, {what}: 10^12 operations, and relative to llava")
        print("| visual tokens | " + " | ".join(f"{'2 x ' * (n == 2)}{s * s:,}" for s, _, n in cases) + " |")
        print("| text tokens   | " + " | ".join(str(T) for _, T, _ in cases) + " |")
        print("|---" * (len(cases) + 1) + "|")
        for name, path in paths.items():
            cells = [relative(config, path, prompt(T, side, n), encoder) for side, T, n in cases]
            print(f"| {name:<13} | " + " | ".join(f"{n / 1e12:,.1f} ({100 * r:.0f}%)" for r, n in cells) + " |")
    print()
    for line in statements():
        print(f"- {line}")
