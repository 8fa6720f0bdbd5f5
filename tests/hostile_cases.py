"""What hostile.py runs: names of cases, commands, what makes them hostile, and how they end."""

import base64
import copy
import io
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LONG = "x" * 300

# Names of cases -> how they end. All others are refused: exit code 2.
ENDS = {
    # legal values among the kinds: no cases at all
    r"config/.*(rope_theta|factor|_eps) (half|1e12)|config/llama.rope_scaling null"
    r"|config/.*(tie_word_embeddings|post_layernorm) true|config/visual_path.name text"
    r"|flag/.* --(seed|workers|max-bad|temperature|top-k|min-p|composite-layers) 0"
    r"|flag/.* --(temperature|lr|epochs|repetition-penalty) 1.5|flag/.* --(top-k|seed) 2147483648"
    r"|record/published \w+ null|file/(run|train trained/pretrain-run/run.json) (absent|dangling)"
    r"|environment/\w+ LOCAL_WORLD_SIZE=7": (),
    # the output has left, or what is odd is printed with replacement
    r"place|output/(?!.*refused).*(closed|left|stderr full|in ASCII)"
    r"|program/.*(head|closed| in C|ASCII)"
    r"|flag/--steps 99999999 looked at|record/results (accuracy|prefill_ms of) 3"
    r"|tokenizer/convert no end token|weights/bin (parameters|repeated)"
    r"|path/model (?!.*(weights|init|llm|vision) 'm.udcff').*": (0,),
    # a float's range, or files that may as well be absent; a torn line is asked again
    r"config/.*(rope_theta|factor|_eps) 2\^63|flag/edge .*"
    r"|file/convert \w+/(generation_config|preprocessor_config|added_tokens|tokenizer_config).json"
    r" (absent|control|lone surrogate)"
    r"|file/sample model/model.safetensors.index.json (absent|dangling)"
    r"|file/evaluate answers/predictions-0.jsonl (?!FIFO|folder|loop|zero$|without|stdin|memory).*"
    r"|record/(conversation id|answer (read|answer)) .*|record/turn (from|value) \"x\""
    r"|record/answer (row (true|3)|index \"x\"|prediction \"x\"|score true)|record/results runs {}"
    r"|record/published (eos_token_id|torch_dtype|rope_\w+ {).*"
    r"|tokenizer/convert ids beyond the model|path/cell (index|answer) '[x\[].*"
    r"|path/cell (question '.x00|image_path \"\['a).*"
    r"|output/train stdout full|program/train.* full": (0, 2)}
# More lines may stand before the error's: of samples that are left out, of progress.
NOTES = re.compile(r"file/(picture (of|to)|train data)|record/(conversation|turn)|flag/--data|path/"
                   r"|output/(?!.*(refused|gone))|program/")


class Case(NamedTuple):
    name: str                       # its group / kind
    command: list[str]              # the command and its flags, in the case's folder
    change: Callable | None = None  # change(folder) makes it hostile
    stdout: str = ""                # "full", "closed" or "left"; "": a file
    stderr: str = ""
    environment: dict = {}
    shell: str = ""                 # a line of the shell around the command

    @property
    def exits(self) -> tuple[int, ...]:
        found = (exits for names, exits in ENDS.items() if re.fullmatch(names, self.name, re.S))
        return next(found, (2,))


COMMANDS = {
    "sample": "sample.py", "train": "train.py", "convert": "convert_weights.py",
    "evaluate": "nanoeemllm.evaluation", "bench": "nanoeemllm.bench", "toy": "nanoeemllm.toy",
    "tables": "nanoeemllm.toy.tables"}

SAMPLE = "sample --weights model --image images/a.png --prompt two --max-new-tokens 2".split()
TEXT = "sample --weights model --prompt two --max-new-tokens 2".split()
ANEW = "evaluate --weights model --tsv q.tsv --images images --out new --max-new-tokens 2".split()
EVALUATE = ["answers" if word == "new" else word for word in ANEW]
TRAIN = ("train --stage pretrain --init model --data data.json --images images --steps 2 "
         "--batch-size 2 --workers 0 --out out --device cpu").split()
