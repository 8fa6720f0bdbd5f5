"""The tiny world: pictures of a few coloured things on white, with captions and questions of exact answers.

    1 to 3 things of different shape     6 shapes x 6 colours x 9 places (3 x 3)     a little jitter in place and size

Everything is a function of (world seed, split, index) and is drawn on the fly; nothing is stored. Three splits:

    train        scenes of trained colours and shapes whose fingerprint is not held out
    held-out     scenes like these that no training picture and no training text ever shows (one in eight)
    never-seen   every thing is a combination of colour and shape that no training picture and no training text has

Captions are worded in two orders, by thing ("the cat is red at top-left.") and by place ("at top-left a red cat.").
Both are needed: a model learns to look things up by what was named first, and hardly any other way. Answers begin with
the word that is looked up ("top-left", not "at the top-left"): two words later it took several times as long to learn.

The ground is white and so is the mean of the tiny encoder's normalisation: pixels are 0 on the ground and negative,
whatever the colour, on a thing. So a shape is seen in a colour it never had in training (on middle grey it was not).

    python -m nanoeemllm.toy --export DIR -n 2000        LLaVA's JSON and a folder of PNGs
    python -m nanoeemllm.toy --export-tsv FILE -n 500    a benchmark file with VLMEvalKit's columns
"""

import base64
import csv
import functools
import io
import json
import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

from nanoeemllm.command_line import Parser, positive, run_command
from nanoeemllm.config import UserError

GROUND = (255, 255, 255)
COLOURS = {"black": (0, 0, 0), "blue": (0, 0, 255), "green": (0, 160, 0), "purple": (160, 0, 200), "red": (255, 0, 0),
           "yellow": (255, 200, 0)}
