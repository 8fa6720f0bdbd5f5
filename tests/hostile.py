"""Hostile inputs by rule, kinds x places: none may end in a traceback, hang, or harm what was saved.

    python tests/hostile.py FOLDER              runs a third of the cases, prints those that fail
    python tests/hostile.py FOLDER WORDS 1      all whose names hold WORDS; "" are all 2,000

One process imports everything once; every case is a fork of it that runs a command as its file is run,
`__main__` and all, in a folder of its own. FOLDER/results.json says how each ended.
"""

import base64
import ctypes
import faulthandler
import io
import itertools
import json
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

SECONDS = 20
LONG = "x" * 300
LLM, VISION = "llama3", "siglip_vision"             # of tests/golden/sources


class Case(NamedTuple):
    name: str                       # its group / kind
    command: list[str]              # the command and its flags, in the case's folder
    change: Callable | None = None  # change(folder) makes it hostile
    exits: tuple[int, ...] = (2,)
    stdout: str = ""                # "full", "closed" or "left"; "": a file
    stderr: str = ""
    environment: dict = {}
    notes: bool = False             # more lines may stand before the error's


COMMANDS = {"sample": "sample.py", "train": "train.py", "convert": "convert_weights.py", "evaluate": "nanoeemllm.evaluation",
            "toy": "nanoeemllm.toy", "tables": "nanoeemllm.toy.tables", "bench": "nanoeemllm.bench"}

SAMPLE = "sample --weights model --image images/a.png --prompt two --max-new-tokens 2".split()
TEXT = "sample --weights model --prompt two --max-new-tokens 2".split()
EVALUATE = "evaluate --weights model --tsv q.tsv --images images --out answers --max-new-tokens 2".split()
TRAIN = ("train --stage pretrain --init model --data data.json --images images --steps 2 --batch-size 2 --workers 0 --out out "
         "--device cpu").split()
RESUME = [*TRAIN[:-3], "trained", "--device", "cpu", "--resume"]
CONVERT = "convert --llm llm --vision vision --out new".split()
TABLES = "tables paths --draw --results results.json".split()
OPERATIONS = "bench operations --preset tiny".split()


# ---- the folder that every case gets ----

def make_place(place: Path):
    """A model, pictures, conversations, questions, answers, a finished run, and published folders."""
    from PIL import Image
    from nanoeemllm.toy.tables import SETTINGS
    from nanoeemllm.weights import folder as weights
    from tiny_run import tiny_model
    model = tiny_model()
    weights.save(model.state_dict(), model.config, model.tokenizer, place / "model")
    (place / "images" / "sub").mkdir(parents=True)
    (place / "elsewhere" / "deep").mkdir(parents=True)
    (place / "images" / "link").symlink_to(place / "elsewhere" / "deep")
    for name in ("images/a.png", "secret.png", "elsewhere/secret.png"):
        Image.new("RGB", (24, 16), "red").save(place / name)
    write(place / "data.json", json.dumps([conversation(f"{i}", "a.png") for i in range(4)]))
    write(place / "q.tsv", questions("a.png"))
    write(place / "results.json", json.dumps({"settings": SETTINGS, "runs": {}, "prefill_ms": {}}, indent=1))
    for name, source in (("llm", LLM), ("vision", VISION)):
        shutil.copytree(ROOT / "tests" / "golden" / "sources" / source, place / name)
    for flags in (EVALUATE, [*RESUME[:-1]]):
        ended = run(Case("place", flags, exits=(0,)), place)
        assert ended["exit"] == 0, ended
    shutil.copytree(place / "trained", place / "stopped")
    (place / "stopped" / "pretrain-run" / "finished").unlink()


def conversation(key: str, image) -> dict:
    return {"id": key, "image": image, "conversations": [{"from": "human", "value": "<image>\ntwo"}, {"from": "gpt", "value": "two"}]}


def questions(path: str, **cells) -> str:
    row = {"index": "0", "image_path": path, "question": "two", "answer": "two"} | cells
    return "\t".join(row) + "\n" + "\t".join(row.values()) + "\n"


def write(path: Path, data: str | bytes):
    """Anew: the folder's files are links to those of all cases."""
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode(errors="surrogateescape"))


def replaced(name: str, data: str | bytes) -> Callable:
    return lambda place: write(place / name, data)


def remove(path: Path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


# ---- kinds ----

NOT_JSON = {
    "empty": "", "cut": '{"a": ', "deep list": "[" * 100_000, "deep object": '{"a":' * 100_000, "NaN": '{"a": NaN}', "infinity": '{"a": 1e999}',
    "huge integer": '{"a": ' + "9" * 5000 + "}", "not UTF-8": b'{"a": "\xff"}', "zero bytes": b"\0" * 64, "a number": "3", "null": "null",
    "a string": '"x"', "list of lists": "[[]]", "list of numbers": "[1, 2]", "lone surrogate": '{"\\ud800": "\\ud800"}', "control": '{"\\n\\u001b[31m": 1}'}


def special(name: str) -> dict[str, Callable]:
    """What is no regular file, in the place of one."""
    def instead(make: Callable):
        def change(place: Path):
            remove(place / name)
            make(place / name)
        return change

    def folder(path: Path):
        path.mkdir()
        (path / "x").write_text("x")

    kinds = {"FIFO": os.mkfifo, "folder": folder, "absent": lambda path: None, "loop": lambda path: path.symlink_to(path.name),
             "dangling": lambda path: path.symlink_to("nowhere"), "zero": lambda path: path.symlink_to("/dev/zero"),
             "without rights": lambda path: (path.write_text("x"), path.chmod(0)), "stdin": lambda path: path.symlink_to("/dev/stdin"), "memory": lambda path: path.symlink_to("/proc/self/mem")}
    return {kind: instead(make) for kind, make in kinds.items()}


HOSTILE = {"zero": 0, "negative": -1, "1e12": 10 ** 12, "2^63": 2 ** 63, "half": 0.5, "1e308": 1e308, "nan": float("nan"), "infinity": float("inf"),
           "true": True, "text": "12", "null": None, "list": [], "object": {}, "deep": [[[[[1]]]]], "huge": 10 ** 4000}
FLAGS = ["0", "-1", "nan", "inf", "1e308", "1e12", "9" * 5000, "2147483648", "", "x", "1.5", "0x10", "1 2"]


def config_cases():
    """Every number of config.json x what is none, or out of its range."""
    from tiny_run import tiny_model
    config = tiny_model().config.to_dict()
    config["llama"]["rope_scaling"] = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    config["other_paths"] = [{"name": "yopo"}]
    for place in itertools.chain(leaves(config), [("llama",), ("visual_path",), ("visual_path", "name"), ("llama", "rope_scaling")]):
        *above, key = place
        held = at(config, place)
        for kind, value in HOSTILE.items():
            fits = value is None and key in ("rope_scaling", "vision", "bos_token_ids") or isinstance(value, list) and isinstance(held, (list, tuple))
            fits |= isinstance(held, float) and kind in ("half", "zero" if key.startswith("image_") else "half", "1e12") or type(held) is type(value) in (str, bool)
            fits |= isinstance(held, int) and not isinstance(held, bool) and kind == "zero" and "token_ids" in place
            if not fits or kind == "deep":
                changed = json.loads(json.dumps(config))
                at(changed, above)[key] = value
                exits = (0, 2) if isinstance(held, float) and kind == "2^63" else (2,)
                yield Case(f"config/{'.'.join(map(str, place))} {kind}", TEXT, replaced("model/config.json", json.dumps(changed)), exits)
        if isinstance(held, dict):
            for inner in held:
                changed = json.loads(json.dumps(config))
                at(changed, place)["unknown" + inner] = at(changed, place).pop(inner)
                yield Case(f"config/{'.'.join(map(str, place))} renamed {inner}", TEXT, replaced("model/config.json", json.dumps(changed)))


def leaves(data, above=()):
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*above, key))
    elif isinstance(data, (int, float)):
        yield above


def at(data, place):
    for key in place:
        data = data[key]
    return data


