"""Asks a model about pictures.

    python sample.py --image nanoeemllm/assets/cat.png                     the newest model under out/ describes it
    python sample.py --image a.png --prompt "..." --prompt "..."           the second answer does not read the picture again
    python sample.py --image a.png --image b.png --prompt "..."            several pictures; <image> in the prompt places them
    python sample.py --image a.png --chat                                  a conversation: /image FILE, /reset, Ctrl-C, Ctrl-D
    python sample.py --image a.png --attention map.png                     where it looks while it says each word
    python sample.py --image FOLDER --jsonl                                a line of JSON a picture
"""

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from nanoeemllm.attention_map import draw_attention
from nanoeemllm.checkpoint import load, read_json
from nanoeemllm.command_line import add_visual_path_flags, run_command, visual_path_from
from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.generation import Sampling, stream_text
from nanoeemllm.image import load_image
from nanoeemllm.prompt import IMAGE_TEXT, TEMPLATES, encode_prompt
from nanoeemllm.visual_path import CompositePath

DEFAULT_PROMPT = "describe the picture thing by thing."      # a sentence of the tiny world; others understand it too
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")        # what a folder is searched for
AT_ONCE = 16                                                 # pictures that --jsonl reads together


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; give it again for more")
    add("--prompt", action="append", default=[], help=f'what to ask; give it again for more ("{DEFAULT_PROMPT}")')
    add("--weights", type=Path, metavar="DIR", help="model folder (the newest under out/)")
    add("--chat-template", choices=TEMPLATES, help="how a conversation is written down (the model's own)")
    add("--chat", action="store_true", help="read questions from stdin, remember what was said")
    add("--jsonl", action="store_true", help="each picture for itself, a line of JSON for each; folders are searched")
    add("--attention", type=Path, metavar="PNG", help="draw where the model looks while it says each word")
    add("--attention-layers", metavar="A-B", help="layers whose attention is drawn (all that see the picture)")
    add("--stats", action="store_true", help="time to first token, tokens/s and memory, on stderr")
    add("--device", help="cuda, mps or cpu (the first there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16 on a GPU, else as the weights are stored)")
    add = parser.add_argument_group("how the next token is chosen").add_argument
    add("--max-new-tokens", type=int, default=256)
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens (0: all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability (1)")
    add("--min-p", type=float, default=0.0, help="leave out tokens below this part of the likeliest one's probability (0)")
    add("--repetition-penalty", type=float, default=1.0, help="over 1 says the same less often (1)")
    add("--seed", type=int, default=0)
    add_visual_path_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse(argv)
    check(args)
    speaker = Speaker(load_model(args), args)
    if args.jsonl:
        answer_folder(speaker, args)
    elif args.chat:
        chat(speaker, args)
    else:
        answer(speaker, args)


def check(args):
    """What can be said before anything is loaded."""
    sampling(args)
    if any(not text.strip() for text in args.prompt):
        raise UserError("--prompt is empty: ask something")
    if not args.prompt and not args.image and not args.chat:
        raise UserError("nothing to answer: name a picture with --image, or ask something with --prompt")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it must be 1 or more")
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
    if args.attention is not None and not args.attention.absolute().parent.is_dir():
        raise UserError(f"--attention {args.attention}: its folder does not exist")
    if args.attention_layers is not None:
        layers(args)
    args.image = [found for file in args.image for found in (search(file) if args.jsonl else [file])]
    named = [file.resolve() for file in args.image]
    for file in named:
        if named.count(file) > 1:
            raise UserError(f"{file}: this picture is named twice; name it once")
        if file.is_dir():
            raise UserError(f"{file} is a folder: add --jsonl for a line of JSON a picture")


def search(file: Path) -> list[Path]:
    """The pictures in a folder, by name; a file is itself."""
    if not file.is_dir():
        return [file]
    found = sorted(inside for inside in file.iterdir() if inside.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{file}: no pictures in this folder ({', '.join(PICTURES)})")
    return found


def layers(args) -> slice:
    first, _, last = (args.attention_layers or "0-").partition("-")
    if not first.isdecimal() or not (last or "0").isdecimal():
        raise UserError(f"--attention-layers {args.attention_layers!r}: give a layer or a range, as in 8-15")
    alone = args.attention_layers is not None and "-" not in args.attention_layers
    return slice(int(first), int(first) + 1 if alone else int(last) + 1 if last else None)


def sampling(args) -> dict:
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")}
    Sampling(**options)                                      # raises what is wrong with them
    return options


# ---- the model ----

def newest_model(out: Path) -> Path:
    """The last written folder under `out` that holds a whole model, encoder and all; the stages' backbones do not count."""
    found = [file for file in out.rglob("config.json") if (file.parent / "tokenizer.json").is_file()
             and not any(part.startswith((".", "backbone")) for part in file.relative_to(out).parts)]
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        if json.loads(file.read_text()).get("vision"):
            return file.parent
    raise UserError(f"no trained model under {out}/: make one with `python train.py`, or name a folder with --weights")


def load_model(args):
    folder = args.weights or newest_model(Path("out"))
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    if args.image and config.vision is None:
        raise UserError(f"{folder} has no image encoder: leave --image out, or name another model with --weights")
    device = args.device or ("cuda" if torch.cuda.is_available() else
                             "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: this machine has none; leave it out, or give cpu") from None
    dtype = getattr(torch, args.dtype) if args.dtype else torch.bfloat16 if device.startswith("cuda") else None
    model = load(folder, device, dtype, visual_path_from(args, config.visual_path)).eval()
    if args.chat_template:
        model.config = dataclasses.replace(model.config, chat_template=args.chat_template)
    if device == "cpu" and args.dtype is None and model.dtype == torch.float16:
        model.float()                                        # CPUs have no fast float16
    return model


class Speaker:
    """A model and how it is to answer. Pictures are read once where the visual path allows it."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.keeps = isinstance(model.decoder.path, CompositePath)
        self.last: list[int] = []                            # ids of the last answer
        self.images, self.pictures, self.notes = [], [], ""  # pictures: what was seen of the images, if it is kept

    def show(self, image):
        self.images.append(image)

    def forget(self):
        self.images, self.pictures = [], []

    def ids(self, turns: str | list[dict]) -> list[int]:
        return encode_prompt(self.model.tokenizer, turns, self.model.config.chat_template)

    def say(self, ids: list[int]) -> Iterator[str]:
        """Pieces of text as they are made."""
        self.last, begin = [], time.perf_counter()
        pictures = {"images": self.images}
        if self.keeps:
            if new := self.images[len(self.pictures):]:
                self.pictures += self.model.see(new)
            pictures = {"pictures": self.pictures}
        times = []
        tokens = self.model.generate(ids, max_new_tokens=self.args.max_new_tokens, stop_strings=tuple(self.args.stop),
                                     **pictures, **sampling(self.args))
        yield from stream_text(self.model.tokenizer, self._noted(tokens, times), tuple(self.args.stop))
        if self.args.stats and times:
            rate = f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s after it" if len(times) > 1 else "no other"
            self.notes = f"first token after {times[0] - begin:.3f} s, {rate}, {len(times)} tokens, {peak_memory()}"

    def _noted(self, tokens, times: list[float]):
        for token in tokens:
            times.append(time.perf_counter())
            self.last.append(token)
            yield token


def peak_memory() -> str:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory at most"
    unit = 1 if sys.platform == "darwin" else 1024           # of ru_maxrss
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory at most"


def tell(speaker: Speaker, ids: list[int]) -> str:
    """Prints an answer as it is made, and returns it. Ctrl-C leaves what there is on a line of its own."""
    said = []
    try:
        for piece in speaker.say(ids):
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        raise Interrupted("".join(said)) from None
    print(flush=True)
    if speaker.args.stats:
        print(speaker.notes, file=sys.stderr)
    return "".join(said)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while an answer was made; the argument is what there was of it."""


# ---- the three ways to ask ----

def answer(speaker: Speaker, args):
    for file in args.image:
        speaker.show(load_image(file))
    prompts = args.prompt or [DEFAULT_PROMPT]
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {prompt}")
        ids = speaker.ids(place_pictures(prompt, len(speaker.images)))
        tell(speaker, ids)
    if args.attention is not None and speaker.last:
        draw_attention(args.attention, speaker.model, ids, speaker.images, speaker.last, layers(args))


def place_pictures(prompt: str, pictures: int) -> str:
    """The prompt with an <image> for every picture: where it says, or else in front."""
    placed = prompt.count(IMAGE_TEXT)
    if placed not in (0, pictures):
        raise UserError(f"the prompt holds {placed} <image> but {pictures} picture(s) are named: give one --image for each")
    return prompt if placed else (IMAGE_TEXT + "\n") * pictures + prompt


def chat(speaker: Speaker, args):
    """Questions of --prompt first, then a line of stdin a question. What goes wrong in one leaves the others standing."""
    turns, new = [], 0
    for file in args.image:
        speaker.show(load_image(file))
        new += 1
    for number, line in enumerate(questions(args)):
        if line is None:
            if number == 0:
                raise UserError("--chat reads questions from stdin, which is at its end: ask with --prompt instead")
            return
        try:
            command, _, rest = line.partition(" ")
            if command == "/reset":
                turns, new = [], 0
                speaker.forget()
            elif command == "/image":
                speaker.show(load_image(Path(rest.strip()).expanduser()))
                new += 1
            elif line.startswith("/"):
                raise UserError(f"{command} is not known; known: /image FILE, /reset, and Ctrl-D to end")
            elif line:
                asked = [*turns, {"from": "human", "value": place_pictures(line, new)}]
                try:
                    said = tell(speaker, speaker.ids(asked))
                except Interrupted as stopped:
                    said = str(stopped)
                turns, new = [*asked, {"from": "gpt", "value": said.strip()}], 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def questions(args) -> Iterator[str | None]:
    """Lines, then None."""
    yield from args.prompt
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            yield None
            return


def answer_folder(speaker: Speaker, args):
    """AT_ONCE pictures at a time, with every prompt each. A picture that cannot be read gets a line that says so."""
    prompts, broken = args.prompt or [DEFAULT_PROMPT], 0
    ids = [speaker.ids(place_pictures(prompt, 1)) for prompt in prompts]
    for first in range(0, len(args.image), AT_ONCE):
        files, images = args.image[first:first + AT_ONCE], {}
        for file in files:
            try:
                images[file] = load_image(file)
            except UserError as error:
                broken += 1
                print(json.dumps({"image": str(file), "error": str(error)}), flush=True)
        if not images:
            continue
        shown = {"pictures" if speaker.keeps else "images": [[x] for x in (
            speaker.model.see(list(images.values())) if speaker.keeps else images.values()) for _ in prompts]}
        answers = speaker.model.generate_batch(ids * len(images), max_new_tokens=args.max_new_tokens,
                                               stop_strings=tuple(args.stop), **shown, **sampling(args))
        asked = [(file, prompt) for file in images for prompt in prompts]
        for (file, prompt), tokens in zip(asked, answers):
            text = "".join(stream_text(speaker.model.tokenizer, tokens, tuple(args.stop)))
            print(json.dumps({"image": str(file), "prompt": prompt, "answer": text.strip()}, ensure_ascii=False), flush=True)
    if broken:
        raise UserError(f"{broken} of {len(args.image)} pictures could not be read; their lines say why")


if __name__ == "__main__":
    run_command(main)