RESUME = [*TRAIN[:-3], "trained", "--device", "cpu", "--resume"]
STOPPED = ["stopped" if word == "trained" else word for word in RESUME]
CONVERT = "convert --llm llm --vision vision --out new".split()
CLIP = "convert --llm llm --vision clip --out new".split()
VICUNA = "convert --llm vicuna --out new".split()
TABLES = "tables paths --draw --results results.json".split()
OPERATIONS = "bench operations --preset tiny".split()


def conversation(key: str, image) -> dict:
    turns = [{"from": "human", "value": "<image>\ntwo"}, {"from": "gpt", "value": "two"}]
    return {"id": key, "image": image, "conversations": turns}


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
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)


def at(data, place):
    for key in place:
        data = data[key]
    return data


def change_json(file: str, place: tuple, value) -> Callable:
    """Of a .jsonl the place begins with the line; of data.json the first sample alone is left."""
    def change(folder: Path):
        text, by_line = (folder / file).read_text(), file.endswith(".jsonl")
        data = json.loads(f"[{','.join(text.splitlines())}]" if by_line else text)
        data = data[:1] if file == "data.json" else data
        at(data, place[:-1])[place[-1]] = value
        lines = "".join(json.dumps(line) + "\n" for line in data)
        write(folder / file, lines if by_line else json.dumps(data))
    return change


# ---- kinds ----

NOT_JSON = {
    "empty": "", "cut": '{"a": ', "deep list": "[" * 100_000, "deep object": '{"a":' * 100_000,
    "NaN": '{"a": NaN}', "infinity": '{"a": 1e999}', "huge integer": '{"a": ' + "9" * 5000 + "}",
    "not UTF-8": b'{"a": "\xff"}', "zero bytes": b"\0" * 64, "a number": "3", "null": "null",
    "a string": '"x"', "list of lists": "[[]]", "list of numbers": "[1, 2]",
    "lone surrogate": '{"\\ud800": "\\ud800"}', "control": '{"\\n\\u001b[31m": 1}'}
HOSTILE = {
    "zero": 0, "negative": -1, "1e12": 10 ** 12, "2^63": 2 ** 63, "half": 0.5, "1e308": 1e308,
    "nan": float("nan"), "infinity": float("inf"), "true": True, "text": "12", "null": None,
    "list": [], "object": {}, "deep": [[[[[1]]]]], "huge": 10 ** 4000}
ODD = [[], 3, "x", None, True, {}, [[]], {"a": []}, 1e308]
FLAGS = ["0", "-1", "nan", "inf", "1e308", "1e12", "9" * 5000, "2147483648", "", "x", "1.5",
         "0x10", "1 2"]
NAMES = [                           # of pictures: out of their folder, too long, or of no system
    "../secret.png", "link/../secret.png", "sub/../../secret.png", "/etc/passwd",
    "{place}/secret.png", "..", ".", "", LONG, "a/" * 3000, "a\0.png", "a.png/x",
    "\x1b[31m\n.png", "link/../../../../../../etc/passwd", "/dev/zero", "/dev/stdin",
    "/proc/self/mem", "~/a.png", "caf\udce9.png"]


def special(name: str) -> dict[str, Callable]:
    """What is no regular file, in the place of one."""
    kinds = {
        "FIFO": os.mkfifo, "absent": lambda path: None,
        "folder": lambda path: (path.mkdir(), (path / "x").write_text("x")),
        "without rights": lambda path: (path.write_text("x"), path.chmod(0))}
    for kind, target in {"dangling": "nowhere", "zero": "/dev/zero", "stdin": "/dev/stdin",
                         "memory": "/proc/self/mem", "loop": Path(name).name}.items():
        kinds[kind] = lambda path, target=target: path.symlink_to(target)
    return {kind: lambda place, make=make: (remove(place / name), make(place / name))
            for kind, make in kinds.items()}


# ---- cases ----