SHAPES = ("cat", "cross", "ring", "square", "star", "triangle")
PLACES = ("top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
NEVER_TRAINED = {("cat", "green"), ("cross", "blue"), ("ring", "purple"), ("square", "red"), ("star", "black"),
                 ("triangle", "yellow")}                        # every shape and every colour once
SPLITS = ("train", "held-out", "never-seen")


@dataclass(frozen=True)
class WorldConfig:
    """The knobs. With 8-pixel patches, picture sizes 32, 48, 64 and 128 give 16, 36, 64 and 256 visual tokens."""
    picture_size: int = 48
    max_things: int = 3
    hardness: int = 0                                           # 1: more jitter, and questions about relations
    seed: int = 0

    def __post_init__(self):
        if not 24 <= self.picture_size <= 4096:
            raise UserError(f"picture size {self.picture_size}: give 24, under which nothing can be told apart, to 4096")
        if not 1 <= self.max_things <= len(SHAPES):
            raise UserError(f"a picture holds 1 to {len(SHAPES)} things, not {self.max_things}")
        if self.hardness not in (0, 1):
            raise UserError(f"hardness {self.hardness} is not known; known: 0, 1")


class Thing(NamedTuple):
    shape: str
    colour: str
    place: int                                                  # 0..8, row-major
    jitter: tuple[float, float, float]                          # x, y, size; sixteenths of a place's side


Scene = list[Thing]                                             # alphabetical by shape


# ---- scenes ----

def make_scene(world: WorldConfig, split: str, index: int) -> Scene:
    """Picture `index` of a split. Draws again until the scene belongs to the split."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known; known: {', '.join(SPLITS)}")
    rng = random.Random(f"{world.seed} {split} {index}")
    reach = 1 + world.hardness
    while True:
        number = rng.randint(1, world.max_things)
        shapes, places = sorted(rng.sample(SHAPES, number)), rng.sample(range(len(PLACES)), number)
        scene = []
        for shape, place in zip(shapes, places):
            colour = rng.choice([c for c in COLOURS if ((shape, c) in NEVER_TRAINED) == (split == "never-seen")])
            jitter = tuple(rng.randint(-reach, reach) for _ in range(3))
            scene.append(Thing(shape, colour, place, jitter))
        if split == "never-seen" or _is_held_out(scene) == (split == "held-out"):
            return scene


def _is_held_out(scene: Scene) -> bool:
    """One scene in eight, whatever the seed and the jitter: by what is where."""
    return zlib.crc32(" ".join(f"{t.shape} {t.colour} {t.place}" for t in scene).encode()) % 8 == 0


# ---- pictures ----

def draw(scene: Scene, size: int) -> Image.Image:
    """RGB picture of size x size. A thing fills about four fifths of its place."""
    picture = Image.new("RGB", (size, size), GROUND)
    side = size / 3
    for thing in scene:
        dx, dy, grow = (j * side / 16 for j in thing.jitter)
        sprite = _sprite(thing.shape, round(0.8 * side + grow))
        x, y = ((n + 0.5) * side + d - sprite.width / 2 for n, d in ((thing.place % 3, dx), (thing.place // 3, dy)))
        picture.paste(COLOURS[thing.colour], (round(x), round(y)), sprite)
    return picture


@functools.cache
def _sprite(shape: str, size: int) -> Image.Image:
    """Coverage of a shape, size x size, 8 bit; drawn four times as large and averaged."""
    n = 4 * size
    mask = Image.new("L", (n, n))
    pen = ImageDraw.Draw(mask)

    def scaled(*points):                                        # from [-1, 1] x [-1, 1], y down
        return [((x + 1) * (n - 1) / 2, (y + 1) * (n - 1) / 2) for x, y in points]

    def ellipse(x, y, radius, fill):
        pen.ellipse(scaled((x - radius, y - radius), (x + radius, y + radius)), fill=fill)

    if shape == "cat":                                          # a head with ears, eyes and a mouth
        for s in (-1, 1):
            pen.polygon(scaled((s * 0.95, -1), (s * 0.95, 0.1), (s * 0.1, -0.4)), fill=255)
        pen.ellipse(scaled((-1, -0.6), (1, 1)), fill=255)
        for s in (-1, 1):
            ellipse(s * 0.42, 0.05, 0.2, 0)
        pen.polygon(scaled((-0.25, 0.4), (0.25, 0.4), (0, 0.7)), fill=0)
    elif shape == "cross":
        pen.rectangle(scaled((-0.3, -1), (0.3, 1)), fill=255)
        pen.rectangle(scaled((-1, -0.3), (1, 0.3)), fill=255)
    elif shape == "ring":
        ellipse(0, 0, 1, 255)
        ellipse(0, 0, 0.5, 0)
    elif shape == "square":
        pen.rectangle(scaled((-0.9, -0.9), (0.9, 0.9)), fill=255)
    elif shape == "star":
        radii = [1.1, 0.45] * 5
        pen.polygon(scaled(*((r * math.sin(math.pi * i / 5), 0.1 - r * math.cos(math.pi * i / 5))
                             for i, r in enumerate(radii))), fill=255)
    elif shape == "triangle":
        pen.polygon(scaled((0, -1), (1, 0.9), (-1, 0.9)), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


# ---- words ----

def _by_thing(thing: Thing) -> str:
    return f"the {thing.shape} is {thing.colour} at {PLACES[thing.place]}."


def _by_place(thing: Thing) -> str:
    return f"at {PLACES[thing.place]} a {thing.colour} {thing.shape}."


def caption(scene: Scene, order: str) -> str:
    """order "thing": alphabetical, "place": as one reads."""
    if order == "thing":
        return " ".join(map(_by_thing, scene))
    return " ".join(map(_by_place, sorted(scene, key=lambda t: t.place)))


def description(scene: Scene, rng: random.Random) -> str:
    """The scene in words for text-only samples: things in any order, each worded either way."""
    return " ".join(rng.choice((_by_thing, _by_place))(thing) for thing in rng.sample(scene, len(scene)))


class Question(NamedTuple):
    kind: str
    question: str
    answer: str


def questions(scene: Scene, hardness: int = 0) -> list[Question]:
    """Everything that can be asked about a scene, kind by kind."""
    at = {thing.place: thing for thing in scene}
    shapes = [thing.shape for thing in scene]
    found = [Question("caption", "describe the picture thing by thing.", caption(scene, "thing")),
             Question("caption", "describe the picture place by place.", caption(scene, "place")),
             Question("how-many", "how many things are there?", NUMBERS[len(scene)])]
    for place, name in enumerate(PLACES):
        answer = f"{at[place].colour} {at[place].shape}" if place in at else "nothing"
        found.append(Question("what-is-at", f"what is at {name}?", answer))
    for thing in scene:
        found.append(Question("colour", f"what colour is the {thing.shape}?", thing.colour))
        found.append(Question("where", f"where is the {thing.shape}?", PLACES[thing.place]))
    for shape in SHAPES:
        found.append(Question("is-there", f"is there a {shape}?", "yes" if shape in shapes else "no"))
    if hardness:
        found += _relations(scene)
    return found


def _relations(scene: Scene) -> list[Question]:
    found = []
    for a in scene:
        for b in scene:
            if a.place % 3 != b.place % 3:
                answer = "yes" if a.place % 3 < b.place % 3 else "no"
                found.append(Question("relation", f"is the {a.shape} left of the {b.shape}?", answer))
            if a.place // 3 != b.place // 3:
                answer = "yes" if a.place // 3 < b.place // 3 else "no"
                found.append(Question("relation", f"is the {a.shape} above the {b.shape}?", answer))
    return found


def ask(scene: Scene, rng: random.Random, hardness: int = 0) -> list[Question]:
    """A question of every kind, in random order. The likely answers of what-is-at and is-there ("nothing", "no") are
    held to half of theirs."""
    chosen = []
    for found in _by_kind(scene, hardness):
        empty, full = _empty_and_full(found)
        chosen.append(rng.choice(rng.choice([group for group in (empty, full) if group])))
    rng.shuffle(chosen)
    return chosen


LESSON = {"caption": (0, 1), "how-many": (0, 1), "what-is-at": (1, 2), "colour": (0, 2), "where": (0, 2),
          "is-there": (1, 1), "relation": (2, 2)}


def lesson(scene: Scene, rng: random.Random, hardness: int = 0) -> list[Question]:
    """What is learned from one picture: of every kind up to LESSON's number of questions whose answer is "nothing" or
    "no", and of others. Many short look-ups teach more a second than one long caption, which every other one lacks."""
    chosen = []
    for found in _by_kind(scene, hardness):
        if found[0].kind != "caption" or rng.random() < 0.5:
            for group, most in zip(_empty_and_full(found), LESSON[found[0].kind]):
                chosen += rng.sample(group, min(most, len(group)))
    rng.shuffle(chosen)
    return chosen


def _by_kind(scene: Scene, hardness: int) -> list[list[Question]]:
    kinds: dict[str, list[Question]] = {}
    for q in questions(scene, hardness):
        kinds.setdefault(q.kind, []).append(q)
    return list(kinds.values())


def _empty_and_full(found: list[Question]) -> tuple[list[Question], list[Question]]:
    empty = [q for q in found if q.answer in ("nothing", "no")]
    return empty, [q for q in found if q not in empty]


class ToyDataset:
    """`length` conversations in LLaVA's form, "image" a PIL picture; element i is a function of (world, split, i).

    kind "caption": the picture and a caption in one of the two orders (stage 1). "conversation": the picture and a
    lesson's questions (stage 2). "text": no picture, a question of every kind behind a description of the scene (what
    the tiny Llama learns language from).
    """

    def __init__(self, world: WorldConfig, split: str, kind: str, length: int = 100_000):
        if kind not in ("caption", "conversation", "text"):
            raise UserError(f"kind of toy data {kind!r} is not known; known: caption, conversation, text")
        self.world, self.split, self.kind, self.length = world, split, kind, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        scene = make_scene(self.world, self.split, i)
        rng = random.Random(f"{self.world.seed} {self.split} {i} {self.kind}")
        item = {"id": f"{self.split}-{i}"}
        if self.kind != "text":
            item["image"] = draw(scene, self.world.picture_size)
        if self.kind == "caption":
            order = rng.choice(("thing", "place"))
            return item | {"conversations": _turns([Question("caption", "", caption(scene, order))], "<image>")}
        if self.kind == "conversation":
            return item | {"conversations": _turns(lesson(scene, rng, self.world.hardness), "<image>\n")}
        first = description(scene, rng) + "\n"
        return item | {"conversations": _turns(ask(scene, rng, self.world.hardness), first)}


def _turns(asked: list[Question], first: str) -> list[dict]:
    turns = []
    for number, q in enumerate(asked):
        turns.append({"from": "human", "value": (first if number == 0 else "") + q.question})
        turns.append({"from": "gpt", "value": q.answer})
    return turns


def make_tokenizer(extra_words: str = "") -> Tokenizer:
    """Word-level, lower case: every word of the world, and those of `extra_words` (the chat template's).

    "top-left" is one word, so that no place shares words with another. The newline is a word too: a text token has to
    stand between a picture and the caption that it predicts.
    """
    scene = [Thing(shape, colour, place, (0, 0, 0)) for place, (shape, colour) in enumerate(zip(SHAPES, COLOURS))]
    text = " ".join(" ".join((q.question, q.answer)) for q in questions(scene, hardness=1))
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Split(Regex(r"\n|[\w-]+|[^\w\s]"), "removed", invert=True)
    words = {word for word, _ in splitter.pre_tokenize_str(
        normalizer.normalize_str(" ".join((text, *NUMBERS, "nothing no \n", extra_words))))}
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece(cleanup=True)        # no space before a full stop
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


# ---- files ----

def export_llava(world: WorldConfig, folder: Path, n: int, split: str = "train"):
    """folder/pretrain.json, folder/finetune.json (LLaVA's lists) and folder/images/*.png, the same n pictures."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, kind in (("pretrain", "caption"), ("finetune", "conversation")):
        data = []
        for item in tqdm(map(ToyDataset(world, split, kind).__getitem__, range(n)), name, total=n, leave=False):
            file = f"{item['id']}.png"
            item["image"].save(folder / "images" / file)
            data.append(item | {"image": file})
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1))