def file_cases():
    """Every file that is read x what is no such file."""
    jsons = {"model/config.json": (TEXT, EVALUATE, TRAIN), "model/tokenizer.json": (TEXT,), "data.json": (TRAIN,), "llm/config.json": (CONVERT,),
             "llm/generation_config.json": (CONVERT,), "llm/tokenizer.json": (CONVERT,), "vision/config.json": (CONVERT,),
             "model/model.safetensors.index.json": (TEXT,), "results.json": (TABLES,), "trained/pretrain-run/run.json": (RESUME,),
             "answers/predictions-0.jsonl": (EVALUATE,), "q.tsv": (EVALUATE,)}
    fine = {"model/model.safetensors.index.json": ("absent",), "llm/generation_config.json": ("absent", "control", "lone surrogate"),
            "results.json": ("absent",), "answers/predictions-0.jsonl": ("absent", "empty")}
    for (file, commands), other in itertools.product(jsons.items(), ("", "special")):
        for kind, change in (special(file) if other else {kind: replaced(file, text) for kind, text in NOT_JSON.items()}).items():
            exits = (0, 2) if kind in (*fine.get(file, ()), "dangling") and file in fine else (2,)
            if file == "trained/pretrain-run/run.json" and kind in ("dangling", "absent"):
                continue                                        # then it is a folder with no run
            if file == "answers/predictions-0.jsonl" and not other:
                exits = (0, 2)                                  # a torn line is asked again
            for command in commands:
                yield Case(f"file/{command[0]} {file} {kind}", command, change, exits, notes=file == "data.json")
    shard = "model/model-00001-of-00001.safetensors"
    for kind, change in special("images/a.png").items():
        yield Case(f"file/picture {kind}", SAMPLE, change)
        yield Case(f"file/picture of a row {kind}", EVALUATE, lambda place, change=change: (change(place), remove(place / "answers")), notes=True)
        yield Case(f"file/picture to train on {kind}", TRAIN, change, notes=True)
    for kind, change in special(shard).items():
        yield Case(f"file/weights {kind}", TEXT, change)
    for kind, change in special("llm/model.safetensors").items():
        yield Case(f"file/published weights {kind}", CONVERT, change)
    for kind, change in special("stopped/pretrain-run/run.json").items():
        if kind not in ("absent", "dangling"):
            yield Case(f"file/run {kind}", ["stopped" if word == "trained" else word for word in RESUME], change)
    for kind, data in {"empty": b"", "short": b"\x89PNG\r\n\x1a\n", "text": b"hello", "zero": b"\0" * 1000, "gif": b"GIF89a\xff\xff\xff\xff"}.items():
        yield Case(f"file/picture bytes {kind}", SAMPLE, replaced("images/a.png", data))


def record_cases():
    """Nested JSON: records of conversations, predictions and results that are something else."""
    odd = [[], 3, "x", None, True, {}, [[]], {"a": []}, 1e308]
    for value in odd:
        text = json.dumps(value)
        yield Case(f"record/conversation {text}", TRAIN, replaced("data.json", f"[{text}]"), notes=True)
        for key in ("id", "image", "conversations"):
            entry = conversation("0", "a.png") | {key: value}
            yield Case(f"record/conversation {key} {text}", TRAIN, replaced("data.json", json.dumps([entry])), (0, 2) if key == "id" else (2,), notes=True)
        for key in ("from", "value"):
            entry = conversation("0", "a.png")
            entry["conversations"][0][key] = value
            yield Case(f"record/turn {key} {text}", TRAIN, replaced("data.json", json.dumps([entry])), (0, 2) if value == "x" else (2,), notes=True)
        yield Case(f"record/results runs {text}", TABLES, change_json("results.json", ("runs",), value), (0, 2) if value == {} else (2,))
        for place in (("runs",), ("prefill_ms",)):
            inner = {"runs": {"llava_64px_seed0": value}, "prefill_ms": {"llava, 64 visual tokens": value}}[place[0]]
            inner = {"llava_64px_seed0": {"accuracy": value}} if place[0] == "runs" and value == 3 else inner
            good = value == 3
            yield Case(f"record/results {place[0]} of {text}", TABLES, change_json("results.json", place, inner), (0,) if good else (2,))
        yield Case(f"record/results settings {text}", TABLES, change_json("results.json", ("settings",), value))
        yield Case(f"record/weight map {text}", TEXT, change_json("model/model.safetensors.index.json", ("weight_map",), value))
        yield Case(f"record/weight map of {text}", TEXT, change_json("model/model.safetensors.index.json", ("weight_map", "a"), value))
        yield Case(f"record/answers {text}", EVALUATE, prediction(lambda record: value))
        for key in ("row", "index", "prediction", "score", "answer", "read"):
            harmless = key == "read" or (key == "row" and value is True) or (key == "index" and value == "x") or (key == "prediction" and value == "x")
            harmless |= key == "score" and value is True or key == "answer" and value in ([], {}, "x") or key == "answer"
            yield Case(f"record/answer {key} {text}", EVALUATE, prediction(lambda record, key=key: record | {key: value}), (0, 2) if harmless else (2,))
        if value is not None:
            for key in ("rope_scaling", "rope_parameters", "vocab_size", "eos_token_id", "architectures", "torch_dtype", "num_hidden_layers"):
                fine = key in ("eos_token_id", "torch_dtype") or key.startswith("rope_") and isinstance(value, dict)
                yield Case(f"record/published {key} {text}", CONVERT, change_json("llm/config.json", (key,), value), (0, 2) if fine else (2,))
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        yield Case(f"record/rope_scaling without {key}", TEXT, change_json("model/config.json", ("llama", "rope_scaling"), {key: 1}))
        yield Case(f"record/published rope_scaling without {key}", CONVERT, change_json("llm/config.json", ("rope_scaling",), {"rope_type": "llama3", key: 1}))


