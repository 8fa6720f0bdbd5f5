"""Asks a model about pictures.

    python sample.py --image cat.png                              the newest model describes it
    python sample.py --image a.png --prompt "..." --prompt "..."  the picture is encoded once
    python sample.py --image a.png --image b.png --prompt "..."   <image> in the prompt places them
    python sample.py --image a.png --chat                         /image FILE, /reset, Ctrl-C and -D
    python sample.py --image a.png --attention map.png            where it looks, word by word
    python sample.py --image FOLDER --jsonl                       a line of JSON a picture
"""

import argparse
import dataclasses
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nanoeemllm
from nanoeemllm.border.command import Parser, positive, run_command
from nanoeemllm.border.files import quoted, read_json
from nanoeemllm.config import UserError
from nanoeemllm.data.images import load_image
from nanoeemllm.evaluation.attention_map import draw_attention
from nanoeemllm.evaluation.load import add_model_flags, load_model
from nanoeemllm.generate import Sampling
from nanoeemllm.paths import from_args, layer_numbers
from nanoeemllm.prompt import IMAGE_TEXT, encode_prompt
from nanoeemllm.weights.tokenizer import stream_text
from nanoeemllm.weights.folder import read_config

DEFAULT_PROMPT = "describe the picture thing by thing."     # the tiny world's; others know it too
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ASSETS = Path(nanoeemllm.__file__).parent / "assets"
MODELS = (Path("out"), Path(__file__).parent / "out")       # where a model is looked for, in turn
BATCH = 16                                                  # pictures that --jsonl asks at once


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser, help="model folder (the newest under out/)")
    add = parser.add_argument
    add("--image", type=Path, action="append", default=[], metavar="FILE",
        help="a picture; give it again for more")
    add("--prompt", type=utf8, action="append", default=[],
        help=f'what to ask; give it again for more ("{DEFAULT_PROMPT}")')
    add("--attention-layers", type=layer_numbers, metavar="A-B", help="layers it draws (all)")
    add("--stats", action="store_true", help="time to first token, tokens/s, memory, on stderr")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--chat", action="store_true", help="read questions from stdin, remember the conversation")
    add("--jsonl", action="store_true", help="a line of JSON a picture; folders are searched")
    add("--attention", type=Path, metavar="PNG", help="draw where the model looks for each word")
    add = parser.add_argument_group("how the next token is chosen").add_argument
    add("--max-new-tokens", type=positive(int), default=256)
    add("--stop", type=utf8, action="append", default=[], metavar="TEXT",
        help="end the answer before this text")
    add("--seed", type=positive(int, or_zero=True, most=2 ** 31), default=0)
    for name, text in (
            ("temperature", "0 takes the likeliest token (0)"),
            ("top_k", "sample from the k likeliest tokens (0: all)"),
            ("top_p", "from the likeliest that reach probability p (1)"),
            ("min_p", "from those with at least p times the likeliest's probability (0)"),
            ("repetition_penalty", "over 1 repeats less (1)")):
        default = getattr(Sampling, name)
        add("--" + name.replace("_", "-"), type=type(default), default=default, help=text)
    return parser.parse_args(argv)


