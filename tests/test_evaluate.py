"""Benchmark files, prompts, bad rows, resuming and splitting, with a model that says what a test wants it to say."""

import base64
import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import tracemalloc

import pytest
import tokenizers
from PIL import Image

from nanoeemllm.config import IMAGE_TOKEN, LlamaConfig, ModelConfig, UserError, VisionConfig
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.evaluation import __main__ as command
from nanoeemllm.evaluation import evaluate_rows, summarize, table
from nanoeemllm.evaluation.benchmark import TSV, as_list, detect, read_answers, write_answers
from nanoeemllm.evaluation.questions import answers, prepare, prompt_of
from nanoeemllm.paths import PATHS
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.toy.report import compare, majority, shuffled
from nanoeemllm.weights.folder import read_config

CONFIG = ModelConfig(LlamaConfig(vocab_size=258, max_position_embeddings=600), VisionConfig(image_size=28))


def byte_tokenizer() -> Tokenizer:
    """A token a byte: nothing that a prompt says is lost."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(["<s>", "</s>", *letters])}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(tokenizer)


class FakeModel:
    """Answers with say(prompt text, pictures); keeps the batches that it was asked."""
    config = CONFIG

    def __init__(self, say):
        self.say, self.tokenizer, self.batches = say, byte_tokenizer(), []

    def generate_batch(self, prompts, images, max_new_tokens):
        self.batches.append(prompts)
        assert all(ids.count(IMAGE_TOKEN) == len(group) for ids, group in zip(prompts, images))
        texts = map(self.tokenizer.decode, prompts)
        return [self.tokenizer.encode(self.say(text, group)) for text, group in zip(texts, images)]


def picture(colour="red") -> Image.Image:
    return Image.new("RGB", (28, 28), colour)


def encoded(colour="red") -> str:
    png = io.BytesIO()
    picture(colour).save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def write_tsv(path, columns, rows, quoting=csv.QUOTE_MINIMAL):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows([columns, *rows])
    return path


COLUMNS = ("index", "image", "question", "A", "B", "C", "answer", "category")


def choices(path, n=4):
    return write_tsv(path, COLUMNS, [[i, encoded(), f"Which, {i}?", "red", "blue", "", "A", "hue"] for i in range(n)])


# ---- files ----

def test_cells_with_newlines_tabs_and_quotes(tmp_path):
    rows = [["0", encoded(), 'a "quoted"\nquestion\twith all', "yes", "x"], ["1", encoded("blue"), "猫?", "no", ""]]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        tsv = TSV(write_tsv(tmp_path / "t.tsv", ("index", "image", "question", "answer", "hint"), rows, quoting))
        assert len(tsv) == 2
        for i in (1, 0):                                           # in any order
            assert [tsv[i][name] for name in tsv.columns] == rows[i]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = choices(tmp_path / "t.tsv")
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert TSV(path).columns[0] == "index" and TSV(path)[0]["index"] == "0"


def test_a_picture_is_stored_once_and_referred_to_by_index(tmp_path):
    rows = [["7", encoded("blue"), "q", "a"], ["1000007", "7", "q", "a"], ["8", "9", "q", "a"],
            ["9", encoded(), "q", "a"], ["10", "1000007", "q", "a"], ["11", "no such", "q", "a"]]
    tsv = TSV(write_tsv(tmp_path / "t.tsv", ("index", "image", "question", "answer"), rows))
    assert tsv[1]["image"] == encoded("blue") and tsv[2]["image"] == encoded()          # backward and forward
    assert "1000007, which holds none" in tsv[4]["bad"] and "no such" in tsv[5]["bad"]


def test_lines_of_many_megabytes_are_never_all_in_memory(tmp_path):
    path, megabyte = tmp_path / "big.tsv", 1 << 20
    with open(path, "w") as file:
        file.write("index\timage\tquestion\tanswer\n")
        for i in range(30):
            file.write(f"{i}\t{'A' * 4 * megabyte}\tq{i}\ta\n")
    tracemalloc.start()
    tsv = TSV(path)
    assert len(tsv) == 30 and tsv[29]["question"] == "q29" and len(tsv[17]["image"]) == 4 * megabyte
    assert tracemalloc.get_traced_memory()[1] < 60 * megabyte      # a line as bytes, as text and as cells
    tracemalloc.stop()


def test_a_quote_that_is_never_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("nanoeemllm.evaluation.benchmark.MAX_CELL", 2000)
    path = choices(tmp_path / "t.tsv", 3)
    path.write_text(path.read_text() + '3\t"' + "x\n" * 2000)
    with pytest.raises(UserError, match="is a quote opened there"):
        TSV(path)


def test_missing_columns_are_named(tmp_path):
    path = write_tsv(tmp_path / "t.tsv", ("index", "question", "A"), [])
    with pytest.raises(UserError, match=r"no column answer, image \(or image_path\); .* holds index, question, A"):
        TSV(path)
    with pytest.raises(UserError, match="no such file"):
        TSV(tmp_path / "none.tsv")


@pytest.mark.parametrize("name, columns, metric", [
    ("MMBench_DEV_EN_V11", "AB", "circular"), ("CCBench", "AB", "circular"), ("BLINK_circular", "AB", "circular"),
    ("SEEDBench_IMG", "AB", "multiple-choice"), ("MMMU_DEV_VAL", "AB", "multiple-choice"),
    ("BLINK", "AB", "multiple-choice"), ("RealWorldQA", "AB", "multiple-choice"), ("MME", "", "mme"),
    ("POPE", "", "pope"), ("HallusionBench", "", "hallusion"), ("TextVQA_VAL", "", "vqa"),
    ("DocVQA_VAL", "", "anls"), ("ChartQA_TEST", "", "relaxed"), ("OCRBench", "", "ocrbench"), ("world", "", "exact")])
def test_the_kind_of_a_benchmark(name, columns, metric):
    assert detect(name, ["index", *columns]) == metric


def test_lists_in_cells():
    assert as_list("['a', \"b's\"]") == ["a", "b's"] and as_list("[1, 2]") == ["1", "2"]
    assert as_list("[unclear]") == ["[unclear]"] and as_list("a") == ["a"] and as_list("") == [""]


# ---- prompts ----

def test_prompts_of_every_kind():
    row = {"question": "Which?", "hint": "Look.", "A": "red", "B": "blue", "C": ""}
    assert prompt_of(row, "circular", ["p"])[0] == (
        "<image>\nLook.\nWhich?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.")
    chinese = prompt_of({"question": "哪个?", "A": "红"}, "circular", ["p"])[0]
    assert chinese == "<image>\n哪个?\nA. 红\n请直接回答选项字母。"
    word = "\nAnswer the question using a single word or phrase."
    assert prompt_of({"question": "Is it? Please answer yes or no."}, "mme", ["p"])[0] == "<image>\nIs it?" + word
    for metric in ("vqa", "anls", "relaxed", "multiple-choice"):
        assert prompt_of({"question": "Which?"}, metric, ["p"])[0] == "<image>\nWhich?" + word
    for metric in ("ocrbench", "exact"):
        assert prompt_of({"question": "Which?"}, metric, ["p"])[0] == "<image>\nWhich?"


def test_pictures_stand_where_the_question_says():
    row = {"question": "In <image 2> and <image 1>, not <image 3>, <image 2> again"}
    assert prompt_of(row, "exact", ["a", "b"]) == (
        "In <image> and <image>, not image 3, image 2 again", ["b", "a"])
    assert prompt_of({"question": "See <image 2>"}, "exact", ["a", "b", "c"]) == (
        "<image>\n<image>\nSee <image>", ["a", "c", "b"])
    assert prompt_of({"question": "an <image> tag, <image>"}, "exact", ["a"])[0] == "an <image> tag, image"


# ---- asking ----

def test_rows_in_memory():
    colour = lambda text, images: {(255, 0, 0): "red.", (0, 0, 255): "blue"}[images[0].getpixel((0, 0))]
    rows = [{"image": picture(c), "question": "what colour?", "answer": c, "category": "colour", "l2-category": n}
            for c, n in (("red", "one"), ("blue", "one"), ("red", "two"), ("red", "two"))]
    result = evaluate_rows(FakeModel(colour), rows)
    assert result["overall"] == {"accuracy": 100, "rows": 4} and result["rows"] == 4
    assert evaluate_rows(FakeModel(colour), shuffled(rows))["overall"]["accuracy"] == 50    # blue red red red
    control = majority(rows)
    assert control["overall"]["accuracy"] == 75 and control["l2-category"]["one"]["accuracy"] == 50
    assert compare({"model": result, "majority": control}).splitlines() == [
        "         model  majority", "overall  100.0      75.0", "one      100.0      50.0", "two      100.0     100.0",
        "colour   100.0      75.0"]
    assert table({"overall": result["overall"], "more": {"F1": 1}}).splitlines() == [
        "         accuracy  rows  F1", "overall     100.0     4", "more                      1"]


def test_batches_are_filled_by_cost():
    model = FakeModel(lambda text, images: "x")
    rows = [{"image": picture(), "question": "q" * (10 * i), "answer": "x"} for i in range(1, 9)]
    tokens = [prepare(model, row | {"index": "0"}, "exact", 5).tokens for row in rows]
    assert tokens[0] == len(model.tokenizer.decode(prepare(model, rows[0], "exact", 5).ids)) + 1 + 4 + 5
    assert len(list(answers(model, rows, "exact", 5, batch_tokens=800))) == 8
    assert [len(ids) for batch in model.batches for ids in batch] == [n - 4 - 5 + 1 for n in tokens]    # in order, all
    sums = [sum(len(ids) + 8 for ids in batch) for batch in model.batches]
    assert len(sums) > 2 and max(sums) <= 800 and all(a + b[0] > 800 for a, b in zip(sums, [
        [len(ids) + 8 for ids in batch] for batch in model.batches[1:]]))


def test_bad_rows_are_named_counted_and_left_out(tmp_path):
    good = encoded()
    noise = base64.b64encode(b"x" * 90).decode()
    rest = ["q", "red", "blue", "", "A", "c"]
    rows = [["0", good, *rest], ["1", "", *rest], ["2", "%" * 80, *rest], ["3", noise, *rest],
            ["4", good, "q", "red", "blue", "", "C", "c"], ["0", good, *rest], ["5", good, "", *rest[1:]],
            ["6", good, "q"], ["7", good, "q", "red", "blue", "", "", "c"], ["8", good, "q" * 600, *rest[1:]],
            ["9", good[:-40], *rest], ["10", good, "q", "red", "blue", "", "B", "c"],
            ["11", good, "q?", "red", "blue", "", "B", "c"]]
    tsv = TSV(write_tsv(tmp_path / "t.tsv", COLUMNS, rows))
    model = FakeModel(lambda text, images: "either" if "q?" in text else "A")
    records = sorted(answers(model, (tsv[i] for i in range(len(tsv))), "multiple-choice", 16), key=lambda r: r["row"])
    reasons = ["", "no picture", "", "not a picture", "'C' is none of the options A, B", "index 0 is that of row 1 too",
               "no question", "3 cells under 8 columns", "no answer", "do not fit the model's context of 600",
               "not a picture", "", ""]
    assert [r["row"] for r in records] == list(range(1, 14))
    assert all(reason in r.get("bad", "") for r, reason in zip(records, reasons))
    assert [i for i, r in enumerate(records) if "bad" not in r] == [0, 11, 12] and "bad" in records[2]
    result = summarize("multiple-choice", records)
    assert (result["rows"], result["bad"], result["unread"]) == (3, 10, 1)
    assert result["overall"]["accuracy"] == pytest.approx(100 / 3)


def test_bad_rows_of_the_other_kinds():
    row = {"image": picture(), "question": "q", "answer": "perhaps", "index": "x"}
    model = FakeModel(lambda text, images: "yes")
    for metric, answer, reason in (("mme", "perhaps", "none of the options yes, no"),
                                   ("hallusion", "Yes", "_set_figure_question"), ("circular", "A", "not a whole number")):
        record, = answers(model, [row | {"answer": answer, "A": "red"}], metric)
        assert reason in record["bad"]


def test_not_utf_8_and_stray_carriage_returns_spoil_their_own_row_alone(tmp_path):
    path = choices(tmp_path / "t.tsv", 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"Which", b"\xff") + lines[2].replace(b"Which", b"Wh\rich") + lines[3])
    tsv = TSV(path)
    assert tsv[0]["bad"] == "not UTF-8" and "cells under" in tsv[1]["bad"] and "bad" not in tsv[2]

    path.write_bytes(lines[0] + b"\xff" + lines[1])
    record, = answers(FakeModel(None), [TSV(path)[0]], "multiple-choice")
    list(write_answers(tmp_path / "predictions-0.jsonl", {}, [record]))
    assert read_answers(tmp_path, {})[1] == {"row": 1, "index": "?0", "bad": "not UTF-8"}


def test_several_pictures_and_paths(tmp_path):
    (tmp_path / "images").mkdir()
    for colour in ("red", "blue"):
        picture(colour).save(tmp_path / "images" / f"{colour}.png")
    rows = [["0", "['images/red.png', 'images/blue.png']", "q", "2"], ["1", "images/red.png", "q", "1"],
            ["2", "images/none.png", "q", "1"]]
    tsv = TSV(write_tsv(tmp_path / "t.tsv", ("index", "image_path", "question", "answer"), rows))
    say = FakeModel(lambda text, images: str(len(images)))
    records = sorted(answers(say, (tsv[i] for i in range(3)), "exact", 16), key=lambda r: r["row"])
    assert [r.get("score") for r in records] == [1, 1, None] and "none.png: no such file" in records[2]["bad"]
    both = f"['{encoded()}', '{encoded('blue')}']"
    tsv = TSV(write_tsv(tmp_path / "u.tsv", ("index", "image", "question", "answer"), [["0", both, "q", "2"]]))
    assert next(answers(say, [tsv[0]], "exact", 16))["score"] == 1


# ---- the command ----

@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A model folder as far as the command looks into it, and a model that says A."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    model = FakeModel(lambda text, images: "A")
    monkeypatch.setattr(command, "load_model", lambda *args: model)
    return folder, model


def run(weights, tsv, *more):
    command.main(["--weights", str(weights), "--tsv", str(tsv), "--max-new-tokens", "16", *more])


def test_an_interrupted_run_goes_on(tmp_path, weights, monkeypatch, capsys):
    folder, model = weights
    tsv = choices(tmp_path / "Choices.tsv", 10)

    def stops(text, images):
        if "7?" in text:
            raise KeyboardInterrupt
        return "A"

    model.say = stops
    with pytest.raises(KeyboardInterrupt):
        run(folder, tsv, "--batch-tokens", "400")
    file = folder / "eval" / "Choices" / "predictions-0.jsonl"
    before = file.read_text().splitlines()
    assert 2 <= len(before) < 11 and json.loads(before[0])["metric"] == "multiple-choice"
    file.write_text("\n".join(before) + '\n{"row": 9, "ind')              # killed while it wrote
    model.say, asked = (lambda text, images: "B"), len(before) - 1
    model.batches.clear()
    run(folder, tsv)
    assert sum(map(len, model.batches)) == 10 - asked                    # nothing is asked twice
    results = json.loads((file.parent / "results.json").read_text())
    assert results["rows"] == 10 and results["overall"]["accuracy"] == 10 * asked
    model.batches.clear()
    run(folder, tsv)
    assert not model.batches and "10 of 10 rows are answered" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with max_new_tokens 16, not 8: remove it, or give another"):
        run(folder, tsv, "--max-new-tokens", "8")


def test_limit_metric_and_the_report(tmp_path, weights, capsys):
    folder, model = weights
    model.say = lambda text, images: "hm" if "1?" in text else "A"
    tsv = choices(tmp_path / "Choices.tsv", 6)
    tsv.write_text(tsv.read_text() + "6\tshort\tq\tred\tblue\t\tA\tcolour\n")
    run(folder, tsv, "--limit", "2")
    out = capsys.readouterr().out
    assert "multiple-choice over 2 of 2 rows" in out and "overall" in out and "50.0" in out
    assert "1 answers could not be read and score 0:\n  row 2 (index 1): 'hm'" in out
    run(folder, tsv)                                                     # goes on from the two
    out = capsys.readouterr().out
    assert "over 6 of 7 rows" in out and "row 7 (index 6): its picture is that of index short, which holds none" in out
    assert sum(map(len, model.batches)) == 6
    with pytest.raises(UserError, match="none of 6 rows"):
        run(folder, write_tsv(tmp_path / "bad.tsv", COLUMNS, [[i, "", "q", "r", "b", "", "A", ""] for i in range(6)]))
    with pytest.raises(UserError, match="has no rows"):
        run(folder, write_tsv(tmp_path / "none.tsv", COLUMNS, []))
    with pytest.raises(UserError, match="--limit: '0' is no int over 0"):
        run(folder, tsv, "--limit", "0")


def test_circular_evaluation_of_a_file(tmp_path, weights, capsys):
    """Two questions of two options; always saying A is right once of two times, reading the colour always."""
    folder, model = weights
    rows = [["1", encoded(), "one?", "red", "blue", "", "A"], ["2", encoded(), "two?", "blue", "red", "", "B"],
            ["1000001", "1", "one?", "blue", "red", "", "B"], ["1000002", "2", "two?", "red", "blue", "", "A"]]
    tsv = write_tsv(tmp_path / "MMBench_DEV_EN.tsv", COLUMNS[:-1], rows)
    run(folder, tsv)
    results = json.loads((folder / "eval" / "MMBench_DEV_EN" / "results.json").read_text())
    assert results["overall"] == {"accuracy": 0, "questions": 2, "rows": 4, "cut": 0}
    run(folder, tsv, "--out", str(tmp_path / "plain"), "--metric", "multiple-choice")
    assert json.loads((tmp_path / "plain" / "results.json").read_text())["overall"]["accuracy"] == 50
    model.say = lambda text, images: "red"
    run(folder, tsv, "--out", str(tmp_path / "sees"))
    assert json.loads((tmp_path / "sees" / "results.json").read_text())["overall"]["accuracy"] == 100


def test_the_whole_command_on_a_real_model_split_over_processes(tmp_path):
    """A tiny model of random weights answers the tiny world's file: two processes say what one says."""
    import torch
    from nanoeemllm.weights.folder import save
    from nanoeemllm.config import PRESETS
    from nanoeemllm.model import EEMLLM
    from nanoeemllm.toy.world import WorldConfig, export_tsv
    config, tokenizer = PRESETS["tiny"], byte_tokenizer()
    config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, vocab_size=258))
    torch.manual_seed(0)
    model = EEMLLM(config, tokenizer)
    initialize(model)
    save(model.state_dict(), config, tokenizer, tmp_path / "model")
    export_tsv(WorldConfig(), tmp_path / "world.tsv", 9)
    flags = ["--weights", str(tmp_path / "model"), "--tsv", str(tmp_path / "world.tsv"), "--max-new-tokens", "4",
             "--batch-tokens", "600", "--device", "cpu", "--out"]
    command.main([*flags, str(tmp_path / "1")])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                           "nanoeemllm.evaluation", *flags, str(tmp_path / "2")], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "exact over 9 of 9 rows" in done.stdout
    found = [read_answers(tmp_path / name, {}) for name in "12"]
    assert len(list((tmp_path / "2").glob("predictions-*.jsonl"))) == 2
    assert found[0] == found[1] and set(found[0]) == set(range(1, 10))


def test_damaged_predictions_and_folders_that_cannot_be_written(tmp_path, weights):
    folder, _ = weights
    tsv = choices(tmp_path / "Choices.tsv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*predictions-0.jsonl: (File exists|Not a directory)"):
        run(folder, tsv, "--out", str(tmp_path / "file"))
    run(folder, tsv)
    file = folder / "eval" / "Choices" / "predictions-0.jsonl"
    file.write_text(file.read_text() + "\0\0\n")
    with pytest.raises(UserError, match="predictions-0.jsonl is damaged"):
        run(folder, tsv)


def test_a_row_that_was_bad_is_asked_again_when_it_is_mended(tmp_path, weights, capsys):
    folder, _ = weights
    rows = [[0, encoded(), "Which?", "red", "blue", "", "A", "hue", ""], [1, "", "Which?", "red", "blue", "", "A", "hue", "late.png"]]
    tsv = write_tsv(tmp_path / "Late.tsv", (*COLUMNS, "image_path"), rows)
    run(folder, tsv)
    assert "over 1 of 2 rows" in capsys.readouterr().out
    picture().save(tmp_path / "late.png")
    run(folder, tsv)
    out = capsys.readouterr().out
    assert "1 of 2 rows are answered" in out and "over 2 of 2 rows" in out