def config_cases():
    """Every number of config.json x what is none, or out of its range."""
    from tiny_run import tiny_model
    config = tiny_model().config.to_dict()
    config["llama"]["rope_scaling"] = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                           original_max_position_embeddings=64)
    config["other_paths"] = [{"name": "yopo"}]

    def case(place: tuple, kind: str, value) -> Case:
        changed = copy.deepcopy(config)
        at(changed, place[:-1])[place[-1]] = value
        return Case(f"config/{'.'.join(place)} {kind}", TEXT,
                    replaced("model/config.json", json.dumps(changed)))

    objects = [("llama",), ("visual_path",), ("llama", "rope_scaling")]
    places = [*numbers(config), *objects, ("visual_path", "name")]
    for place, (kind, value) in itertools.product(places, HOSTILE.items()):
        yield case(place, kind, value)
    for place in objects:
        inner = at(config, place)
        for key in inner:
            yield case(place, f"renamed {key}", {
                "unknown" * (name == key) + name: held for name, held in inner.items()})


def numbers(data, above=()):
    if isinstance(data, dict):
        for key, value in data.items():
            yield from numbers(value, (*above, key))
    elif isinstance(data, (int, float)):
        yield above


def file_cases():
    """Every file that is read x what is no such file."""
    jsons = {
        "model/config.json": (TEXT, EVALUATE, TRAIN), "model/tokenizer.json": (TEXT,),
        "data.json": (TRAIN,), "llm/config.json": (CONVERT,), "vision/config.json": (CONVERT,),
        "llm/generation_config.json": (CONVERT,), "llm/tokenizer.json": (CONVERT,),
        "vision/preprocessor_config.json": (CONVERT,), "vicuna/tokenizer.model": (VICUNA,),
        "vicuna/tokenizer_config.json": (VICUNA,), "vicuna/added_tokens.json": (VICUNA,),
        "vicuna/pytorch_model.bin.index.json": (VICUNA,), "results.json": (TABLES,),
        "model/model.safetensors.index.json": (TEXT,), "q.tsv": (EVALUATE,),
        "trained/pretrain-run/run.json": (RESUME,), "answers/predictions-0.jsonl": (EVALUATE,)}
    for file, commands in jsons.items():
        kinds = {kind: replaced(file, text) for kind, text in NOT_JSON.items()} | special(file)
        for (kind, change), command in itertools.product(kinds.items(), commands):
            yield Case(f"file/{command[0]} {file} {kind}", command, change)
    others = {
        "picture": (SAMPLE, "images/a.png"), "picture of a row": (ANEW, "images/a.png"),
        "picture to train on": (TRAIN, "images/a.png"),
        "weights": (TEXT, "model/model-00001-of-00001.safetensors"),
        "published weights": (CONVERT, "llm/model.safetensors"),
        "published bin": (CLIP, "clip/pytorch_model.bin"),
        "published bin of two": (VICUNA, "vicuna/pytorch_model-00001-of-00002.bin"),
        "run": (STOPPED, "stopped/pretrain-run/run.json")}
    for name, (command, file) in others.items():
        for kind, change in special(file).items():
            yield Case(f"file/{name} {kind}", command, change)
    for kind, data in {"empty": b"", "short": b"\x89PNG\r\n\x1a\n", "text": b"hello",
                       "zero": b"\0" * 1000, "gif": b"GIF89a\xff\xff\xff\xff"}.items():
        yield Case(f"file/picture bytes {kind}", SAMPLE, replaced("images/a.png", data))


def record_cases():
    """Nested JSON: records of conversations, predictions and results that are something else."""
    answers, index = "answers/predictions-0.jsonl", "model/model.safetensors.index.json"
    run = ("runs", "llava_64px_seed0")
    places = {
        "conversation": (TRAIN, "data.json", (0,)), "answers": (EVALUATE, answers, (1,)),
        "results runs": (TABLES, "results.json", run[:1]),
        "results runs of": (TABLES, "results.json", run),
        "results accuracy": (TABLES, "results.json", run),
        "results prefill_ms of": (TABLES, "results.json",
                                  ("prefill_ms", "llava, 64 visual tokens")),
        "results settings": (TABLES, "results.json", ("settings",)),
        "weight map": (TEXT, index, ("weight_map",)),
        "weight map of": (TEXT, index, ("weight_map", "a"))}
    for key in ("id", "image", "conversations"):
        places[f"conversation {key}"] = (TRAIN, "data.json", (0, key))
    for key in ("from", "value"):
        places[f"turn {key}"] = (TRAIN, "data.json", (0, "conversations", 0, key))
    for key in ("row", "index", "prediction", "score", "answer", "read"):
        places[f"answer {key}"] = (EVALUATE, answers, (1, key))
    for key in ("rope_scaling", "rope_parameters", "vocab_size", "eos_token_id", "architectures",
                "torch_dtype", "num_hidden_layers"):
        places[f"published {key}"] = (CONVERT, "llm/config.json", (key,))
    for (name, (command, file, place)), odd in itertools.product(places.items(), ODD):
        value = {"accuracy": odd} if name == "results accuracy" else odd
        yield Case(f"record/{name} {json.dumps(odd)}", command, change_json(file, place, value))
    for key in ("factor", "low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings"):
        yield Case(f"record/rope_scaling without {key}", TEXT,
                   change_json("model/config.json", ("llama", "rope_scaling"), {key: 1}))
        yield Case(f"record/published rope_scaling without {key}", CONVERT, change_json(
            "llm/config.json", ("rope_scaling",), {"rope_type": "llama3", key: 1}))