def utf8(text: str) -> str:
    """A flag's text, whatever the locale."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise UserError(f"{text!r} is not UTF-8 text") from None


def main(argv: list[str] | None = None):
    args = parse(argv)
    sampling = {option.name: getattr(args, option.name) for option in dataclasses.fields(Sampling)}
    Sampling(**sampling)                                    # raises UserError
    args.options = {"max_new_tokens": args.max_new_tokens, "stop_strings": args.stop, **sampling}
    check(args)
    args.image = pictures(args.image, args.jsonl)
    model = open_model(args)
    if args.jsonl:
        return answer_each(model, args)
    session = Session(model, args, list(map(load_image, args.image)))
    (chat if args.chat else answer)(session)


def check(args):
    """Refuses what can be refused before the model is loaded."""
    for is_wrong, message in (
            (not all(map(str.strip, args.prompt)), "--prompt is empty: ask something"),
            (not (args.prompt or args.image or args.chat),
             "nothing to answer: name a picture with --image, or ask something with --prompt"),
            (args.stats and args.jsonl,
             "--stats times one answer after another: leave --jsonl out"),
            (args.jsonl and not args.image,
             "--jsonl answers for each picture: name pictures or a folder of them with --image"),
            (args.attention_layers and not args.attention,
             "--attention-layers says what --attention draws: give it a file"),
            (args.attention and (not args.image or len(args.prompt) > 1),
             "--attention shows where the model looks in a picture: name one with --image, and "
             "give one --prompt")):
        if is_wrong:
            raise UserError(message)


def pictures(named: list[Path], search: bool) -> list[Path]:
    """The files that --image names; search: of a folder, those that it holds."""
    files = []
    for file in named:
        found = [example(file)]
        if os.path.isdir(file):
            found = sorted(inner for inner in file.iterdir() if inner.suffix.lower() in PICTURES)
            if not search:
                raise UserError(f"{quoted(file)} is a folder: add --jsonl for a line of JSON a "
                                "picture")
        if not found:
            raise UserError(f"{quoted(file)}: no pictures in this folder ({', '.join(PICTURES)})")
        files += found
    for file, times in Counter(map(os.path.realpath, files)).items():
        if times > 1:
            raise UserError(f"{quoted(file)}: this picture is named twice; name it once")
    return files


def example(file: Path) -> Path:
    """A bare name that is no file here may be one of the package's own pictures."""
    if os.path.exists(file) or str(file) not in os.listdir(ASSETS):
        return file
    print(f"{file} is no file here: taking the example {ASSETS / file}", file=sys.stderr)
    return ASSETS / file


# ---- the model ----

def newest_model(folder: Path) -> Path | None:
    """The last written model under the folder that sees pictures and is no stage's backbone."""
    found = filter(Path.is_file, folder.rglob("config.json"))
    for file in sorted(found, key=os.path.getmtime, reverse=True):
        is_passed_over = re.search(r"(^|/)(\.|backbone)", file.relative_to(folder).as_posix())
        has_tokenizer = (file.parent / "tokenizer.json").is_file()
        if has_tokenizer and not is_passed_over and read_json(file).get("vision"):
            return file.parent
    return None


def open_model(args):
    args.weights = args.weights or next(filter(None, map(newest_model, MODELS)), None)
    if args.weights is None:
        raise UserError("no trained model under out/: make one with `python train.py`, or name a "
                        "folder with --weights")
    return load_model(args, from_args(args, read_config(args.weights)))


class Session:
    """A conversation about images. Where the visual path allows it, an image is encoded once for
    all questions."""

    def __init__(self, model, args, images: list):
        self.model, self.args, self.images = model, args, images
        self.image_kv = []                                  # of the first of the images
        self.forget()

    def forget(self):
        """The next question is the first, and about all images."""
        self.turns, self.placed = [], 0                     # placed: images that stand in the turns

    def encoded(self) -> dict:
        """The images as arguments of model.generate."""
        if not self.model.config.visual_path.images_are_reusable:
            return {"images": self.images}
        if new := self.images[len(self.image_kv):]:
            self.image_kv += self.model.encode_images(new)
        return {"image_kv": self.image_kv}

    def ask(self, prompt: str) -> tuple[list[int], list[int]]:
        """Prints an answer as it is generated -> ids of the question with all before it, and of the
        answer. Ctrl-C ends the answer; in a chat the program goes on."""
        text, tokens, times = "", [], [time.perf_counter()]
        placed = place_images(prompt, len(self.images) - self.placed)
        turns = [*self.turns, {"from": "human", "value": placed}]
        ids = encode_prompt(self.model.tokenizer, turns, self.model.config.chat_template)

        def generate() -> Iterator[int]:
            for token in self.model.generate(ids, **self.encoded(), **self.args.options):
                tokens.append(token)
                times.append(time.perf_counter())
                yield token

        try:
            for piece in stream_text(self.model.tokenizer, generate(), self.args.stop):
                text += piece
                print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            if not self.args.chat:
                raise
        if self.args.stats and tokens:
            print_stats(self.model, times)
        said = {"from": "gpt", "value": text.replace(IMAGE_TEXT, "").strip()}
        self.turns, self.placed = [*turns, said], len(self.images)
        return ids, tokens


