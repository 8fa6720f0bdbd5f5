"""Asks a model about pictures.

    python sample.py --image nanoeemllm/assets/cat.png                     the newest model under out/ describes it
    python sample.py --image a.png --image b.png --prompt "..."            several pictures; <image> in the prompt places them
    python sample.py --weights DIR --prompt "..."                          another model; text alone is fine too
"""

import argparse
import json
from pathlib import Path

import torch

from nanoeemllm.checkpoint import load
from nanoeemllm.config import UserError, run_command
from nanoeemllm.generation import Sampling
from nanoeemllm.image import load_image
from nanoeemllm.prompt import IMAGE_TEXT, encode_prompt

DEFAULT_PROMPT = "describe the picture thing by thing."      # a sentence of the tiny world; others understand it too


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; give it again for more")
    add("--prompt", help=f'what to ask ("{DEFAULT_PROMPT}")')
    add("--weights", type=Path, metavar="DIR", help="model folder (the newest under out/)")
    add("--visual-path", help="answer by this visual path instead of the model's own")
    add("--max-new-tokens", type=int, default=256)
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens (0: all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability (1)")
    add("--min-p", type=float, default=0.0, help="leave out tokens below this part of the likeliest one's probability (0)")
    add("--repetition-penalty", type=float, default=1.0, help="over 1 says the same less often (1)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16 on a GPU, else as the weights are stored)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse(argv)
    check(args)
    folder = args.weights or newest_model(Path("out"))
    images = [load_image(file) for file in args.image]
    model = load_model(folder, args)
    if images and model.config.vision is None:
        raise UserError(f"{folder} has no image encoder: leave --image out, or name another model with --weights")
    ids = model_ids(model, args.prompt or DEFAULT_PROMPT, len(images))
    tokens = model.generate(ids, images, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                            top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=args.seed)
    try:
        for piece in model.tokenizer.stream(tokens):
            print(piece, end="", flush=True)
    finally:                                                   # Ctrl-C leaves what there is on a line of its own
        print()


def check(args):
    """What can be said before anything is loaded."""
    Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    if args.prompt is None and not args.image:
        raise UserError("nothing to answer: name a picture with --image, or ask something with --prompt")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty: ask something")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it must be 1 or more")
    named = [file.resolve() for file in args.image]
    for file in named:
        if named.count(file) > 1:
            raise UserError(f"{file}: the same picture is named twice; name it once")


def newest_model(out: Path) -> Path:
    """The last written folder under `out` that holds a whole model, encoder and all; the stages' backbones do not count."""
    found = [file for file in out.rglob("config.json") if (file.parent / "tokenizer.json").is_file()
             and not any(part.startswith((".", "backbone")) for part in file.parts)]
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        if json.loads(file.read_text()).get("vision"):
            return file.parent
    raise UserError(f"no trained model under {out}/: make one with `python train.py`, or name a folder with --weights")


def load_model(folder: Path, args):
    device = args.device or ("cuda" if torch.cuda.is_available() else
                             "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: this machine has none; leave it out, or give cpu") from None
    dtype = getattr(torch, args.dtype) if args.dtype else torch.bfloat16 if device.startswith("cuda") else None
    model = load(folder, device, dtype, args.visual_path).eval()
    if device == "cpu" and args.dtype is None and model.dtype == torch.float16:
        model.float()                                          # CPUs have no fast float16
    return model


def model_ids(model, prompt: str, pictures: int) -> list[int]:
    """Ids of a first question under the model's chat template; pictures that `prompt` does not place stand before it."""
    placed = prompt.count(IMAGE_TEXT)
    if placed == 0:
        prompt = (IMAGE_TEXT + "\n") * pictures + prompt
    elif placed != pictures:
        raise UserError(f"the prompt holds {placed} <image> but {pictures} picture(s) are named: give one --image for each")
    return encode_prompt(model.tokenizer, prompt, model.config.chat_template)


if __name__ == "__main__":
    run_command(main)