def flag_cases():
    """Every flag that takes a number x what is none, or out of its range; and the environment."""
    numbers = (
        (TEXT, "--max-new-tokens --seed --temperature --top-k --top-p --min-p "
               "--repetition-penalty"),
        (TRAIN, "--steps --batch-size --lr --seed --checkpoint-every --epochs --max-length "
                "--micro-batch-tokens --workers --max-bad --gpus --mfu --assume"),
        (EVALUATE, "--limit --max-new-tokens --batch-tokens"), (TABLES, "--seeds"),
        (["toy", "--export", "new"], "-n --picture-size --max-things --seed"),
        ("bench prefill --out new".split(), "--visual --images --text --tokens --runs"),
        (["bench", "train"], "--visual --text --samples --steps"),
        (OPERATIONS, "--composite-layers --every --window --last-visual-layer --begin"))
    for command, flags in numbers:
        for flag, value in itertools.product(flags.split(), FLAGS):
            yield Case(f"flag/{' '.join(command[:2])} {flag} {value:.20}",
                       [*command, f"{flag}={value}"])
    for layers in ("0-999999999999", "5-1", ",", "999"):
        flags = ["--composite-layers", layers]
        yield Case(f"flag/{' '.join(flags)}", [*SAMPLE, "--visual-path", "eemllm-f", *flags])
    for name in ("data.json:1e308", "data.json:nan", "data.json:0", "data.json:-1",
                 "data.json:inf", "data.json:1e-308", ":", "data.json:", LONG, "a\nb.json"):
        yield Case(f"flag/--data {name:.20}", [*TRAIN, "--data", name, "--data", "data.json:1"])
    for steps in ("2147483647", "99999999999"):
        yield Case(f"flag/--steps {steps}", [*TRAIN, "--steps", steps])
    yield Case("flag/--steps 99999999 looked at", [*TRAIN, "--steps", "99999999", "--dry-run"])
    for name, value in itertools.product(
            ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
            ("abc", "-3", "", "1e3", "1.5", "9" * 5000, "7", "\u0663")):
        for command in (TRAIN, EVALUATE):
            yield Case(f"environment/{command[0]} {name}={value:.9}", command,
                       environment={name: value})
    for flag, value in itertools.product(
            ("temperature", "top-p", "min-p", "repetition-penalty"),
            ("1e-50", "5e-324", "1e-6", "0.999999999", "1e6")):
        yield Case(f"flag/edge --{flag} {value}",
                   [*SAMPLE, "--temperature", "1", f"--{flag}", value])