def change_json(file: str, place: tuple, value) -> Callable:
    def change(folder: Path):
        data = json.loads((folder / file).read_text())
        at(data, place[:-1])[place[-1]] = value
        write(folder / file, json.dumps(data))
    return change


def prediction(make: Callable) -> Callable:
    def change(folder: Path):
        file = folder / "answers" / "predictions-0.jsonl"
        head, record = file.read_text().splitlines()
        write(file, head + "\n" + json.dumps(make(json.loads(record))) + "\n")
    return change


def flag_cases():
    """Every flag that takes a number x what is none, or out of its range; and the environment."""
    numbers = {("sample", *TEXT[1:]): "--max-new-tokens --seed --temperature --top-k --top-p --min-p --repetition-penalty",
               tuple(TRAIN): "--steps --batch-size --lr --seed --checkpoint-every --max-length --micro-batch-tokens --workers --max-bad --gpus --mfu --assume",
               tuple(EVALUATE): "--limit --max-new-tokens --batch-tokens", ("toy", "--export", "new"): "-n --picture-size --max-things --seed",
               tuple(TABLES): "--seeds", ("bench", "prefill", "--out", "new"): "--visual --images --text --tokens --runs",
               ("bench", "train"): "--visual --text --samples --steps", tuple(OPERATIONS): "--composite-layers --every --window --last-visual-layer --begin"}
    for command, flags in numbers.items():
        for flag, value in itertools.product(flags.split(), FLAGS):
            legal = (flag in ("--seed", "--workers", "--max-bad", "--temperature", "--top-k", "--min-p", "--composite-layers") and value == "0"
                     or value == "1.5" and flag in ("--temperature", "--lr", "--repetition-penalty") or value == "2147483648" and flag in ("--top-k", "--seed"))
            if not legal:
                yield Case(f"flag/{' '.join(command[:2])} {flag} {value:.20}", [*command, f"{flag}={value}"])
    for extra in ("--composite-layers 0-999999999999", "--composite-layers 5-1", "--composite-layers ,", "--composite-layers 999"):
        yield Case(f"flag/{extra}", [*SAMPLE, "--visual-path", "eemllm-f", *extra.split()])
    for name in ("data.json:1e308", "data.json:nan", "data.json:0", "data.json:-1", "data.json:inf", "data.json:1e-308", ":", "data.json:", LONG, "a\nb.json"):
        yield Case(f"flag/--data {name:.20}", [*TRAIN[:-8], "--batch-size", "2", "--out", "out", "--data", name, "--data", "data.json:1", "--workers", "0"],
                   exits=(2,), notes=True)
    for steps in ("2147483647", "99999999999"):
        yield Case(f"flag/--steps {steps}", [*TRAIN, "--steps", steps])
    yield Case("flag/--steps 99999999 looked at", [*TRAIN, "--steps", "99999999", "--dry-run"], exits=(0,))
    for name, value in itertools.product(("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("abc", "-3", "", "1e3", "1.5", "9" * 5000, "7", "\u0663")):
        if (name, value) != ("LOCAL_WORLD_SIZE", "7"):
            yield Case(f"environment/train {name}={value:.9}", TRAIN, environment={name: value})
        if name != "LOCAL_WORLD_SIZE":
            yield Case(f"environment/evaluate {name}={value:.9}", EVALUATE, environment={name: value})
    for flag, value in itertools.product(("temperature", "top-p", "min-p", "repetition-penalty"), ("1e-50", "5e-324", "1e-6", "0.999999999", "1e6")):
        yield Case(f"flag/edge --{flag} {value}", [*SAMPLE, "--temperature", "1", f"--{flag}", value], exits=(0, 2))


def weight_cases():
    """Tensors that are not finite, too many, too few; files that are cut."""
    from safetensors.torch import load_file, save_file
    import torch
    file, index = "model/model-00001-of-00001.safetensors", "model/model.safetensors.index.json"

    def tensors(function: Callable):
        def change(place: Path):
            held = {name: x.clone() for name, x in load_file(place / file).items()}
            function(held)
            remove(place / file)
            remove(place / index)
            save_file(held, place / "model" / "model.safetensors")
        return change

    for part, number, how in itertools.product(("embed_tokens", "lm_head", "layers.0.self_attn.q", "projector", "norm"), ("nan", "inf", "-inf"), ([], ["--temperature", "1"])):
        def spoil(held, part=part, number=number):
            for name in held:
                if part in name:
                    held[name].flatten()[:] = float(number)
        yield Case(f"weights/{part} {number} {how}", [*SAMPLE, *how], tensors(spoil))
    more = {"empty": torch.zeros(0), "scalar": torch.zeros(()), "integers": torch.zeros(3, dtype=torch.int64), "empty integers": torch.zeros(0, dtype=torch.int32)}
    for kind, x in more.items():
        yield Case(f"weights/extra {kind}", TEXT, tensors(lambda held, x=x: held.update(extra=x)))
    yield Case("weights/one less", TEXT, tensors(lambda held: held.pop(next(iter(held)))))
    yield Case("weights/none", TEXT, tensors(lambda held: held.clear()))
    for dtype in (torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield Case(f"weights/{dtype}", TEXT, tensors(lambda held, dtype=dtype: held.update({name: x.to(dtype) for name, x in held.items()})))
    headers = {"no JSON": b"{" * 8, "deep": b"[" * 1000, "list": b"[]", "begins beyond": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[99,103]}}',
               "negative": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "huge": b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}'}
    for name, command in ((file, TEXT), ("llm/model.safetensors", CONVERT)):
        for kind, header in headers.items():
            yield Case(f"weights/{name} header {kind}", command, replaced(name, struct.pack("<Q", len(header)) + header))
        for length in (0, 4, 2 ** 40, 2 ** 64 - 1):
            yield Case(f"weights/{name} header of {length}", command, replaced(name, struct.pack("<Q", length)))
        for size in (1, 7, 100, 5000):
            yield Case(f"weights/{name} cut at {size}", command, lambda place, name=name, size=size: write(place / name, (place / name).read_bytes()[:size]))
    for name in ("../model/x.safetensors", "/etc/passwd", "none.safetensors", "", "a\nb", LONG, "config.json"):
        yield Case(f"weights/index names {name[:20]!r}", TEXT, change_json(index, ("weight_map", "a"), name))


def tokenizer_cases():
    """Tokenizers whose library raises or panics, on loading or at the first word."""
    words = {"two": 0, "</s>": 1}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    hostile = {
        "no unknown token": {}, "no vocabulary": {"model": model | {"vocab": {}}}, "no model": {"model": None}, "model of no kind": {"model": {"type": "X"}},
        "a token of id 2^32": {"model": model | {"vocab": {"two": 2 ** 32, "</s>": 1}}}, "a token of id 2^31": {"model": model | {"vocab": {"two": 2 ** 31, "</s>": 1}}},
        "a negative id": {"model": model | {"vocab": {"two": -1}}},
        "an expression that is none": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        "an expression without an end": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*" * 30 + "b"}, "behavior": "Isolated", "invert": False}},
        "a broken normalizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "a normalizer of no kind": {"normalizer": {"type": "X"}}, "a normalizer that is a list": {"normalizer": []},
        "a decoder of no kind": {"decoder": {"type": "X"}}, "merges of nothing": {"model": {"type": "BPE", "vocab": words, "merges": [["x", "y"]]}},
        "merges that are numbers": {"model": {"type": "BPE", "vocab": words, "merges": [[1, 2]]}}, "Unigram of nothing": {"model": {"type": "Unigram", "vocab": [], "unk_id": 0}},
        "Unigram without unknown": {"model": {"type": "Unigram", "vocab": [["two", 0.0], ["</s>", 0.0]], "unk_id": None}},
        "Unigram of NaN": {"model": {"type": "Unigram", "vocab": [["two", -1e308], ["</s>", 0.0]], "unk_id": 7}},
        "WordPiece without unknown": {"model": {"type": "WordPiece", "vocab": words, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0}},
        "byte fallback without bytes": {"model": {"type": "BPE", "vocab": words, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}},
        "added tokens that are strings": {"added_tokens": ["x"]}, "an added token of id 2^32": {"added_tokens": [{"id": 2 ** 32, "content": "x"}]},
        "no end token": {"model": model | {"vocab": {"two": 0, "<unk>": 1}}}, "ids beyond the model": {"model": model | {"vocab": {"two": 0, "<unk>": 5000, "</s>": 2}}}}
    for kind, parts in hostile.items():
        data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
                "post_processor": None, "decoder": None, "model": model} | parts
        for name, command in (("model/tokenizer.json", TEXT), ("llm/tokenizer.json", CONVERT), ("model/tokenizer.json", TRAIN)):
            exits = (0, 2) if kind == "ids beyond the model" and command is CONVERT else (2,)      # refused where it is used
            yield Case(f"tokenizer/{command[0]} {kind}", command, replaced(name, json.dumps(data)), exits)