def test_columns_called_row_and_bad_change_nothing(tmp_path, weights, capsys):
    folder, _ = weights
    tsv = write_tsv(tmp_path / "Odd.tsv", ("row", "bad", *COLUMNS), [[7, "x", 0, encoded(), "Which?", "red", "blue", "", "A", "hue"]])
    run(folder, tsv)
    assert "over 1 of 1 rows" in capsys.readouterr().out


def test_a_byte_order_mark_before_a_quoted_header(tmp_path):
    tsv = write_tsv(tmp_path / "t.tsv", COLUMNS, [[0, encoded(), "Which?", "red", "blue", "", "A", "hue"]], csv.QUOTE_ALL)
    tsv.write_bytes(b"\xef\xbb\xbf" + tsv.read_bytes())
    assert TSV(tsv)[0]["answer"] == "A"


# ---- what comes from outside ----

GOOD = {"row": 1, "index": "0", "question": "q", "answer": ["A"], "prediction": "A", "score": 1.0, "read": "A",
        "options": 2}


@pytest.mark.parametrize("record", [
    [], 7, "text", None, {}, {"row": 1}, {"row": 1, "bad": 3, "index": "0"}, GOOD | {"row": "1"}, GOOD | {"row": True},
    GOOD | {"score": "x"}, GOOD | {"score": float("nan")}, GOOD | {"score": 1e999}, GOOD | {"score": 2}, GOOD | {"score": None},
    GOOD | {"index": 3}, GOOD | {"answer": 3}, GOOD | {"answer": [3]}, GOOD | {"prediction": ["A"]}, GOOD | {"category": 3},
    GOOD | {"index": "x"}, GOOD | {"options": "x"}, GOOD | {"index": "9" * 5000}, GOOD | {"options": [1]}],
    ids=lambda record: str(record)[:60])