def weight_cases():
    """Tensors that are not finite, too many, too few; files that are cut."""
    from safetensors.torch import load_file, save_file
    import torch
    file = "model/model-00001-of-00001.safetensors"
    index = "model/model.safetensors.index.json"

    def tensors(function: Callable):
        """function(name -> tensor) changes the model's."""
        def change(place: Path):
            held = {name: x.clone() for name, x in load_file(place / file).items()}
            function(held)
            remove(place / file)
            remove(place / index)
            save_file(held, place / "model" / "model.safetensors")
        return change

    def filled(part: str, number: str):
        return tensors(lambda held: [x.fill_(float(number)) for name, x in held.items()
                                     if part in name])

    for part, number, how in itertools.product(
            ("embed_tokens", "lm_head", "layers.0.self_attn.q", "projector", "norm"),
            ("nan", "inf", "-inf"), ([], ["--temperature", "1"])):
        yield Case(f"weights/{part} {number} {how}", [*SAMPLE, *how], filled(part, number))
    for kind, x in {"empty": torch.zeros(0), "scalar": torch.zeros(()),
                    "integers": torch.zeros(3, dtype=torch.int64),
                    "empty integers": torch.zeros(0, dtype=torch.int32)}.items():
        yield Case(f"weights/extra {kind}", TEXT, tensors(lambda held, x=x: held.update(extra=x)))
    yield Case("weights/one less", TEXT, tensors(lambda held: held.pop(next(iter(held)))))
    yield Case("weights/none", TEXT, tensors(lambda held: held.clear()))
    for dtype in (torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield Case(f"weights/{dtype}", TEXT, tensors(lambda held, dtype=dtype: held.update(
            {name: x.to(dtype) for name, x in held.items()})))
    tensor = '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[%s]}}'
    headers = {
        "no JSON": "{" * 8, "deep": "[" * 1000, "list": "[]", "negative": tensor % (-1, "0,4"),
        "begins beyond": tensor % (1, "99,103"), "huge": tensor % (f"{2 ** 62},4", "0,4")}
    for name, command in ((file, TEXT), ("llm/model.safetensors", CONVERT)):
        for kind, header in headers.items():
            data = struct.pack("<Q", len(header)) + header.encode()
            yield Case(f"weights/{name} header {kind}", command, replaced(name, data))
        for length in (0, 4, 2 ** 40, 2 ** 64 - 1):
            yield Case(f"weights/{name} header of {length}", command,
                       replaced(name, struct.pack("<Q", length)))
        for size in (1, 7, 100, 5000):
            yield Case(f"weights/{name} cut at {size}", command, cut(name, size))
    for name in ("../model/x.safetensors", "/etc/passwd", "none.safetensors", "", "a\nb", LONG,
                 "config.json"):
        yield Case(f"weights/index names {name[:20]!r}", TEXT,
                   change_json(index, ("weight_map", "a"), name))


def cut(name: str, size: int) -> Callable:
    return lambda place: write(place / name, (place / name).read_bytes()[:size])


class Code:
    def __reduce__(self):
        return os.system, ("touch data.json model/config.json; echo run > q.tsv",)


def bin_cases():
    """Pickles that run code, are cut, or hold something else than the numbers of tensors."""
    import torch
    warnings.filterwarnings("ignore", category=UserWarning)      # of what is no more used
    file = "clip/pytorch_model.bin"

    def saved(make: Callable, **how) -> Callable:
        def change(place: Path):
            held, data = torch.load(place / file, weights_only=True), io.BytesIO()
            torch.save(make(held), data, **how)
            write(place / file, data.getvalue())
        return change

    old = {"_use_new_zipfile_serialization": False}              # from before PyTorch 1.6
    kinds = {
        "code": saved(lambda held: held | {"a": Code()}),
        "bare code": replaced(file, pickle.dumps(Code())),
        "old code": saved(lambda held: held | {"a": Code()}, **old),
        "deep": replaced(file, b"\x80\x02" + b"]" * 10 ** 5),
        "a long number": replaced(file, b"\x80\x02\x8b\xff\xff\xff\x7f"),
        "long bytes": replaced(file, b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f"),
        "far memo": replaced(file, b"\x80\x02K\x01r\xff\xff\xff\x7f."),
        "list": saved(lambda held: [*held.values()]), "none": saved(lambda held: None),
        "tensor": saved(lambda held: torch.zeros(3)), "nothing": saved(lambda held: {}),
        "within": saved(lambda held: {"model": held}),
        "numbers as names": saved(lambda held: {1: torch.zeros(1)}),
        "odd name": saved(lambda held: held | {"a\n\x1b[31m": torch.zeros(1)}),
        "huge": saved(lambda held: held | {"a": torch.zeros(1).expand(2 ** 40)}),
        "nested": saved(lambda held: held | {"a": torch.nested.nested_tensor([torch.zeros(2)])})}
    for size in (0, 4, 100, 5000):
        kinds[f"cut at {size}"] = cut(file, size)
    for kind, make in {
            "meta": lambda x: x.to("meta"), "sparse": lambda x: x.to_sparse(),
            "complex": lambda x: x.to(torch.complex64), "int8": lambda x: x.to(torch.int8),
            "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
            "parameters": lambda x: torch.nn.Parameter(x, x.is_floating_point()),
            "repeated": lambda x: x.new_zeros(()).expand(x.shape)}.items():
        kinds[kind] = saved(lambda held, make=make: {name: make(x) for name, x in held.items()})
    for kind, change in kinds.items():
        yield Case(f"weights/bin {kind}", CLIP, change)


def tokenizer_cases():
    """Tokenizers whose library raises or panics, on loading or at the first word."""
    words = {"two": 0, "</s>": 1}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    bpe = {"type": "BPE", "vocab": words, "merges": []}

    def split(pattern: str) -> dict:
        return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern},
                                  "behavior": "Isolated", "invert": False}}

    models = {
        "no vocabulary": model | {"vocab": {}}, "no model": None, "model of no kind": {"type": "X"},
        "a token of id 2^32": model | {"vocab": {"two": 2 ** 32, "</s>": 1}},
        "a token of id 2^31": model | {"vocab": {"two": 2 ** 31, "</s>": 1}},
        "a negative id": model | {"vocab": {"two": -1}},
        "merges of nothing": bpe | {"merges": [["x", "y"]]},
        "merges that are numbers": bpe | {"merges": [[1, 2]]},
        "Unigram of nothing": {"type": "Unigram", "vocab": [], "unk_id": 0},
        "Unigram without unknown": {"type": "Unigram", "vocab": [["two", 0.0], ["</s>", 0.0]],
                                    "unk_id": None},
        "Unigram of NaN": {"type": "Unigram", "vocab": [["two", -1e308], ["</s>", 0.0]],
                           "unk_id": 7},
        "WordPiece without unknown": {
            "type": "WordPiece", "vocab": words, "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 0},
        "byte fallback without bytes": bpe | {"byte_fallback": True, "unk_token": "<unk>"},
        "no end token": model | {"vocab": {"two": 0, "<unk>": 1}},
        "ids beyond the model": model | {"vocab": {"two": 0, "<unk>": 5000, "</s>": 2}}}
    hostile = {
        "no unknown token": {}, "an expression that is none": split("("),
        "an expression without an end": split("(a|a)*" * 30 + "b"),
        "a broken normalizer": {"normalizer": {"type": "Precompiled",
                                               "precompiled_charsmap": "AAAA"}},
        "a normalizer of no kind": {"normalizer": {"type": "X"}},
        "a normalizer that is a list": {"normalizer": []},
        "a decoder of no kind": {"decoder": {"type": "X"}},
        "added tokens that are strings": {"added_tokens": ["x"]},
        "an added token of id 2^32": {"added_tokens": [{"id": 2 ** 32, "content": "x"}]}}
    hostile |= {kind: {"model": parts} for kind, parts in models.items()}
    plain = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
             "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
             "model": model}
    for kind, parts in hostile.items():
        text = json.dumps(plain | parts)
        for name, command in (("model", TEXT), ("llm", CONVERT), ("model", TRAIN)):
            yield Case(f"tokenizer/{command[0]} {kind}", command,
                       replaced(f"{name}/tokenizer.json", text))