def path_cases():
    """Names that lead out of the folder of pictures, that are too long, or that no system has."""
    for name in ("../secret.png", "link/../secret.png", "sub/../../secret.png", "/etc/passwd", "{place}/secret.png", "..", ".", "", LONG, "a/" * 3000, "a\0.png", "a.png/x",
                 "\x1b[31m\n.png", "link/../../../../../../etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "~/a.png", "caf\udce9.png"):
        def rows(place, name=name):
            remove(place / "answers")
            write(place / "q.tsv", questions(name.replace("{place}", str(place))))

        def entries(place, name=name):
            write(place / "data.json", json.dumps([conversation("0", name.replace("{place}", str(place)))]))
        yield Case(f"path/row {name[:30]!r}", EVALUATE, rows, notes=True)
        yield Case(f"path/conversation {name[:30]!r}", TRAIN, entries, notes=True)
        if "secret" not in name and "\0" not in name and name != "caf\udce9.png":
            yield Case(f"path/sample {name[:30]!r}", [*SAMPLE[:-5], "--image", name, *SAMPLE[-4:]], exits=(2,), notes=True)
    for cells in ({"index": "x" * 100_000}, {"question": ""}, {"answer": ""}, {"image_path": "[" * 90_000}, {"image_path": "['a.png'"}, {"answer": "[" * 90_000},
                  {"image": "7"}, {"image": "!" * 100}, {"image": "A" * 101}, {"image": "[" * 1000}, {"image": base64.b64encode(b"GIF89a").decode() * 20}, {"question": '"open'}, {"question": "\0"}):
        key, value = next(iter(cells.items()))
        fine = key in ("index", "answer") and value or value == "\0" or value == "['a.png'"
        yield Case(f"path/cell {key} {value[:12]!r}", EVALUATE,
                   lambda place, cells=cells: (remove(place / "answers"), write(place / "q.tsv", questions("a.png", **cells))), (0, 2) if fine else (2,), notes=True)


def output_cases():
    """Places that cannot be written, output that goes away, a working directory that is gone."""
    places = {"under a file": "data.json/new", "under a device": "/dev/null/new", "in proc": "/proc/new", "too long": LONG, "zero byte": "a\0b", "under a loop": "loop/new",
              "a FIFO": "fifo", "under a FIFO": "fifo/new", "without rights": "locked/new", "control": "locked/\x1b[31m\n"}
    writers = {"sample --attention": (SAMPLE, "--attention"), "train --out": (TRAIN, "--out"), "evaluate --out": (EVALUATE, "--out"), "convert --out": (CONVERT, "--out"),
               "tables --results": (TABLES, "--results"), "tables --out": (["tables", "data", "--results", "results.json"], "--out"),
               "toy --export": (["toy", "-n", "1"], "--export"), "toy --export-tsv": (["toy", "-n", "1"], "--export-tsv"), "bench --out": (["bench", "prefill"], "--out")}

    def odd(place: Path):
        os.mkfifo(place / "fifo")
        (place / "loop").symlink_to("loop")
        (place / "locked").mkdir()
        (place / "locked").chmod(0o555)

    for (name, (command, flag)), (kind, where) in itertools.product(writers.items(), places.items()):
        if where != "fifo" or flag not in ("--results", "--attention"):
            is_seen = name == "tables --results" and kind not in ("a FIFO", "under a file") and kind != "control"
            if "\0" in where:
                continue                                        # no shell can pass it on
            yield Case(f"output/{name} {kind}", [*command, flag, where], odd, (0, 2) if is_seen else (2,), notes=True)
    commands = {"sample": SAMPLE, "train": TRAIN, "evaluate": EVALUATE, "convert": CONVERT, "tables": TABLES, "toy": ["toy", "--export", "new", "-n", "2"], "bench": "bench train --paths llava --stages pretrain --visual 4 --samples 1 --steps 1".split()}
    for name, command in commands.items():
        for kind in ("full",) if name == "bench" else ("full", "closed", "left"):   # it takes seconds
            exits = {"full": (2,), "closed": (0,), "left": (0,)}[kind]
            yield Case(f"output/{name} stdout {kind}", command, stdout=kind, exits=(0, 2) if (name, kind) == ("train", "full") else exits, notes=True)
            yield Case(f"output/{name} stderr {kind}", command, stderr=kind, exits=(0,))
            yield Case(f"output/{name} refused, stderr {kind}", [*command, "--unknown"], stderr=kind)
        if name != "bench":
            yield Case(f"output/{name} both closed", command, stdout="closed", stderr="closed", exits=(0,))
            yield Case(f"output/{name} in ASCII", command, environment={"PYTHONIOENCODING": "ascii"}, exits=(0,), notes=True)
        yield Case(f"output/{name} refused in ASCII", [*command, "--\u732b"], environment={"PYTHONIOENCODING": "ascii"})
        yield Case(f"output/{name} in a folder that is gone", command, lambda place: shutil.rmtree(place))


CASES = (config_cases, file_cases, record_cases, flag_cases, weight_cases, tokenizer_cases, path_cases, output_cases)


# ---- running ----

def run(case: Case, place: Path) -> dict:
    """exit, seconds, stdout and stderr of a case, in a process of its own; exit None: it was still running after SECONDS."""
    files = [place.parent / f"{place.name}.{name}" for name in ("out", "err")]
    start, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            _command(case, place, files)
        finally:
            os._exit(99)
    code = None
    while code is None and time.monotonic() - start < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else None
        time.sleep(0.002)
    if code is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    out, err = [file.read_bytes().decode(errors="replace") for file in files]
    for file in files:
        file.unlink()
    return {"name": case.name, "exit": code, "seconds": round(time.monotonic() - start, 2), "stdout": out[-2000:], "stderr": err}


def _command(case: Case, place: Path, files: list[Path]):
    """What Python does from its start to its end, in a fork: streams, the command's file, the exit code."""
    os.setsid()
    os.chdir(place)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    if sys.platform == "linux":                     # root, too, is held to the rights of files: no capabilities
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    os.environ |= case.environment
    for number, (kind, file) in enumerate(zip((case.stdout, case.stderr), files), 1):
        _redirect(number, kind, file)
    os.close(0)
    assert os.open("/dev/null", os.O_RDONLY) == 0
    if case.change and "gone" in case.name:
        case.change(place)
    command, *sys.argv[1:] = case.command
    code = 0
    faulthandler.dump_traceback_later(SECONDS - 2, file=open(files[1], "a"))        # where it hangs
    try:
        target = COMMANDS[command]
        if target.endswith(".py"):
            sys.argv[0] = str(ROOT / target)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        code = 1
        traceback.print_exc(file=open(files[1], "a"))
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            code = 120
    os._exit(code)


def _redirect(number: int, kind: str, file: Path):
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    if kind == "full":
        handle = os.open("/dev/full", os.O_WRONLY)
    elif kind == "left":
        reader, handle = os.pipe()
        os.close(reader)
    name = ("stdin", "stdout", "stderr")[number]
    os.dup2(handle, number)
    os.close(handle)
    stream = None
    if kind == "closed":
        os.close(number)
    else:
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        errors = "backslashreplace" if number == 2 else "strict"
        stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), encoding, errors, line_buffering=number == 2)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def held(place: Path) -> dict:
    """name -> what it is, of everything in a folder."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = path.read_bytes() if os.access(path, os.R_OK) else "locked"
        else:
            found[str(path)] = "folder or special"
    return found


def wrong(case: Case, ended: dict, before: dict, after: dict) -> str:
    """Why a case did not end as it must; "" if it did."""
    lines = ended["stderr"].splitlines()
    if ended["exit"] is None:
        return f"still running after {SECONDS} s"
    if "Traceback" in ended["stderr"] + ended["stdout"] or "panicked" in ended["stderr"]:
        return "traceback"
    if ended["exit"] not in case.exits:
        return f"exit code {ended['exit']}, not {case.exits}"
    if ended["exit"] == 2 and not case.stderr:
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or lines[-1] != errors[0] or (len(lines) > 1 and not case.notes):
            return f"{len(lines)} lines on stderr"
        if not lines[-1].isprintable():
            return "control characters"
    changed = [name for name in before if before[name] != after.get(name)]
    if ended["exit"] == 2 and changed:
        return f"changed: {changed[:3]}"
    left = [name for name in after if name not in before and re.search(r"\.(writing|old)", Path(name).name)]
    return f"left behind: {left}" if left else ""


def one(case: Case, template: Path, place: Path) -> dict:
    shutil.copytree(template, place, symlinks=True, copy_function=os.link)
    is_gone = "gone" in case.name
    answers = place / "answers" / "predictions-0.jsonl"       # say where the model is
    write(answers, answers.read_text().replace(str(template), str(place)))
    if case.change and not is_gone:
        case.change(place)
    before = {} if is_gone else held(place)
    ended = run(case, place)
    ended["wrong"] = wrong(case, ended, before, {} if is_gone else held(place))
    if ended["wrong"]:
        print(f"{case.name}: {ended['wrong']}: {ended['stderr'][-300:]!r}", flush=True)
    for locked in place.glob("locked"):
        locked.chmod(0o755)
    shutil.rmtree(place, ignore_errors=is_gone)
    return ended


def main(folder: Path, words: str = "", part: int = 3, processes: int = 2) -> list[dict]:
    """part: of the cases, chosen by their names alone, every so many-th; 1 runs all."""
    import sample, train, convert_weights                                    # noqa: once, for all forks
    import nanoeemllm.bench.answers, nanoeemllm.bench.operations, nanoeemllm.bench.train   # noqa
    import nanoeemllm.evaluation.__main__, nanoeemllm.toy.__main__, nanoeemllm.toy.tables                            # noqa
    import torch._dynamo                                                     # noqa
    import warnings
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import.*")
    template = folder / "template"
    make_place(template)
    whole = held(template)
    cases = [case for make in CASES for case in make()
             if words in case.name and zlib.crc32(case.name.encode()) % part == 0]
    children = []
    for number in range(processes):
        if (child := os.fork()) == 0:
            results = [one(case, template, folder / f"place{number}") for case in cases[number::processes]]
            (folder / f"results-{number}.json").write_text(json.dumps(results))
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    results = [line for number in range(processes) for line in json.loads((folder / f"results-{number}.json").read_text())]
    assert held(template) == whole, "a command wrote into a file that was there"
    return results


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    results = main(place, *sys.argv[2:3], *map(int, sys.argv[3:]))
    (place / "results.json").write_text(json.dumps(results))
    print(len(results), "cases,", sum(bool(line["wrong"]) for line in results), "wrong, slowest", max((line["seconds"], line["name"]) for line in results))