def test_odd_records_are_refused_in_one_line(tmp_path, record):
    settings = {"metric": "circular"}
    (tmp_path / "predictions-0.jsonl").write_text(f"{json.dumps(settings)}\n{json.dumps(record)}\n")
    with pytest.raises(UserError, match="predictions-0.jsonl is damaged .*remove it") as error:
        read_answers(tmp_path, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["[" * 100_000, "7", "[]", '"x"', "{", "\0", '{"a": ' * 50_000, "null"],
                         ids=lambda line: line[:4])
def test_odd_lines_are_refused_in_one_line(tmp_path, line):
    for lines in ([line], ['{"metric": "exact"}', line]):
        (tmp_path / "predictions-0.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match="predictions-0.jsonl (is damaged|was made with)"):
            read_answers(tmp_path, {"metric": "exact"})


def test_special_files_are_refused_unopened(tmp_path, weights):
    folder, _ = weights
    tsv, out = choices(tmp_path / "Choices.tsv"), tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "predictions-0.jsonl")
    os.mkfifo(tmp_path / "fifo.tsv")
    for file, flags in ((tsv, ["--out", str(out)]), (tmp_path / "fifo.tsv", []), ("/dev/zero", [])):
        with pytest.raises(UserError, match="is not a regular file"):
            run(folder, file, *flags)
    with pytest.raises(UserError, match="is a folder, not a file"):
        run(folder, tmp_path)
    (folder / "eval" / "Choices" / "results.json").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write .*results.json"):
        run(folder, tsv)