def path_cases():
    """Names that lead out of the folder of pictures, that are too long, or that no system has."""
    def rows(name: str, **cells) -> Callable:
        return lambda place: write(
            place / "q.tsv", questions(name.replace("{place}", str(place)), **cells))

    def entry(name: str) -> Callable:
        return lambda place: write(place / "data.json", json.dumps(
            [conversation("0", name.replace("{place}", str(place)))]))

    for name in NAMES:
        yield Case(f"path/row {name[:30]!r}", ANEW, rows(name))
        yield Case(f"path/conversation {name[:30]!r}", TRAIN, entry(name))
        if not re.search("secret|\0|\udce9", name):
            yield Case(f"path/sample {name[:30]!r}", [*SAMPLE, "--image", name])
    gif = base64.b64encode(b"GIF89a").decode()
    for key, value in (
            ("index", "x" * 100_000), ("question", ""), ("answer", ""),
            ("image_path", "[" * 90_000), ("image_path", "['a.png'"), ("answer", "[" * 90_000),
            ("image", "7"), ("image", "!" * 100), ("image", "A" * 101), ("image", "[" * 1000),
            ("image", gif * 20), ("question", '"open'), ("question", "\0")):
        yield Case(f"path/cell {key} {value[:12]!r}", ANEW, rows("a.png", **{key: value}))
    for name in ("caf\u00e9 \u732b", "m\udcff", "a\nb", "%s{}"):
        for command, flag, folder in ((TEXT, "--weights", "model"), (ANEW, "--weights", "model"),
                                      (TRAIN, "--init", "model"), (CONVERT, "--llm", "llm"),
                                      (CLIP, "--vision", "clip"), (CONVERT, "--out", "")):
            yield Case(f"path/model {command[0]} {flag} {name!r}", [*command, flag, name],
                       lambda place, folder=folder, name=name:
                       folder and (place / folder).rename(place / name))


