"""The tiny world: images of 1 to 3 coloured things on white, captions, and questions.

6 shapes x 6 colours x 9 places on a 3 x 3 grid, with a little jitter in place and size. Everything
is a function of (seed, split, index), drawn on the fly:

    train        scenes of trained colours and shapes, without the held-out ones
    held-out     one scene in eight, which no training image and no training text shows
    never-seen   every thing combines a colour and a shape that training never combines

Three choices without which so small a model learns slowly or not at all:
- Captions come in two word orders, by thing ("the cat is red at top-left.") and by place ("at
  top-left a red cat."). A model learns to look up what is named first, and hardly anything else.
- An answer begins with the word that is looked up ("top-left", not "at the top-left").
- The ground is white, and so is the mean of the encoder's normalisation. Pixels are then 0 on the
  ground and negative on a thing of any colour, so shapes are recognised in new colours.
"""

import base64
import functools
import io
import itertools
import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

from nanoeemllm.border.files import write_aside
from nanoeemllm.config import UserError

COLOURS = {"black": "#000000", "blue": "#0000ff", "green": "#00a000", "purple": "#a000c8",
           "red": "#ff0000", "yellow": "#ffc800"}
SHAPES = ("cat", "cross", "ring", "square", "star", "triangle")
PLACES = "top-left top top-right left centre right bottom-left bottom bottom-right".split()
NUMBERS = "no one two three four five six".split()
# combinations that training lacks; every shape and every colour once
NEVER_TRAINED = ("green cat", "blue cross", "purple ring", "red square", "black star",
                 "yellow triangle")
SPLITS = ("train", "held-out", "never-seen")


@dataclass(frozen=True)
class WorldConfig:
    """With 8-pixel patches, sizes 32, 48, 64 and 128 give 16, 36, 64 and 256 visual tokens."""
    picture_size: int = 48
    max_things: int = 3
    seed: int = 0

    def __post_init__(self):
        if not 24 <= self.picture_size <= 4096:
            raise UserError(f"picture size {self.picture_size}: give 24 to 4096 pixels a side")
        if not 1 <= self.max_things <= len(SHAPES):
            raise UserError(f"a picture holds 1 to {len(SHAPES)} things, not {self.max_things}")


class Thing(NamedTuple):
    shape: str
    colour: str
    place: int                      # 0..8, row-major
    jitter: tuple                   # x, y, size; in sixteenths of a place's side


Scene = list[Thing]                 # in alphabetical order of shapes


# ---- scenes ----

def make_scene(world: WorldConfig, split: str, index: int) -> Scene:
    rng = random.Random(f"{world.seed} {split} {index}")
    never = split == "never-seen"
    while True:                     # until the scene belongs to the split
        number = rng.randint(1, world.max_things)
        shapes = sorted(rng.sample(SHAPES, number))
        places = rng.sample(range(len(PLACES)), number)
        scene = []
        for shape, place in zip(shapes, places):
            colour = rng.choice([c for c in COLOURS if (f"{c} {shape}" in NEVER_TRAINED) == never])
            jitter = tuple(rng.randint(-1, 1) for _ in range(3))
            scene.append(Thing(shape, colour, place, jitter))
        content = " ".join(f"{t.shape} {t.colour} {t.place}" for t in scene)
        is_held_out = zlib.crc32(content.encode()) % 8 == 0     # whatever the seed and jitter
        if never or is_held_out == (split == "held-out"):
            return scene


# ---- images ----

# Outlines in [-1, 1] x [-1, 1], y down: what to draw, 255 or 0 (a hole), coordinates x y x y ...
OUTLINES = {
    "cat": """polygon 255 -0.95 -1 -0.95 0.1 -0.1 -0.4
              polygon 255 0.95 -1 0.95 0.1 0.1 -0.4
              ellipse 255 -1 -0.6 1 1
              ellipse 0 -0.62 -0.15 -0.22 0.25
              ellipse 0 0.22 -0.15 0.62 0.25
              polygon 0 -0.25 0.4 0.25 0.4 0 0.7""",
    "cross": """rectangle 255 -0.3 -1 0.3 1
                rectangle 255 -1 -0.3 1 0.3""",
    "ring": """ellipse 255 -1 -1 1 1
               ellipse 0 -0.5 -0.5 0.5 0.5""",
    "square": "rectangle 255 -0.9 -0.9 0.9 0.9",
    "star": "polygon 255 0 -1 0.264503 -0.264058 1.046162 -0.239919 0.427975 0.239058 0.646564"
            " 0.989919 0 0.55 -0.646564 0.989919 -0.427975 0.239058 -1.046162 -0.239919"
            " -0.264503 -0.264058",
    "triangle": "polygon 255 0 -1 1 0.9 -1 0.9",
}


