"""Asks a model about pictures.

    python sample.py --image nanoeemllm/assets/cat.png            the newest model under out/ describes it
    python sample.py --image a.png --prompt "..." --prompt "..."  the second answer does not read the picture again
    python sample.py --image a.png --image b.png --prompt "..."   several pictures; <image> in the prompt places them
    python sample.py --image a.png --chat                         a conversation: /image FILE, /reset, Ctrl-C, Ctrl-D
    python sample.py --image a.png --attention map.png            where it looks while it says each word
    python sample.py --image FOLDER --jsonl                       a line of JSON a picture
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from nanoeemllm.attention_map import draw_attention
from nanoeemllm.checkpoint import load, read_json
from nanoeemllm.command_line import (Parser, add_visual_path_flags, device_from, positive, run_command,
                                     visual_path_from)
from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.generation import Sampling, stream_text
from nanoeemllm.image import load_image
from nanoeemllm.prompt import IMAGE_TEXT, TEMPLATES, encode_prompt
from nanoeemllm.visual_path import CompositePath

DEFAULT_PROMPT = "describe the picture thing by thing."      # a sentence of the tiny world; others understand it too
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")        # what a folder is searched for
AT_ONCE = 16                                                 # pictures that --jsonl reads together


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; give it again for more")
    add("--prompt", action="append", default=[], help=f'what to ask; give it again for more ("{DEFAULT_PROMPT}")')
    add("--weights", type=Path, metavar="DIR", help="model folder (the newest under out/)")
    add("--chat-template", choices=[name for name in TEMPLATES if name != "plain"], help="how a conversation is written down (the model's own)")
    add("--chat", action="store_true", help="read questions from stdin, remember what was said")
    add("--jsonl", action="store_true", help="each picture for itself, a line of JSON for each; folders are searched")
    add("--attention", type=Path, metavar="PNG", help="draw where the model looks while it says each word")
    add("--attention-layers", metavar="A-B", help="layers whose attention is drawn (all that see the picture)")
    add("--stats", action="store_true", help="time to first token, tokens/s and memory, on stderr")
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16 on a GPU, else as stored)")
    add = parser.add_argument_group("how the next token is chosen").add_argument
    add("--max-new-tokens", type=positive(int), default=256)
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens (0: all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability (1)")
    add("--min-p", type=float, default=0.0, help="leave out tokens under this part of the likeliest's probability (0)")
    add("--repetition-penalty", type=float, default=1.0, help="over 1 says the same less often (1)")
    add("--seed", type=positive(int, or_zero=True), default=0)
    add_visual_path_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse(argv)
    check(args)
    speaker = Speaker(load_model(args), args)
    if args.jsonl:
        answer_each(speaker)
    elif args.chat:
        chat(speaker)
    else:
        answer(speaker)


def check(args):
    """What can be said before anything is loaded; sampling, layers and pictures as they will be used."""
    args.sampling = {option.name: getattr(args, option.name) for option in dataclasses.fields(Sampling)}
    Sampling(**args.sampling)                                # raises what is wrong with them
    if any(not text.strip() for text in args.prompt):
        raise UserError("--prompt is empty: ask something")
    if not args.prompt and not args.image and not args.chat:
        raise UserError("nothing to answer: name a picture with --image, or ask something with --prompt")
    try:
        "".join(args.prompt).encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8 text") from None
    if args.stats and args.jsonl:
        raise UserError("--stats times one answer after another: leave --jsonl out")
    if args.attention_layers and args.attention is None:
        raise UserError("--attention-layers says what --attention draws: give it a file")
    if args.chat + args.jsonl + (args.attention is not None) > 1:
        raise UserError("--chat, --jsonl and --attention do not go together: give one of them")
    if args.chat and sys.stdin is None:
        raise UserError("--chat reads questions from stdin, which is closed: ask with --prompt instead")
    if args.jsonl and not args.image:
        raise UserError("--jsonl answers for each picture: name pictures or a folder of them with --image")
    if args.attention is not None and not args.image:
        raise UserError("--attention shows where the model looks in a picture: name one with --image")
    if args.attention is not None and len(args.prompt) > 1:
        raise UserError("--attention draws one answer: give one --prompt")
    if args.attention is not None and (args.attention.is_dir() or not args.attention.absolute().parent.is_dir()):
        raise UserError(f"--attention {args.attention}: give a file in a folder that exists")
    args.attention_layers = layers(args.attention_layers)
    try:
        args.image = [found for file in args.image for found in (search(file) if args.jsonl else [file])]
        named = Counter(file.resolve() for file in args.image)
        folders = [file for file in named if file.is_dir()]
    except (OSError, RuntimeError) as error:                 # too long a name, or a link in a circle
        raise UserError(f"--image: {error}") from None
    if named and max(named.values()) > 1:
        raise UserError(f"{max(named, key=named.get)}: this picture is named twice; name it once")
    if folders:
        raise UserError(f"{folders[0]} is a folder: add --jsonl for a line of JSON a picture")


def search(file: Path) -> list[Path]:
    """The pictures in a folder, by name; a file is itself."""
    if not file.is_dir():
        return [file]
    found = sorted(inside for inside in file.iterdir() if inside.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{file}: no pictures in this folder ({', '.join(PICTURES)})")
    return found


def layers(text: str | None) -> slice:
    """"8-15", "8-", "8" or nothing, for all."""
    if text is None:
        return slice(None)
    found = re.fullmatch(r"(\d+)(-?)(\d*)", text, re.ASCII)
    if not found:
        raise UserError(f"--attention-layers {text!r}: give a layer or a range, as in 8-15")
    first, dash, last = found.groups()
    return slice(int(first), int(last or first) + 1 if last or not dash else None)


# ---- the model ----

def newest_model(out: Path) -> Path:
    """The last written folder under `out` that holds a whole model, encoder and all, and is no stage's backbone."""
    found = [file for file in out.rglob("config.json") if (file.parent / "tokenizer.json").is_file()
             and not any(part.startswith((".", "backbone")) for part in file.relative_to(out).parts)]
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        if read_json(file).get("vision"):
            return file.parent
    raise UserError(f"no trained model under {out}/: make one with `python train.py`, or name a folder with --weights")


