"""One image and one question through the whole model, step by step, every shape printed.

    python -m nanoeemllm.walkthrough [--image FILE] [--prompt TEXT] [--weights DIR]

Each step says in which file and function it is, and calls it. The model is the tiny one that
`python train.py` leaves in out/finetune, or one with random weights.
"""

from pathlib import Path

import torch

from nanoeemllm.attention import visible
from nanoeemllm.cache import KVCache
from nanoeemllm.config import PRESETS, ModelConfig
from nanoeemllm.decoder import Context
from nanoeemllm.layout import build_layout
from nanoeemllm.llama import rope_cos_sin
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import encode_prompt


@torch.inference_mode()
def walk(model: EEMLLM, image, question: str):
    """Prints all steps. model: under the visual path eemllm; image: PIL's."""
    from nanoeemllm.data.images import prepare_image
    config, decoder = model.config, model.decoder

    step(1, "the image becomes patches", "data/images.py: prepare_image")
    patches, grid = prepare_image(image, config.vision)
    print(f"   {image.width} x {image.height} pixels -> {grid[0]} x {grid[1]} patches of "
          f"3 x {config.vision.patch_size} x {config.vision.patch_size} numbers: {shape(patches)}")
    step(2, "patches become visual tokens", "vision.py: VisionTransformer, Projector")
    features = model.vision(patches.to(model.dtype), [grid])
    visual = model.projector(features)
    print(f"   ViT {shape(features)} -> projector {shape(visual)}: V = {len(visual)} visual tokens")
    step(3, "the question becomes ids", "prompt.py: encode_prompt")
    ids = encode_prompt(model.tokenizer, "<image>\n" + question, config.chat_template)
    print("  ", *(name_of(model, token) for token in ids))
    step(4, "rows, positions and prefix lengths of the text rows", "layout.py: build_layout")
    text_ids, layout = build_layout([ids], [[grid]])
    T, V = layout.num_text, layout.num_visual
    print(f"   T = {T} text rows first, then V = {V} visual rows")
    for name in ("position", "sees_visual", "sees_text"):
        print(f"   {name:<12}", *(f"{n:>3}" for n in getattr(layout, name)[:T].tolist()))
    step(5, "the mask that they mean; visual rows make no query", "attention.py: visible")
    mask = visible(layout.text_queries, slice(0, T), V, T).int()
    for token, row in zip(text_ids.tolist(), mask):
        on_visual, on_text = ("".join(map(str, part.tolist())) for part in row.split([V, T]))
        on_visual = on_visual if V <= 64 else f"{on_visual[:16]}..{on_visual[-16:]}"
        print(f"   {name_of(model, token):>12}   visual {on_visual}   text {on_text}")
    step(6, "one layer, as eemllm and as llava", "decoder.py: DecoderLayer.forward, LlavaLayer")
    x = torch.cat([decoder.embed_tokens(text_ids), visual])
    ctx = Context(T, rope_cos_sin(layout.position, config.llama, x), layout.text_queries, layout)
    show_layer(model, "eemllm", x, ctx, queries=T)
    show_layer(model, "llava", x, ctx, queries=T + V)
    step(7, "all layers, and what each caches", "decoder.py: Decoder.run; cache.py: KVCache")
    cache = KVCache(config.llama, layout, 1, model.dtype)
    hidden = decoder(text_ids, visual, layout, cache)
    print(f"   {shape(x)} -> {len(decoder.layers)} layers -> text rows alone {shape(hidden)}\n"
          f"   keys, values: visual {shape(cache.k_visual[0])}, text {shape(cache.k_text[0][:T])}")
    step(8, "the five likeliest next tokens", "decoder.py: Decoder.logits; generate.py: choose")
    likely = decoder.logits(hidden[-1:]).float().softmax(-1)[0].topk(5)
    for probability, token in zip(likely.values.tolist(), likely.indices.tolist()):
        print(f"   {probability:6.1%}  {name_of(model, token)}")
    print("   answer:", model.tokenizer.decode(model.generate(ids, [image], max_new_tokens=24)))


def show_layer(model: EEMLLM, name: str, x: torch.Tensor, ctx: Context, queries: int):
    """The model's first layer as the visual path `name` has it, and the operations of all."""
    from nanoeemllm.data.cost import operations
    config = ModelConfig(model.config.llama, model.config.vision, model.config.path_named(name))
    layer = config.visual_path.layer(config.llama, 0, None).to(x)
    layer.load_state_dict(model.decoder.layers[0].state_dict())
    pairs = int((ctx.layout.sees_visual + ctx.layout.sees_text)[:queries].sum())
    work = operations(config, [(ctx.T, [len(x) - ctx.T])])[0] / 1e6
    print(f"   {name:<6}  {shape(x)} -> {shape(layer(x, ctx))}   {queries} queries, {len(x)} keys, "
          f"{pairs:,} pairs; {work:,.1f} million operations in all layers")


def step(number: int, title: str, place: str):
    print(f"\n{number}. {title}   [{place}]")


def shape(x: torch.Tensor) -> str:
    return str(tuple(x.shape))


def name_of(model: EEMLLM, token: int) -> str:
    name = "<image>" if token < 0 else model.tokenizer.name_of(token) or f"(no word: {token})"
    return name if name.isprintable() else repr(name)


def main():
    from nanoeemllm import load
    from nanoeemllm.border.command import Parser
    from nanoeemllm.data.images import load_image
    from nanoeemllm.toy.backbones import tiny_tokenizer
    from nanoeemllm.weights.initialize import initialize
    parser = Parser(__doc__, "python -m nanoeemllm.walkthrough")
    parser.add_argument("--image", default=Path(__file__).parent / "assets" / "cat.png")
    parser.add_argument("--prompt", default="what colour is the cat?")
    parser.add_argument("--weights", type=Path, default=Path("out/finetune"), metavar="DIR")
    args = parser.parse_args()
    if args.weights.exists():
        model = load(args.weights, "cpu", torch.float32, visual_path="eemllm")
    else:
        print(f"{args.weights} is not there: weights and answer are random")
        torch.manual_seed(0)
        model = EEMLLM(PRESETS["tiny"], tiny_tokenizer(PRESETS["tiny"]))
        initialize(model)
    walk(model, load_image(args.image), args.prompt)


if __name__ == "__main__":
    from nanoeemllm.border.command import run_command
    run_command(main)