def draw(scene: Scene, size: int) -> Image.Image:
    """RGB image of size x size. A thing fills about four fifths of its place."""
    image = Image.new("RGB", (size, size), "white")
    side = size / 3
    for thing in scene:
        dx, dy, grow = (j * side / 16 for j in thing.jitter)
        sprite = _sprite(thing.shape, round(0.8 * side + grow))
        row, column = divmod(thing.place, 3)
        x = round((column + 0.5) * side + dx - sprite.width / 2)
        y = round((row + 0.5) * side + dy - sprite.width / 2)
        image.paste(COLOURS[thing.colour], (x, y), sprite)
    return image


@functools.cache
def _sprite(shape: str, size: int) -> Image.Image:
    """Coverage of a shape, size x size, 8 bit; drawn four times as large and averaged."""
    n = 4 * size
    mask = Image.new("L", (n, n))
    pen = ImageDraw.Draw(mask)
    for line in OUTLINES[shape].splitlines():
        form, fill, *numbers = line.split()
        points = [(float(x) + 1) * (n - 1) / 2 for x in numbers]
        getattr(pen, form)(points, fill=int(fill))
    return mask.resize((size, size), Image.Resampling.BOX)


# ---- words ----

SENTENCES = {"thing": "the {0} is {1} at {2}.", "place": "at {2} a {1} {0}."}       # word orders


def caption(scene: Scene, order: str) -> str:
    """order "thing": alphabetical, "place": as one reads."""
    if order == "place":
        scene = sorted(scene, key=lambda thing: thing.place)
    return " ".join(SENTENCES[order].format(t.shape, t.colour, PLACES[t.place]) for t in scene)


def description(scene: Scene, rng: random.Random) -> str:
    """The scene in words for text-only samples: things in any order, each worded either way."""
    things = rng.sample(scene, len(scene))
    return " ".join(caption([thing], rng.choice(("thing", "place"))) for thing in things)


class Question(NamedTuple):
    kind: str
    question: str
    answer: str


def questions(scene: Scene) -> list[Question]:
    """Everything that can be asked about a scene. A seed's choice depends on the kinds' order."""
    found = [Question("caption", f"describe the picture {order} by {order}.", caption(scene, order))
             for order in SENTENCES]
    found.append(Question("how-many", "how many things are there?", NUMBERS[len(scene)]))
    content = {PLACES[t.place]: f"{t.colour} {t.shape}" for t in scene}
    for place in PLACES:
        answer = content.get(place, "nothing")
        found.append(Question("what-is-at", f"what is at {place}?", answer))
    for shape, colour, place, _ in scene:
        found.append(Question("colour", f"what colour is the {shape}?", colour))
        found.append(Question("where", f"where is the {shape}?", PLACES[place]))
    there = [thing.shape for thing in scene]
    for shape in SHAPES:
        answer = "yes" if shape in there else "no"
        found.append(Question("is-there", f"is there a {shape}?", answer))
    return found


def by_kind(scene: Scene) -> dict:
    """kind -> (questions answered by "nothing" or "no", the others)"""
    kinds = {}
    for question in questions(scene):
        empty, full = kinds.setdefault(question.kind, ([], []))
        (empty if question.answer in ("nothing", "no") else full).append(question)
    return kinds


def ask(scene: Scene, rng: random.Random) -> list[Question]:
    """A question of every kind, in random order. "nothing" and "no" are right half of the time at
    most, though they answer most questions that can be asked."""
    chosen = []
    for groups in by_kind(scene).values():
        group = rng.choice([group for group in groups if group])
        chosen.append(rng.choice(group))
    rng.shuffle(chosen)
    return chosen


# at most so many questions of a kind with answers "nothing" or "no", and with others
LESSON = {"caption": (0, 1), "how-many": (0, 1), "what-is-at": (1, 2), "colour": (0, 2),
          "where": (0, 2), "is-there": (1, 1)}


