"""sample.py as a user runs it."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from nanoeemllm.config import PRESETS, UserError
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.model import EEMLLM
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.toy.world import make_tokenizer
from nanoeemllm.weights.folder import save
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
        initialize(model)
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


def typed(text: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text.encode()))


def script(place, *flags, **how) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], cwd=place, capture_output=True, text=True, timeout=60, **how)


def test_the_command_of_the_readme(place):
    """The newest model with eyes that is no backbone describes the picture."""
    got = script(place, "--image", "0.png", "--max-new-tokens", "12")
    assert got.returncode == 0 and len(got.stdout.split()) > 2 and got.stderr == ""
    (place / "out" / "gone").mkdir(exist_ok=True)
    (place / "out" / "gone" / "config.json").symlink_to("nowhere")
    assert sample.newest_model(place / "out") == place / "out" / "finetune"


@pytest.mark.parametrize("flags, what", [
    (["--prompt", ""], "--prompt is empty: ask something"), ([], "nothing to answer"),
    (["--image", "gone.png"], "gone.png: no such file"), (["--image", "broken.png"], "broken.png: not a picture"),
    (["--image", "out/finetune/config.json"], "config.json: not a picture"), (["--image", "album"], "is a folder: add --jsonl"),
    (["--image", "0.png", "--image", "album/../0.png"], "named twice"),
    (["--prompt", "hi", "--temperature", "-1"], "temperature is -1.0; it must be from 0"),
    (["--prompt", "hi", "--top-p", "0"], "top-p is 0.0"), (["--prompt", "hi", "--max-new-tokens", "0"], "--max-new-tokens: '0' is no int over 0"),
    (["--prompt", "hi", "--max-new-tokens", "600"], "and 600 new ones do not fit the model's context of 512"),
    (["--prompt", "<image> <image> hi", "--image", "0.png"], r"holds 2 <image> but 1 picture\(s\)"),
    (["--prompt", "hi", "--attention", "map.png"], "--attention shows where the model looks in a picture: name one"),
    (["--image", "0.png", "--attention", "no/map.png"], "cannot write no/map.png: No such file"), (["--image", "0.png", "--attention", "album"], "cannot write album: it is there and is not a regular file"),
    (["--image", "0.png", "--attention", "map.png", "--attention-layers", "x"], "give layers as in"),
    (["--image", "0.png", "--attention", "map.png", "--attention-layers", "1-9"], "2 layers look at the picture"),
    (["--image", "0.png", "--attention", "map.png", "--chat"], "--chat: not allowed with argument --attention"),
    (["--prompt", "hi", "--weights", "nowhere"], "nowhere/config.json: no such file"),
    (["--image", "0.png", "--weights", "out/text"], "this model has no image encoder"),
    (["--prompt", "hi", "--device", "cuda:77"], "cuda:77: there is none here"), (["--jsonl", "--prompt", "hi"], "--jsonl answers for each"),
    (["--prompt", "caf\udce9"], "not UTF-8"), (["--image", "0.png", "--attention-layers", "1"], "give it a file"),
    (["--image", "x" * 300 + ".png"], "File name too long"), (["--image", "0.png", "--jsonl", "--stats"], "leave --jsonl out"),
    (["--prompt", "hi", "--seed", str(2 ** 70)], "up to 2,147,483,648"), (["--prompt", "hi", "--temperature", "inf"], "from 0 to"),
    (["--image", "out", "--jsonl"], "no pictures in this folder"), (["--prompt", "hi", "--stop", ""], "stop string is empty")])
def test_bad_input_is_one_clear_line(run, flags, what):
    with pytest.raises(UserError, match=what) as error:
        run(*flags)
    assert "\n" not in str(error.value)


def test_exit_codes_and_no_traceback(place, tmp_path):
    shutil.copy(SCRIPT, tmp_path)                       # with no out/ beside it
    got = subprocess.run([sys.executable, "sample.py", "--image", place / "0.png"], cwd=tmp_path,
                         capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)})
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


def test_sampling_at_the_edge_is_the_likeliest_token_or_refused(run):
    likeliest = run("--image", "0.png")[0]
    assert run("--image", "0.png", "--temperature", "1e-50")[0] == likeliest
    assert run("--image", "0.png", "--temperature", "1", "--top-p", "1e-50")[0] == likeliest
    with pytest.raises(UserError, match="repetition-penalty is 1e-50"):
        run("--image", "0.png", "--repetition-penalty", "1e-50")


def test_an_example_picture_by_its_name(place, run, monkeypatch, capfd):
    """From any folder; a file of that name here comes first."""
    cat = str(sample.ASSETS / "cat.png")
    expected = run("--image", cat)[0]
    got = script(place, "--image", "cat.png", "--max-new-tokens", "12")
    assert (got.returncode, got.stdout) == (0, expected)
    assert got.stderr == f"cat.png is no file here: taking the example {cat}\n"
    assert run("--image", "cat.png", "--jsonl")[0].count("answer") == 1
    monkeypatch.setattr(sys, "stdin", typed("/image cat.png\nwhat is it?\n"))
    assert "taking the example" in run("--chat")[1]
    for name in ("no/cat.png", "dog.png"):
        with pytest.raises(UserError, match="no such file"):
            run("--image", name)
    shutil.copy("0.png", "cat.png")
    assert run("--image", "cat.png") == (run("--image", "0.png")[0], "")
    os.unlink("cat.png")


def test_the_model_beside_the_script_is_taken_where_there_is_none_here(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "MODELS", (Path("out"), place / "out"))
    sample.main(["--image", "cat.png", "--max-new-tokens", "2"])


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
        monkeypatch.setattr(sys, "stdin", typed(text))
        out, errors = run("--chat", "--image", "0.png", *flags)
        return out.splitlines(), errors.splitlines()

    asked = "what is it?"
    fresh, second = chat(f"{asked}\n{asked}\n")[0]
    answers, errors = chat(f"{asked}\n/image gone.png\n/nonsense\n\n/image 1.png\n{asked}\n/reset\n/image 0.png\n{asked}\n")
    assert answers[0] == answers[2] == fresh and len(answers) == 3 and answers[1] != second
    assert errors == ["error: gone.png: no such file",
                      "error: /nonsense is not known; known: /image FILE, /reset, and Ctrl-D to end"]
    assert chat("", "--prompt", asked)[0] == [fresh]
    assert "do not fit" in chat(f"{asked}\n" * 2, "--max-new-tokens", "300")[1][-1]
    with pytest.raises(UserError, match="stdin, which is closed or at its end"):
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


def test_the_map_shows_every_word(run, place):
    said = run("--image", "0.png", "--image", "1.png", "--prompt", "what is it?", "--attention", "map.png")[0]
    sheet = Image.open(place / "map.png")
    rows = -(-(len(said.split()) + 1) // 3)                                    # a panel a word, three of two pictures a row
    assert len(said.split()) > 5 and sheet.width > 1000 and rows * 200 <= sheet.height < rows * 200 + 20
    run("--image", "0.png", "--visual-path", "llava", "--attention", "map.png", "--attention-layers", "1")


def test_a_question_that_cannot_be_asked_takes_its_pictures_with_it(run, monkeypatch):
    lines = ["/image 0.png"] * 30 + ["what is it?", "is there a cat?"]
    monkeypatch.setattr(sys, "stdin", typed("\n".join(lines)))
    out, errors = run("--chat")
    assert "do not fit the model's context" in errors and errors.count("error:") == 1 and len(out.splitlines()) == 1


def test_output_that_nobody_reads_ends_quietly(place):
    shut = subprocess.run(f"{sys.executable} {SCRIPT} --image album --jsonl | true", shell=True, cwd=place, capture_output=True, text=True)
    assert "Traceback" not in shut.stderr


def test_output_and_places_that_cannot_be_written(place, tmp_path):
    def shell(command):
        return subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True,
                              env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})

    ask = f"{sys.executable} {SCRIPT} --image 0.png --max-new-tokens 3"
    full = shell(f"{ask} > /dev/full")
    assert full.returncode == 2 and full.stderr.startswith("error: ") and full.stderr.count("\n") == 1
    assert shell(f"{ask} >&- 2>&-").returncode == 0
    assert shell(f"{ask} --jsonl --prompt 猫").returncode == 0           # an ASCII terminal
    nowhere = shell(f"{ask} --attention /proc/map.png")
    assert nowhere.returncode == 2 and "cannot write /proc/map.png" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr
