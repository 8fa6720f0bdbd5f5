"""sample.py as a user runs it, and what the charts and attention maps show."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from nanoeemllm import attention_map, bench, bench_systems
from nanoeemllm.checkpoint import save
from nanoeemllm.config import IMAGE_TOKEN as IMAGE
from nanoeemllm.config import PRESETS, UserError, VisualPathConfig
from nanoeemllm.image import prepare_image
from nanoeemllm.model import EEMLLM
from nanoeemllm.plot import line_chart
from nanoeemllm.prompt import Tokenizer
from nanoeemllm.toy import make_tokenizer
from nanoeemllm.visual_path import make_visual_path
from test_generation import make_model as wide_model
from test_model import picture

SCRIPT = Path(sample.__file__)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with out/finetune (random weights), out/backbone, and pictures."""
    folder = tmp_path_factory.mktemp("user")
    tokenizer = Tokenizer(make_tokenizer())
    tiny = PRESETS["tiny"]
    config = dataclasses.replace(tiny, llama=dataclasses.replace(tiny.llama, vocab_size=tokenizer.vocab_size,
                                                                 num_hidden_layers=2, max_position_embeddings=512))
    torch.manual_seed(0)
    for name, one in (("finetune", config), ("text", dataclasses.replace(config, vision=None)), ("backbone", config)):
        model = EEMLLM(one)
        model.initialize()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(8 if p.dim() > 1 else 1)
            model.decoder.lm_head.weight[[tokenizer.eos_id, *tokenizer.encode("\n")]] = 0        # no ends, one line
        save(model.state_dict(), one, tokenizer, folder / "out" / name)
        time.sleep(0.01)                                        # the next one is newer
    (folder / "album").mkdir()
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
        picture(number).save(folder / "album" / f"{number}.png")
    (folder / "album" / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    return folder


@pytest.fixture
def run(place, monkeypatch, capfd):
    """Runs sample.py in this process -> (stdout, stderr); UserErrors come through."""
    monkeypatch.chdir(place)

    def run(*flags: str) -> tuple[str, str]:
        sample.main(["--max-new-tokens", "12", *flags])
        return tuple(capfd.readouterr())
    return run


def script(place, *flags, **how) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], cwd=place, capture_output=True, text=True, timeout=60, **how)


def test_the_command_of_the_readme(place):
    """The newest model with eyes that is no backbone describes the picture."""
    got = script(place, "--image", "0.png", "--max-new-tokens", "12")
    assert got.returncode == 0 and len(got.stdout.split()) > 2 and got.stderr == ""
    assert sample.newest_model(place / "out") == place / "out" / "finetune"


@pytest.mark.parametrize("flags, what", [
    (["--prompt", ""], "--prompt is empty: ask something"), ([], "nothing to answer"),
    (["--image", "gone.png"], "gone.png: no such picture"), (["--image", "broken.png"], "broken.png: not a picture"),
    (["--image", "out/finetune/config.json"], "config.json: not a picture"), (["--image", "album"], "is a folder: add --jsonl"),
    (["--image", "0.png", "--image", "album/../0.png"], "named twice"),
    (["--prompt", "hi", "--temperature", "-1"], "temperature is -1.0; it must be 0 or more"),
    (["--prompt", "hi", "--top-p", "0"], "top-p is 0.0"), (["--prompt", "hi", "--max-new-tokens", "0"], "--max-new-tokens: '0' is no int over 0"),
    (["--prompt", "hi", "--max-new-tokens", "600"], "and 600 new ones do not fit the model's context of 512"),
    (["--prompt", "<image> <image> hi", "--image", "0.png"], r"holds 2 <image> but 1 picture\(s\)"),
    (["--prompt", "hi", "--attention", "map.png"], "--attention shows where the model looks in a picture: name one"),
    (["--image", "0.png", "--attention", "no/map.png"], "give a file in a folder that exists"), (["--image", "0.png", "--attention", "album"], "give a file"),
    (["--image", "0.png", "--attention", "map.png", "--attention-layers", "x"], "give a layer or a range"),
    (["--image", "0.png", "--attention", "map.png", "--attention-layers", "9-"], "2 layers look at the picture"),
    (["--image", "0.png", "--attention", "map.png", "--chat"], "do not go together"),
    (["--prompt", "hi", "--weights", "nowhere"], "nowhere/config.json: no such file"),
    (["--image", "0.png", "--weights", "out/text"], "out/text has no image encoder"),
    (["--prompt", "hi", "--device", "cuda:77"], "this machine has none"), (["--jsonl", "--prompt", "hi"], "--jsonl answers for each"),
    (["--prompt", "caf\udce9"], "not UTF-8"), (["--image", "0.png", "--attention-layers", "1"], "give it a file"),
    (["--image", "x" * 300 + ".png"], "--image: .*name too long"), (["--image", "0.png", "--jsonl", "--stats"], "leave --jsonl out"),
    (["--prompt", "hi", "--seed", str(2 ** 70)], "up to 2.31"), (["--prompt", "hi", "--temperature", "inf"], "0 or more"),
    (["--image", "out", "--jsonl"], "no pictures in this folder"), (["--prompt", "hi", "--stop", ""], "stop string is empty")])