def output_cases():
    """Places that cannot be written, output that goes away, a working directory that is gone."""
    places = {
        "under a file": "data.json/new", "under a device": "/dev/null/new", "in proc": "/proc/new",
        "too long": LONG, "under a loop": "loop/new", "a FIFO": "fifo", "under a FIFO": "fifo/new",
        "without rights": "locked/new", "control": "locked/\x1b[31m\n"}
    writers = {
        "sample --attention": SAMPLE, "train --out": TRAIN, "evaluate --out": EVALUATE,
        "convert --out": CONVERT, "tables --results": TABLES, "bench --out": ["bench", "prefill"],
        "tables --out": ["tables", "data", "--results", "results.json"],
        "toy --export": ["toy", "-n", "1"], "toy --export-tsv": ["toy", "-n", "1"]}

    def odd(place: Path):
        os.mkfifo(place / "fifo")
        (place / "loop").symlink_to("loop")
        (place / "locked").mkdir()
        (place / "locked").chmod(0o555)

    for (name, command), (kind, where) in itertools.product(writers.items(), places.items()):
        yield Case(f"output/{name} {kind}", [*command, name.split()[1], where], odd)
    commands = {
        "sample": SAMPLE, "train": TRAIN, "evaluate": EVALUATE, "convert": CONVERT,
        "tables": TABLES, "toy": ["toy", "--export", "new", "-n", "2"],
        "bench": ("bench train --paths llava --stages pretrain --visual 4 "
                  "--samples 1 --steps 1").split(),
        "train --dry-run": [*TRAIN, "--dry-run"], "train --show-batch": [*TRAIN, "--show-batch"],
        "operations": [*OPERATIONS, "--visual-path", "eemllm"]}
    for name, command in commands.items():
        for kind in ("full",) if name == "bench" else ("full", "closed", "left"):   # takes seconds
            yield Case(f"output/{name} stdout {kind}", command, stdout=kind)
            yield Case(f"output/{name} stderr {kind}", command, stderr=kind)
            yield Case(f"output/{name} refused, stderr {kind}", [*command, "--unknown"],
                       stderr=kind)
        ascii_only = {"PYTHONIOENCODING": "ascii"}
        if name != "bench":
            yield Case(f"output/{name} both closed", command, stdout="closed", stderr="closed")
            yield Case(f"output/{name} in ASCII", command, environment=ascii_only)
        yield Case(f"output/{name} refused in ASCII", [*command, "--\u732b"],
                   environment=ascii_only)
        yield Case(f"output/{name} in a folder that is gone", command)
    lines = {
        "head": "{} | head -1", "full": "{} > /dev/full", "stdout closed": "{} >&-",
        "stderr closed": "{} 2>&-", "both closed": "{} >&- 2>&-", "in C": "LC_ALL=C {}",
        "in ASCII": "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {}",
        "deleted": "mkdir gone; cd gone; rmdir ../gone; {}"}
    for name in ("train", "train --dry-run", "train --show-batch", "convert", "evaluate",
                 "operations", "tables"):
        for kind, line in lines.items():
            odd = ["--out", "caf\u00e9 \u732b"] * (kind[:3] == "in " and name != "operations")
            yield Case(f"program/{name} {kind}", [*commands[name], *odd], shell=line)


CASES = (config_cases, file_cases, record_cases, flag_cases, weight_cases, bin_cases,
         tokenizer_cases, path_cases, output_cases)