def test_image_paths_stay_in_their_folder(tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere" / "deep"
    images.mkdir()
    elsewhere.mkdir(parents=True)
    for file in (tmp_path / "secret.png", tmp_path / "elsewhere" / "secret.png", images / "mine.png"):
        picture().save(file)
    (images / "link").symlink_to(elsewhere)
    names = ["../secret.png", str(tmp_path / "secret.png"), "link/../secret.png", "['mine.png', '../secret.png']",
             "x" * 300, "a\0b", "link/../../images/mine.png", "mine.png"]
    rows = [[i, name, "q", "1"] for i, name in enumerate(names)]
    tsv = TSV(write_tsv(tmp_path / "t.tsv", ("index", "image_path", "question", "answer"), rows), images=images)
    found = list(answers(FakeModel(lambda text, images: "1"), (tsv[i] for i in range(len(tsv))), "exact"))
    bad = {record["row"]: record["bad"] for record in found if "bad" in record}
    assert set(bad) == {1, 2, 3, 4, 5, 6} and all("is outside of" in bad[row] for row in (1, 2, 3, 4))


def test_calibration_writes_what_the_visual_path_chose(tmp_path, weights, monkeypatch, capsys):
    folder, model = weights
    rows = [[i, encoded() if i else "", "Which?", "red", "blue", "", "A", "hue"] for i in range(3)]
    tsv, seen = write_tsv(tmp_path / "Choices.tsv", COLUMNS, rows), []

    def calibrate(path, model, prompts):
        seen.extend((ids.count(IMAGE_TOKEN), len(images)) for ids, images in prompts)
        return dataclasses.replace(path, window=9), ["layer 0: all"]

    monkeypatch.setattr(PATHS["yopo"], "calibrate", calibrate)
    run(folder, tsv, "--calibrate", "--visual-path", "yopo")
    assert seen == [(1, 1)] * 2
    config = read_config(folder)
    assert config.visual_path == CONFIG.visual_path and config.path_named("yopo").window == 9
    out = capsys.readouterr().out
    assert "row 1 is left out: no picture\nlayer 0: all\nwritten to" in out


def test_flags_environment_and_places(tmp_path, weights, monkeypatch):
    folder, _ = weights
    tsv = choices(tmp_path / "Choices.tsv")
    for flags, what in ((["--out", "/proc/x"], "cannot write /proc/x/predictions-0.jsonl"), (["--limit", "1e99"], "--limit"),
                        (["--images", "/dev/null", "--metric", "x"], "--metric")):
        with pytest.raises(UserError, match=what):
            run(folder, tsv, *flags)
    for name, value in (("RANK", "abc"), ("WORLD_SIZE", "-3"), ("WORLD_SIZE", "1e9")):
        with monkeypatch.context() as environment, pytest.raises(UserError, match=f"{name} is '{value}'"):
            environment.setenv(name, value)
            run(folder, tsv)


def test_the_program_ends_in_one_line():
    def shell(flags):
        return subprocess.run(f"{sys.executable} -m nanoeemllm.evaluation {flags}", shell=True, capture_output=True,
                              text=True, timeout=60)

    got = shell("--weights nowhere --tsv none")
    assert got.returncode == 2 and got.stderr == "error: nowhere/config.json: no such file\n"
    assert "Traceback" not in shell("--help | head -1").stderr