def test_bad_input_is_one_clear_line(run, flags, what):
    with pytest.raises(UserError, match=what) as error:
        run(*flags)
    assert "\n" not in str(error.value)


def test_exit_codes_and_no_traceback(place, tmp_path):
    got = script(tmp_path, "--image", str(place / "0.png"))
    assert got.returncode == 2 and got.stderr == ("error: no trained model under out/: make one with `python train.py`, or "
                                                  "name a folder with --weights\n")
    got = script(tmp_path, "--dtype", "int8")
    assert got.returncode == 2 and got.stderr.startswith("error: argument --dtype: invalid choice") and got.stderr.count("\n") == 1
    shut = subprocess.run(f"{sys.executable} {SCRIPT} --chat <&-", shell=True, cwd=place, capture_output=True, text=True)
    assert shut.returncode == 2 and shut.stderr.startswith("error: --chat reads questions from stdin, which is closed")


def test_prompts_and_pictures(run):
    one, two = (run("--image", "0.png", "--prompt", p)[0].strip() for p in ("what is it?", "how many things are there?"))
    together = run("--image", "0.png", "--prompt", "what is it?", "--prompt", "how many things are there?")[0]
    assert together.split("\n") == ["> what is it?", one, "> how many things are there?", two, ""]
    for path in ("llava", "naavit", "yopo"):                                  # with kept pictures and without
        assert run("--image", "0.png", "--image", "1.png", "--visual-path", path)[0].strip()
    assert run("--prompt", "is there a cat?", "--weights", "out/text")[0].strip()
    word = one.split()[2]
    assert run("--image", "0.png", "--prompt", "what is it?", "--stop", word)[0].strip() == one.split(word)[0].strip()


def test_seeds_and_stats(run):
    draw = lambda seed: run("--image", "0.png", "--temperature", "3", "--seed", seed, "--dtype", "float32")[0]
    assert draw("1") == draw("1") != draw("2")
    assert "first token after" in run("--image", "0.png", "--stats")[1]


def test_a_folder_gives_a_line_of_json_a_picture(run, place):
    prompts = ["--prompt", "what is it?", "--prompt", "is there a cat?"]
    lines = [json.loads(line) for line in run("--image", "album", "--jsonl", *prompts)[0].splitlines()]
    assert [(Path(l["image"]).name, l["prompt"]) for l in lines] == [
        (f"{n}.png", p) for n in range(3) for p in ("what is it?", "is there a cat?")]
    assert lines[2]["answer"] == run("--image", "album/1.png", "--prompt", "what is it?")[0].strip()
    got = script(place, "--image", "0.png", "--image", "broken.png", "--jsonl", "--max-new-tokens", "3")
    assert got.returncode == 2 and got.stderr.startswith("error: 1 of 2 pictures could not be read")
    assert {"image", "error"} in [set(json.loads(line)) for line in got.stdout.splitlines()]


