"""One image and one question through the whole model, step by step, every shape printed.

    python -m nanoeemllm.walkthrough [--image FILE] [--prompt TEXT] [--weights DIR]

Each step says in which file and function it is, and calls it. The model is the tiny one that
`python train.py` leaves in out/finetune, or one with random weights.
"""

import dataclasses
from pathlib import Path

import torch

from nanoeemllm.attention import visible
from nanoeemllm.cache import KVCache
from nanoeemllm.config import PRESETS, ModelConfig
from nanoeemllm.decoder import Context, Decoder
from nanoeemllm.layout import build_layout
from nanoeemllm.llama import rope_cos_sin
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import encode_prompt


def step(number: int, title: str, place: str):
    print(f"\n{number}. {title}   [{place}]")


@torch.inference_mode()
def walk(model: EEMLLM, image, question: str):
    from nanoeemllm.data.images import prepare_image
    config, decoder, tokenizer = model.config, model.decoder, model.tokenizer

    step(1, "the image becomes patches", "data/images.py, prepare_image")
    patches, (h, w) = prepare_image(image, config.vision)
    print(f"   {image.width} x {image.height} pixels -> {h} x {w} patches {shape(patches)}, each "
          f"3 x {config.vision.patch_size} x {config.vision.patch_size} numbers")

    step(2, "patches become features, features visual tokens", "vision.py; model.py, visual_tokens")
    features = model.vision(patches.to(model.dtype), [(h, w)])
    visual = model.visual_tokens(patches, [(h, w)])
    print(f"   ViT {shape(features)} -> projector {shape(visual)}: V = {len(visual)} rows of C numbers")

    step(3, "the question becomes ids", "prompt.py, encode_prompt")
    ids = encode_prompt(tokenizer, "<image>\n" + question, config.chat_template)
    names = ["<image>" if i < 0 else tokenizer.name_of(i) for i in ids]
    print("   " + " ".join(f"{name}" for name in names))

    step(4, "rows, positions and prefix lengths", "layout.py, build_layout")
    text_ids, layout = build_layout([ids], [[(h, w)]])
    T, V = layout.num_text, layout.num_visual
    print(f"   T = {T} text rows, then V = {V} visual rows; positions of the text rows:")
    print(f"   {layout.position[:T].tolist()}")
    print(f"   visual keys that each text row sees: {layout.sees_visual[:T].tolist()}")
    print(f"   text keys that it sees:              {layout.sees_text[:T].tolist()}")

    step(5, "the mask that they mean; no function makes it but the reference", "attention.py, visible")
    mask = visible(layout.text_queries, slice(0, T), V, T).int()
    for row, name in enumerate(n for n in names if n != "<image>"):
        bits = ["".join(map(str, part.tolist())) for part in mask[row].split([V, T])]
        seen = bits[0] if V <= 48 else f"{bits[0][:20]}..{bits[0][-20:]}"
        print(f"   {name!s:>12}   visual {seen}   text {bits[1]}")

    step(6, "one layer, as eemllm and as llava", "decoder.py, DecoderLayer.forward")
    x = torch.cat([decoder.embed_tokens(text_ids), visual])
    ctx = Context(T, rope_cos_sin(layout.position, config.llama, x), layout.text_queries, layout)
    for name in ("eemllm", "llava"):
        compare_layer(model, name, x, ctx, T, V)

    step(7, "all layers, and what is kept for the answer", "decoder.py, Decoder.run; cache.py")
    cache = KVCache(config.llama, layout, 8, model.dtype)
    hidden = decoder(text_ids, visual, layout, cache)
    kept = sum(k.nbytes for k in cache.k_visual) * 2 + cache.k_text[:, :T].nbytes * 2
    print(f"   hidden rows of the text {shape(hidden)}; kept in {config.llama.num_hidden_layers} layers: "
          f"keys and values of {V} visual and {T} text rows, {kept / 1e3:,.0f} kB")

    step(8, "the next token", "decoder.py, logits; generate.py, choose")
    likely = decoder.logits(hidden[-1:]).float().softmax(-1)[0].topk(5)
    for p, i in zip(likely.values.tolist(), likely.indices.tolist()):
        print(f"   {p:6.1%}  {tokenizer.name_of(i)}")
    answer = tokenizer.decode(model.generate(ids, [image], max_new_tokens=24))
    print(f"   ... and on: {answer}")


def compare_layer(model: EEMLLM, name: str, x: torch.Tensor, ctx: Context, T: int, V: int):
    """The first layer's weights under another path, and the operations of the whole model."""
    from nanoeemllm.data.cost import operations
    config = ModelConfig(model.config.llama, model.config.vision, model.config.path_named(name))
    decoder = Decoder(config.llama, config.visual_path).to(x)
    decoder.layers[0].load_state_dict(model.decoder.layers[0].state_dict())
    queries = T if name == "eemllm" else T + V
    pairs = int(ctx.sees.sees_visual.sum() + ctx.sees.sees_text.sum())
    if queries > T:
        pairs += int(ctx.layout.sees_visual[T:].sum() + ctx.layout.sees_text[T:].sum())
    out = decoder.layers[0](x, ctx)
    work, *_ = operations(dataclasses.replace(config), [(T, [V])])
    print(f"   {name:<7} x {shape(x)} -> {shape(out)}; {queries} queries over {T + V} keys see {pairs:,} "
          f"pairs; {work / 1e6:,.1f} million operations in all layers")


def shape(x: torch.Tensor) -> str:
    return "(" + ", ".join(map(str, x.shape)) + ")"


def main():
    from nanoeemllm.border.command import Parser, run_command
    from nanoeemllm.data.images import load_image

    def run():
        parser = Parser(__doc__, "python -m nanoeemllm.walkthrough")
        parser.add_argument("--image", default=Path(__file__).parent / "assets" / "cat.png")
        parser.add_argument("--prompt", default="what colour is the cat?")
        parser.add_argument("--weights", type=Path, help="model folder (out/finetune)")
        args = parser.parse_args()
        walk(load_tiny(args.weights), load_image(args.image), args.prompt)
    run_command(run)


def load_tiny(folder: Path | None) -> EEMLLM:
    from nanoeemllm import load
    from nanoeemllm.toy.backbones import tiny_tokenizer
    from nanoeemllm.weights.initialize import initialize
    if folder or Path("out/finetune/config.json").exists():
        return load(folder or Path("out/finetune"), device="cpu", dtype=torch.float32)
    print("(no trained model in out/finetune: the weights are random, so the answer says nothing)")
    torch.manual_seed(0)
    model = EEMLLM(PRESETS["tiny"], tiny_tokenizer(PRESETS["tiny"]))
    initialize(model)
    return model


if __name__ == "__main__":
    main()