def lesson(scene: Scene, rng: random.Random) -> list[Question]:
    """The questions of a stage 2 conversation. Short look-ups teach more a second than a long
    caption, so every other conversation has none."""
    chosen = []
    for kind, groups in by_kind(scene).items():
        if kind == "caption" and rng.random() >= 0.5:
            continue
        for group, most in zip(groups, LESSON[kind]):
            chosen += rng.sample(group, min(most, len(group)))
    rng.shuffle(chosen)
    return chosen


@dataclass
class ToyDataset:
    """Conversations in LLaVA's form, "image" a PIL image. kind:

    caption         an image and a caption (stage 1)
    conversation    an image and a lesson's questions (stage 2)
    text            a description and a question of every kind (the tiny Llama's first lessons)
    """
    world: WorldConfig
    split: str
    kind: str
    length: int = 100_000

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        scene = make_scene(self.world, self.split, i)
        rng = random.Random(f"{self.world.seed} {self.split} {i} {self.kind}")
        first = "<image>\n"
        if self.kind == "caption":
            first = "<image>"
            asked = [Question("caption", "", caption(scene, rng.choice(("thing", "place"))))]
        elif self.kind == "conversation":
            asked = lesson(scene, rng)
        else:
            first = description(scene, rng) + "\n"
            asked = ask(scene, rng)
        turns = []
        for _, question, answer in asked:
            turns.append({"from": "human", "value": first + question})
            turns.append({"from": "gpt", "value": answer})
            first = ""
        item = {"id": f"{self.split}-{i}"}
        if self.kind != "text":
            item["image"] = draw(scene, self.world.picture_size)
        return item | {"conversations": turns}


WORD = r"\n|[\w-]+|[^\w\s]"


def make_tokenizer(extra_words: str = "") -> Tokenizer:
    """Word-level, lower case: the words of the world and `extra_words` (a chat template's).

    "top-left" is one word, so that no place shares words with another. The newline is a word: a
    text token between an image and its caption has to predict the caption's first word.
    """
    scene = list(map(Thing, SHAPES, COLOURS, range(6), range(6)))
    texts = [f"{question} {answer}" for _, question, answer in questions(scene)]
    # "above" and "of" are in no text. Without them the ids, so every seed's model, would change.
    text = " ".join([*texts, *NUMBERS, *PLACES, "nothing no above of \n", extra_words])
    words = sorted(set(re.findall(WORD, text.lower())))
    special = ["<unk>", "<s>", "</s>"]
    ids = {word: i for i, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(cleanup=True)        # no space before a full stop
    tokenizer.add_special_tokens(special)
    return tokenizer


# ---- exams, files ----

def exam(world: WorldConfig, split: str, n: int) -> list[dict]:
    """n questions with exact answers as rows of a benchmark file, "image" a PIL image: one of every
    kind about image after image."""
    rows = []
    for index in itertools.count():
        scene = make_scene(world, split, index)
        rng = random.Random(f"{world.seed} {split} {index} exam")
        about = {"image": draw(scene, world.picture_size), "split": split,
                 "l2-category": f"{NUMBERS[len(scene)]} in the picture"}
        for kind, question, answer in ask(scene, rng):
            rows.append(about | {"question": question, "answer": answer, "category": kind})
        if len(rows) >= n:
            return rows[:n]


def export_llava(world: WorldConfig, folder: Path, n: int):
    """folder/pretrain.json, folder/finetune.json (LLaVA's lists), and the n images of both, all to
    train on."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, kind in (("pretrain", "caption"), ("finetune", "conversation")):
        dataset, items = ToyDataset(world, "train", kind), []
        for i in tqdm(range(n), name, leave=False, disable=None):
            item = dataset[i]
            file = f"{item['id']}.png"
            item["image"].save(folder / "images" / file)
            items.append(item | {"image": file})
        write_aside(folder / f"{name}.json", json.dumps(items, indent=1).encode())


def export_tsv(world: WorldConfig, file: Path, n: int):
    """n held-out rows with VLMEvalKit's columns, answers to be met exactly."""
    columns = "index image question answer category l2-category split".split()
    lines = [columns]
    for index, row in enumerate(exam(world, "held-out", n)):
        png = io.BytesIO()
        row["image"].save(png, "PNG")
        row |= {"index": str(index), "image": base64.b64encode(png.getvalue()).decode()}
        lines.append([row[column] for column in columns])
    write_aside(file, "".join("\t".join(line) + "\n" for line in lines).encode())