def test_chat_remembers_until_reset(run, monkeypatch):
    def chat(text, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        out, errors = run("--chat", "--image", "0.png", *flags)
        return out.splitlines(), errors.splitlines()

    asked = "what is it?"
    fresh, second = chat(f"{asked}\n{asked}\n")[0]
    answers, errors = chat(f"{asked}\n/image gone.png\n/nonsense\n\n/image 1.png\n{asked}\n/reset\n/image 0.png\n{asked}\n")
    assert answers[0] == answers[2] == fresh and len(answers) == 3 and answers[1] != second
    assert errors == ["error: gone.png: no such picture",
                      "error: /nonsense is not known; known: /image FILE, /reset, and Ctrl-D to end"]
    assert chat("", "--prompt", asked)[0] == [fresh]
    assert "do not fit" in chat(f"{asked}\n" * 2, "--max-new-tokens", "300")[1][-1]
    with pytest.raises(UserError, match="stdin, which is at its end"):
        chat("")


SLOWLY = """import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)             # a shell's background jobs ignore it
sys.path.insert(0, {0!r})
import sample
inner, pauses = sample.stream_text, [60]
def slow(tokenizer, ids, stop_strings):
    for piece in inner(tokenizer, ids, stop_strings):
        pause = pauses.pop() if pauses else 0
        yield piece
        time.sleep(pause)                        # until Ctrl-C
sample.stream_text = slow
sample.run_command(sample.main)
"""


@pytest.mark.parametrize("chat", [False, True])
def test_ctrl_c_prints_what_there_is(place, chat):
    """It ends the program with 130; in a chat the answer alone."""
    flags = ["--image", "0.png", "--prompt", "what is it?", "--max-new-tokens", "12", *["--chat"][:chat]]
    process = subprocess.Popen([sys.executable, "-c", SLOWLY.format(str(SCRIPT.parent)), *flags], cwd=place, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begun = os.read(process.stdout.fileno(), 100).decode()                    # streaming: the first word is here already
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate("/reset\nis there a cat?\n" if chat else None, timeout=60)
    said = (begun + rest).splitlines()
    assert said[0] and errors == ""
    assert (process.returncode, len(said)) == ((0, 2) if chat else (130, 1)), said


# ---- attention maps ----

@pytest.mark.parametrize("path", ["eemllm", "llava", "flamingo", "yopo"])
def test_attention_is_that_of_the_rule(path):
    """Weights of a picture's tokens and of text sum to 1; a picture that stands behind gets nothing."""
    model = wide_model(path)
    images, ids = [picture(1), picture(2, 30, 48)], [1, IMAGE, 5, IMAGE, 6]
    answer = list(model.generate(ids, images, max_new_tokens=4))
    heat = attention_map.attention_to_pictures(model, ids, images, answer)
    first, second = (len(prepare_image(image, model.config.vision)[0]) for image in images)
    assert heat.shape[1:] == (4, first + second) and (heat >= 0).all() and (heat.sum(-1) < 1 + 1e-5).all()
    assert len(heat) == {"flamingo": 2, "yopo": 3}.get(path, 4)
    early = attention_map.attention_to_pictures(model, [1, IMAGE, 5, 6], images[:1], answer)
    if path == "flamingo":
        assert (heat[..., :first] == 0).all()                                    # the last picture alone
        torch.testing.assert_close(early.sum(-1), torch.ones(2, 4))           # and nothing but pictures
    else:
        assert (heat.sum(-1) < 1).all() and (heat[..., :first].sum(-1) > 0).all()


def test_pruned_heads_pay_nothing():
    """The mean is over all heads: what two kept heads pay is the sum of what each alone pays."""
    model = wide_model("yopo")
    llama = model.config.llama
    ids, images = [1, IMAGE, 5, 6], [picture(1)]
    heat = {}
    for kept in ((0,), (1,), (0, 1)):
        config = VisualPathConfig("yopo", last_visual_layer=1, kept_heads=(kept,) * llama.num_hidden_layers)
        model.decoder.path = path = make_visual_path(config, llama)
        for layer in model.decoder.layers:
            layer.path = path
        heat[kept] = attention_map.attention_to_pictures(model, ids, images, [9])
    torch.testing.assert_close(heat[0, 1], heat[0,] + heat[1,])


def test_attention_by_hand():
    """One layer, one head group: softmax of q . k over everything before the row that said the word."""
    model = wide_model(layers=1, dtype=torch.float64)
    ids, image = [1, IMAGE, 5, 6], picture(1)
    V = len(prepare_image(image, model.config.vision)[0])
    layer = model.decoder.layers[0]
    kept, taken = {}, {}
    layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: kept.setdefault("q", out))
    layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: taken.setdefault(len(out), out))
    heat = attention_map.attention_to_pictures(model, ids, [image], [9])
    from nanoeemllm.llama import apply_rope, rope_cos_sin
    at = lambda *p: rope_cos_sin(torch.tensor(p), model.config.llama)
    heads, key_heads = model.config.llama.num_attention_heads, model.config.llama.num_key_value_heads
    q = apply_rope(kept["q"].unflatten(-1, (heads, -1)), at(0, V + 1, V + 2))[-1]                              # (H, D)
    k = torch.cat([apply_rope(taken[V].unflatten(-1, (key_heads, -1)), at(*range(1, V + 1))),
                   apply_rope(taken[3].unflatten(-1, (key_heads, -1)), at(0, V + 1, V + 2))]).repeat_interleave(heads // key_heads, 1)
    weights = (torch.einsum("hd,khd->hk", q, k) * q.shape[-1] ** -0.5).softmax(-1).mean(0)
    torch.testing.assert_close(heat[0, 0], weights[:V].float(), rtol=1e-4, atol=1e-6)


def test_the_map_shows_every_word(run, place):
    said = run("--image", "0.png", "--image", "1.png", "--prompt", "what is it?", "--attention", "map.png")[0]
    sheet = Image.open(place / "map.png")
    rows = -(-(len(said.split()) + 1) // 3)                                    # a panel a word, three of two pictures a row
    assert len(said.split()) > 5 and sheet.width > 1000 and rows * 200 <= sheet.height < rows * 200 + 20
    run("--image", "0.png", "--visual-path", "llava", "--attention", "map.png", "--attention-layers", "1")


def test_words_are_put_together_from_tokens():
    class Pieces:
        def decode(self, ids):
            return "".join("a| cat| s|at|.| \n|on".split("|")[i] for i in ids)
    assert attention_map.words_of(Pieces(), list(range(7))) == [("a", [0]), ("cat", [1]), ("sat.", [2, 3, 4]), ("on", [6])]


# ---- charts and benchmarks ----

def test_line_charts_take_what_runs_leave(tmp_path):
    cases = [{"loss": [(n, 3 / (n + 1)) for n in range(100)]}, {"a": [(1, 2), (2, float("nan"))], "b": [(1, -5)]}, {"a": []},
             {"a": [(5, 5)]}, {}]
    for series in cases:
        for log in (False, True):
            line_chart(tmp_path / "chart.png", series, "title", "x", "y", log_x=log, log_y=log)
            assert Image.open(tmp_path / "chart.png").size == (800, 480)
    line_chart(tmp_path / "red.png", {"a": [(0, 0), (1, 1)], "b": [(0, 1), (1, 0)]})
    colours = {colour for _, colour in Image.open(tmp_path / "red.png").getcolors(1 << 20)}
    assert {(31, 119, 180), (214, 39, 40)} <= colours                          # both lines are there


def test_benchmarks_of_every_system(tmp_path, capsys, monkeypatch):
    common = ["--preset", "tiny", "--systems", "all", "--visual", "576", "--text", "40", "--runs", "1", "--device", "cpu",
              "--out", str(tmp_path)]
    monkeypatch.setattr(bench, "best_ms", lambda *args: 1.0)                   # the rates are not what is tested
    bench.main(["prefill", *common])
    rows = {row["system"]: row for row in json.loads((tmp_path / "prefill.json").read_text())["rows"]}
    assert rows["eemllm"]["operations"] < rows["llava"]["operations"] == rows["llava-2024"]["operations"]
    assert "second" in rows["eemllm"] and "second" not in rows["llava"] and rows["eemllm"]["vision"] > 0
    bench.main(["decode", *common, "--tokens", "9"])
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [list(row["seconds"]) for row in rows] == [["2", "8", "9"]] * len(rows) and (tmp_path / "decode.png").is_file()
    shown = capsys.readouterr().out
    assert shown.count("1 x 576") == 16 and "threads" in shown
    with pytest.raises(UserError, match="known are"):
        bench.main(["prefill", *common, "--systems", "x"])
    for flag in ("--runs", "--images", "--text", "--tokens"):
        with pytest.raises(UserError, match=f"{flag}: '0' is no int over 0"):
            bench.main(["prefill", *common, flag, "0"])


def test_scores_in_memory_give_the_same_logits():
    model = wide_model("llava", dtype=torch.float64)
    expected = model.logits([1, IMAGE, 5, 6], [picture(1)])
    with bench_systems.scores_in_memory():
        torch.testing.assert_close(model.logits([1, IMAGE, 5, 6], [picture(1)]), expected, rtol=1e-5, atol=1e-5)


def test_a_question_that_cannot_be_asked_takes_its_pictures_with_it(run, monkeypatch):
    lines = ["/image 0.png"] * 30 + ["what is it?", "is there a cat?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out, errors = run("--chat")
    assert "do not fit the model's context" in errors and errors.count("error:") == 1 and len(out.splitlines()) == 1


def test_output_that_nobody_reads_ends_quietly(place):
    shut = subprocess.run(f"{sys.executable} {SCRIPT} --image album --jsonl | true", shell=True, cwd=place, capture_output=True, text=True)
    assert "Traceback" not in shut.stderr