def export_tsv(world: WorldConfig, file: Path, n: int, split: str = "held-out"):
    """n rows with VLMEvalKit's columns: a question of every kind about each picture, answers to be met exactly."""
    with open(file, "w", newline="") as out:
        rows = csv.writer(out, delimiter="\t", lineterminator="\n")
        rows.writerow(("index", "image", "question", "answer", "category", "l2-category", "split"))
        for index, (kind, number, picture, question, answer) in enumerate(exam(world, split, n)):
            png = io.BytesIO()
            picture.save(png, "PNG")
            rows.writerow((index, base64.b64encode(png.getvalue()).decode(), question, answer, kind,
                           f"{NUMBERS[number]} in the picture", split))


class Exam(NamedTuple):
    kind: str
    number: int                                                 # of things in the picture
    picture: Image.Image
    question: str
    answer: str


def exam(world: WorldConfig, split: str, n: int) -> list[Exam]:
    """n questions with exact answers: one of every kind about picture after picture."""
    found, index = [], 0
    while len(found) < n:
        scene = make_scene(world, split, index)
        picture = draw(scene, world.picture_size)
        rng = random.Random(f"{world.seed} {split} {index} exam")
        found += [Exam(q.kind, len(scene), picture, q.question, q.answer) for q in ask(scene, rng, world.hardness)]
        index += 1
    return found[:n]


