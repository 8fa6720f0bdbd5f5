"""The tiny world is a function of its seed, its answers are true, and no split leaks into another."""

import base64
import csv
import hashlib
import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

from nanoeemllm.config import PRESETS, UserError
from nanoeemllm.toy.backbones import WORDS, tiny_config, tiny_tokenizer, true_words
from nanoeemllm.toy.world import (COLOURS, NEVER_TRAINED, PLACES, SHAPES, SPLITS, Thing, ToyDataset,
                                  WorldConfig, ask, caption, draw, exam, export_llava, export_tsv,
                                  lesson, make_scene, questions)

WORLD = WorldConfig()
SCENE = [Thing("cat", "red", 0, (0, 0, 0)), Thing("star", "blue", 5, (1, -1, 0))]


def content(scene):
    return tuple((t.shape, t.colour, t.place) for t in scene)


def test_the_same_seed_draws_the_same_world_and_another_seed_another():
    for split in SPLITS:
        for kind in ("caption", "conversation", "text"):
            one, two = (ToyDataset(WORLD, split, kind)[7] for _ in range(2))
            assert one["conversations"] == two["conversations"]
            assert kind == "text" or np.array_equal(one["image"], two["image"])
    scenes = [[make_scene(WorldConfig(seed=seed), "train", i) for i in range(20)] for seed in (0, 1)]
    assert scenes[0] != scenes[1]


def test_the_world_is_the_one_that_golden_numbers_were_measured_in():
    """SHA-256 of what the first edition drew and asked."""
    found = hashlib.sha256()
    for split in SPLITS:
        for kind in ("caption", "conversation", "text"):
            dataset = ToyDataset(WorldConfig(64, 6, 3), split, kind)
            for item in map(dataset.__getitem__, range(50)):
                if "image" in item:
                    found.update(item.pop("image").tobytes())
                found.update(json.dumps(item).encode())
        for row in exam(WORLD, split, 60):
            found.update(row["image"].tobytes() + (row["question"] + row["answer"]).encode())
    found.update(tiny_tokenizer(PRESETS["tiny"]).to_json().encode())
    assert found.hexdigest()[:16] == "f17af564f217668c"


def test_no_split_shows_what_another_one_does():
    train, held_out, never = ({content(make_scene(WORLD, split, i)) for i in range(1500)} for split in SPLITS)
    assert not train & held_out
    for scene in train | held_out:
        assert not set(NEVER_TRAINED) & {f"{colour} {shape}" for shape, colour, _ in scene}
    for scene in never:
        assert {f"{colour} {shape}" for shape, colour, _ in scene} <= set(NEVER_TRAINED)
    colours, shapes = zip(*map(str.split, NEVER_TRAINED))
    assert sorted(shapes) == sorted(SHAPES) and sorted(colours) == sorted(COLOURS)


def test_the_things_are_where_the_scene_says():
    picture = np.asarray(draw(SCENE, 48)).astype(int)
    assert tuple(picture[5, 8]) == ImageColor.getrgb(COLOURS["red"])                           # the cat's forehead
    assert tuple(picture[24 - 1, 40 + 1]) == ImageColor.getrgb(COLOURS["blue"])                # the star's middle
    assert (picture[32:] == 255).all() and (picture[:, 16:32] == 255).all()  # no thing leaves its place
    for size in (32, 64, 128):
        assert draw(SCENE, size).size == (size, size)


def test_captions_and_answers_by_hand():
    assert caption(SCENE, "thing") == "the cat is red at top-left. the star is blue at right."
    assert caption(list(reversed(SCENE)), "place") == "at top-left a red cat. at right a blue star."
    answers = {q.question: q.answer for q in questions(SCENE)}
    assert answers["how many things are there?"] == "two"
    assert answers["what is at right?"] == "blue star" and answers["what is at centre?"] == "nothing"
    assert answers["what colour is the cat?"] == "red" and answers["where is the star?"] == "right"
    assert answers["is there a cat?"] == "yes" and answers["is there a ring?"] == "no"


def test_an_exam_asks_every_kind_about_every_picture():
    kinds = [row["category"] for row in exam(WORLD, "held-out", 60)]
    for first in range(0, 60, 6):
        assert sorted(kinds[first:first + 6]) == ["caption", "colour", "how-many", "is-there", "what-is-at", "where"]


def test_half_of_the_yes_no_questions_are_yes():
    answers = [q.answer for i in range(400) for q in ask(make_scene(WORLD, "train", i), random.Random(i))
               if q.kind == "is-there"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_the_tokenizer_knows_every_word_and_gives_text_back():
    config = PRESETS["tiny"]
    tokenizer = tiny_tokenizer(config)
    assert tokenizer.vocab_size <= config.llama.vocab_size
    for i in range(50):
        scene = make_scene(WorldConfig(max_things=6), "train", i)
        for q in lesson(scene, random.Random(i)):
            for text in (q.question, q.answer):
                assert tokenizer.decode(tokenizer.encode(text)) == text
    unknown = tokenizer.encode("zebra")
    assert all(unknown[0] not in tokenizer.encode(word) for word in WORDS)
    assert tokenizer.encode("\n") and tokenizer.encode("top-left") != tokenizer.encode("top left")


def test_every_patch_is_told_the_words_of_the_thing_in_its_place():
    truth = true_words(SCENE, 6)
    said = [{WORDS[i] for i in row.nonzero()[:, 0]} for row in truth]
    assert said[0] == said[7] == {"top-left", "cat", "red"} and said[17] == {"right", "star", "blue"}
    assert said[14] == {"nothing"}
    everywhere = [Thing(SHAPES[place % 6], "red", place, (0, 0, 0)) for place in range(9)]
    for side in (4, 8, 16):
        covered = [{WORDS[i] for i in row.nonzero()[:, 0]} & set(PLACES) for row in true_words(everywhere, side)]
        assert all(len(names) == 1 for names in covered) and set().union(*covered) == set(PLACES)
    assert tiny_config(WorldConfig(picture_size=64)).vision.grid_size == 8


def test_exports(tmp_path):
    export_llava(WORLD, tmp_path, 3)
    for name in ("pretrain", "finetune"):
        data = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(data) == 3 and "<image>" in data[0]["conversations"][0]["value"]
        picture = Image.open(tmp_path / "images" / data[2]["image"])
        assert np.array_equal(picture, draw(make_scene(WORLD, "train", 2), 48))

    export_tsv(WORLD, tmp_path / "toy.tsv", 10)
    rows = list(csv.DictReader(open(tmp_path / "toy.tsv"), delimiter="\t"))
    assert [row["index"] for row in rows] == [str(i) for i in range(10)]
    for row, asked in zip(rows, exam(WORLD, "held-out", 10)):
        assert all(row[key] == asked[key] for key in asked if key != "image")
        assert row["category"] and row["l2-category"] and row["split"] == "held-out"
        image = Image.open(io.BytesIO(base64.b64decode(row["image"])))
        assert np.array_equal(image, asked["image"])


@pytest.mark.parametrize("knobs", [{"picture_size": 8}, {"max_things": 7}, {"max_things": 0}])
def test_a_wrong_knob_is_named(knobs):
    with pytest.raises(UserError, match=str(next(iter(knobs.values())))):
        WorldConfig(**knobs)


def test_the_command_line_says_what_is_wrong(tmp_path):
    run = subprocess.run([sys.executable, "-m", "nanoeemllm.toy", "--export", str(tmp_path), "--max-things", "9"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: a picture holds 1 to 6 things, not 9") and "Traceback" not in run.stderr