def print_stats(model, times: list[float]):
    """times: when the question was asked, and when each token was there."""
    from nanoeemllm.training.step import memory_gb
    begin, first, *_ = times
    tokens = len(times) - 1
    print(f"first token after {first - begin:.3f} s, "
          f"{(tokens - 1) / max(times[-1] - first, 1e-9):.1f} tokens/s after it, {tokens} tokens, "
          f"{memory_gb(model.device):.2f} GB of {model.device.type} memory at most",
          file=sys.stderr)


# ---- three ways to ask ----

def place_images(prompt: str, images: int) -> str:
    """The prompt with an <image> for every image: where it says, or else in front."""
    placed = prompt.count(IMAGE_TEXT)
    if placed not in (0, images):
        raise UserError(f"the prompt holds {placed} <image> but {images} picture(s) are named: "
                        "give one --image for each")
    return prompt if placed else (IMAGE_TEXT + "\n") * images + prompt


def answer(session: Session):
    args = session.args
    for prompt in args.prompt or [DEFAULT_PROMPT]:
        if len(args.prompt) > 1:
            print(f"> {prompt}")
        ids, tokens = session.ask(prompt)
        session.forget()
    if args.attention and tokens:
        draw_attention(args.attention, session.model, ids, session.images, tokens,
                       args.attention_layers)


def chat(session: Session):
    """Questions of --prompt first, then a line of stdin a question. An error ends the question."""
    line = None
    for line in questions(session.args.prompt):
        command, _, rest = line.partition(" ")
        try:
            if command == "/reset":
                session = Session(session.model, session.args, [])
            elif command == "/image":
                session.images.append(load_image(example(Path(rest.strip()).expanduser())))
            elif line.startswith("/"):
                raise UserError(f"{command} is not known; known: /image FILE, /reset, and Ctrl-D "
                                "to end")
            elif line:
                session.ask(line)
        except UserError as error:
            if not line.startswith("/"):                    # or the next question would fail, too
                del session.images[session.placed:], session.image_kv[session.placed:]
            print(f"error: {error}", file=sys.stderr)
    if line is None:
        raise UserError("--chat reads questions from stdin, which is closed or at its end: ask "
                        "with --prompt")


def questions(prompts: list[str]) -> Iterator[str]:
    yield from prompts
    lines = sys.stdin.buffer if sys.stdin else io.BytesIO()
    invitation = "> " if lines.isatty() else ""
    print(invitation, end="", flush=True)
    while line := lines.readline():
        yield line.decode(errors="replace").strip()
        print(invitation, end="", flush=True)
    print(end="\n" if invitation else "")


def answer_each(model, args):
    """BATCH pictures at a time, with every prompt each."""
    prompts, broken = args.prompt or [DEFAULT_PROMPT], 0
    template = model.config.chat_template
    ids = [encode_prompt(model.tokenizer, place_images(p, 1), template) for p in prompts]
    for first in range(0, len(args.image), BATCH):
        asked, images = [], []
        for file in map(str, args.image[first:first + BATCH]):
            try:
                images.append(load_image(file))
                asked += [{"image": file, "prompt": prompt} for prompt in prompts]
            except UserError as error:
                broken += 1
                print(json.dumps({"image": file, "error": str(error)}), flush=True)
        (kind, encoded), = Session(model, args, images).encoded().items()
        each = {kind: [[image] for image in encoded for _ in prompts]}
        answers = model.generate_batch(ids * len(images), **each, **args.options) if asked else []
        for line, tokens in zip(asked, answers):
            text = "".join(stream_text(model.tokenizer, tokens, args.stop))
            print(json.dumps(line | {"answer": text.strip()}), flush=True)
    if broken:
        raise UserError(f"{broken} of {len(args.image)} pictures could not be read; their lines "
                        "say why")


if __name__ == "__main__":
    run_command(main)