def main():
    parser = Parser("Writes the tiny world to files.", "python -m nanoeemllm.toy")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--export", type=Path, metavar="DIR", help="LLaVA's JSON and a folder of PNGs")
    where.add_argument("--export-tsv", type=Path, metavar="FILE", help="a benchmark file, one question a line")
    parser.add_argument("-n", type=positive(int), default=2000, help="pictures, or lines of a benchmark file")
    parser.add_argument("--split", choices=SPLITS, help="default: train for --export, held-out for --export-tsv")
    parser.add_argument("--picture-size", type=int, default=WorldConfig.picture_size)
    parser.add_argument("--max-things", type=int, default=WorldConfig.max_things)
    parser.add_argument("--hardness", type=int, default=WorldConfig.hardness)
    parser.add_argument("--seed", type=positive(int, or_zero=True), default=WorldConfig.seed)
    args = parser.parse_args()
    world = WorldConfig(args.picture_size, args.max_things, args.hardness, args.seed)
    try:
        if args.export:
            export_llava(world, args.export, args.n, args.split or "train")
        else:
            export_tsv(world, args.export_tsv, args.n, args.split or "held-out")
    except OSError as error:
        raise UserError(error) from None
    print(f"wrote {args.export or args.export_tsv}")


if __name__ == "__main__":
    run_command(main)