def load_model(args):
    folder = args.weights or newest_model(Path("out"))
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    if args.image and config.vision is None:
        raise UserError(f"{folder} has no image encoder: leave --image out, or name another model with --weights")
    device = device_from(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else torch.bfloat16 if device.startswith("cuda") else None
    model = load(folder, device, dtype, visual_path_from(args, config.visual_path)).eval()
    if device == "cpu" and args.dtype is None and model.dtype == torch.float16:
        model.float()                                        # CPUs have no fast float16
    if args.chat_template:
        model.config = dataclasses.replace(model.config, chat_template=args.chat_template)
    return model


class Speaker:
    """A model, the pictures it is shown, and how it is to answer. Where the visual path allows it, a picture is read
    once for all questions."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.keeps = isinstance(model.decoder.path, CompositePath)
        self.images, self.pictures = [], []                  # pictures: what was seen of the images, if it is kept

    def ids(self, turns: str | list[dict]) -> list[int]:
        return encode_prompt(self.model.tokenizer, turns, self.model.config.chat_template)

    def say(self, ids: list[int]) -> tuple[str, list[int]]:
        """Prints an answer as it is made -> the text and its tokens. Ctrl-C leaves what there is on a line of its own;
        it ends a program that does not chat."""
        text, tokens, times, begin = "", [], [], time.perf_counter()
        stop = tuple(self.args.stop)

        def made():
            for token in self.model.generate(ids, max_new_tokens=self.args.max_new_tokens, stop_strings=stop,
                                             **self.shown(), **self.args.sampling):
                tokens.append(token)
                times.append(time.perf_counter())
                yield token

        try:
            for piece in stream_text(self.model.tokenizer, made(), stop):
                text += piece
                print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            if not self.args.chat:
                raise
        if self.args.stats and times:
            more = len(times) - 1
            rate = f"{more / (times[-1] - times[0]):.1f} tokens/s after it" if more else "no other"
            print(f"first token after {times[0] - begin:.3f} s, {rate}, {len(times)} tokens, {peak_memory()}",
                  file=sys.stderr)
        return text, tokens

    def shown(self) -> dict:
        """What the model is given: pictures that were seen, or images that it has to see."""
        if not self.keeps:
            return {"images": self.images}
        if new := self.images[len(self.pictures):]:
            self.pictures += self.model.see(new)
        return {"pictures": self.pictures}


def peak_memory() -> str:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory at most"
    unit = 1 if sys.platform == "darwin" else 1024           # of ru_maxrss
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory at most"


# ---- the three ways to ask ----

def answer(speaker: Speaker):
    args = speaker.args
    speaker.images = [load_image(file) for file in args.image]
    prompts = args.prompt or [DEFAULT_PROMPT]
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {prompt}")
        ids = speaker.ids(place_pictures(prompt, len(speaker.images)))
        _, tokens = speaker.say(ids)
    if args.attention is not None and tokens:
        draw_attention(args.attention, speaker.model, ids, speaker.images, tokens, args.attention_layers)


def place_pictures(prompt: str, pictures: int) -> str:
    """The prompt with an <image> for every picture: where it says, or else in front."""
    placed = prompt.count(IMAGE_TEXT)
    if placed not in (0, pictures):
        raise UserError(f"the prompt holds {placed} <image> but {pictures} picture(s) are named: give one --image for "
                        "each")
    return prompt if placed else (IMAGE_TEXT + "\n") * pictures + prompt


def chat(speaker: Speaker):
    """Questions of --prompt first, then a line of stdin a question. What goes wrong in one leaves the others be."""
    speaker.images = [load_image(file) for file in speaker.args.image]
    turns, asked_about, line = [], 0, None                   # asked_about: pictures that stand in the turns
    for line in questions(speaker.args.prompt):
        try:
            command, _, rest = line.partition(" ")
            if command == "/reset":
                turns, asked_about, speaker.images, speaker.pictures = [], 0, [], []
            elif command == "/image" and speaker.model.config.vision is None:
                raise UserError("this model has no image encoder: it reads text alone")
            elif command == "/image":
                speaker.images.append(load_image(Path(os.path.expanduser(rest.strip()))))
            elif line.startswith("/"):
                raise UserError(f"{command} is not known; known: /image FILE, /reset, and Ctrl-D to end")
            elif line:
                asked = {"from": "human", "value": place_pictures(line, len(speaker.images) - asked_about)}
                try:
                    said, _ = speaker.say(speaker.ids([*turns, asked]))
                except UserError:                            # the next question must not fail for the same pictures
                    del speaker.images[asked_about:], speaker.pictures[asked_about:]
                    raise
                turns += [asked, {"from": "gpt", "value": said.replace(IMAGE_TEXT, "").strip()}]
                asked_about = len(speaker.images)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    if line is None:
        raise UserError("--chat reads questions from stdin, which is at its end: ask with --prompt instead")


def questions(prompts: list[str]) -> Iterator[str]:
    yield from prompts
    typed = sys.stdin.isatty()
    try:
        while True:
            try:
                yield input("> " if typed else "").strip().encode(errors="replace").decode()
            except UnicodeDecodeError:
                print("error: a line that is not UTF-8 text", file=sys.stderr)
    except EOFError:
        if typed:
            print()


def answer_each(speaker: Speaker):
    """AT_ONCE pictures at a time, with every prompt each. A picture that cannot be read gets a line that says so."""
    model, args = speaker.model, speaker.args
    prompts, stop, broken = args.prompt or [DEFAULT_PROMPT], tuple(args.stop), 0
    ids = [speaker.ids(place_pictures(prompt, 1)) for prompt in prompts]
    for first in range(0, len(args.image), AT_ONCE):
        files, speaker.images, speaker.pictures = [], [], []
        for file in args.image[first:first + AT_ONCE]:
            try:
                speaker.images.append(load_image(file))
                files.append(file)
            except UserError as error:
                broken += 1
                print(json.dumps({"image": str(file), "error": str(error)}), flush=True)
        if not files:
            continue
        shown = {kind: [[x] for x in each for _ in prompts] for kind, each in speaker.shown().items()}
        answers = model.generate_batch(ids * len(files), max_new_tokens=args.max_new_tokens, stop_strings=stop, **shown,
                                       **args.sampling)
        asked = [(file, prompt) for file in files for prompt in prompts]
        for (file, prompt), tokens in zip(asked, answers):
            text = "".join(stream_text(model.tokenizer, tokens, stop))
            line = {"image": str(file), "prompt": prompt, "answer": text.strip()}
            line = json.dumps(line, ensure_ascii=False)
            print(line.encode(errors="backslashreplace").decode(), flush=True)         # a name that is not UTF-8
    if broken:
        raise UserError(f"{broken} of {len(args.image)} pictures could not be read; their lines say why")


if __name__ == "__main__":
    run_command(main)
