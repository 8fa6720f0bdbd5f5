"""Hostile inputs by rule, kinds x places: none ends in a traceback, hangs, or harms what is saved.

    python tests/hostile.py FOLDER              runs a third of the cases, prints those that fail
    python tests/hostile.py FOLDER WORDS 1      all whose names hold WORDS; "" are all 2,300

The cases are in hostile_cases.py. One process imports everything once; every case is a fork of it
that runs a command as its file is run, `__main__` and all, in a folder of its own; those named
program/ are lines of a shell. FOLDER/results.json says how each ended.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import itertools
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import struct
import sys
import traceback
import warnings
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from hostile_cases import (CASES, COMMANDS, EVALUATE, NOTES, RESUME, Case, conversation, questions,
                           write)                                # noqa: E402

SECONDS = 20
SOURCES = {"llm": "llama3", "vision": "siglip_vision", "clip": "clip", "vicuna": "vicuna"}


# ---- the folder that every case gets ----

def make_place(place: Path):
    """A model, pictures, conversations, questions, answers, runs, results, published folders."""
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
    results = {"settings": SETTINGS, "runs": {}, "prefill_ms": {}}
    write(place / "results.json", json.dumps(results, indent=1))
    for name, source in SOURCES.items():
        shutil.copytree(ROOT / "tests" / "golden" / "sources" / source, place / name)
    for flags in (EVALUATE, RESUME[:-1]):
        ended = run(Case("place", flags), place)
        assert ended["exit"] == 0, ended
    shutil.copytree(place / "trained", place / "stopped")
    (place / "stopped" / "pretrain-run" / "finished").unlink()


# ---- running ----

def run(case: Case, place: Path) -> dict:
    """exit, seconds, stdout and stderr of a case, in a process of its own; exit None: it was ended
    after 5 * SECONDS. The seconds are of a core, as others may have the machine."""
    files = [place.parent / f"{place.name}.{name}" for name in ("out", "err")]
    child = os.fork()
    if child == 0:
        try:
            _command(case, place, files)
        finally:
            os._exit(99)
    _, status, used = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)                  # what it may have started
    code = os.waitstatus_to_exitcode(status)
    out, err = [file.read_bytes().decode(errors="replace") for file in files]
    for file in files:
        file.unlink()
    return {"name": case.name, "exit": None if code == -signal.SIGALRM else code,
            "seconds": round(used.ru_utime + used.ru_stime, 2), "stdout": out[-2000:],
            "stderr": err}


def _command(case: Case, place: Path, files: list[Path]):
    """What Python does from its start to its end, in a fork: streams, the command's file, the exit
    code; or the shell's line."""
    os.setsid()
    signal.alarm(5 * SECONDS)                       # nobody handles it: it ends the process
    os.chdir(place)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    if sys.platform == "linux":         # root, too, is held to the rights of files: no capabilities
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    os.environ |= case.environment
    for number, (kind, file) in enumerate(zip((case.stdout, case.stderr), files), 1):
        _redirect(number, kind, file)
    os.close(0)
    assert os.open("/dev/null", os.O_RDONLY) == 0
    if "gone" in case.name:
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
    command, *sys.argv[1:] = case.command
    target = COMMANDS[command]
    if case.shell:
        program = [str(ROOT / target)] if target.endswith(".py") else ["-m", target]
        line = case.shell.format(shlex.join([sys.executable, *program, *sys.argv[1:]]))
        os.execve("/bin/bash", ["bash", "-o", "pipefail", "-c", line],
                  os.environ | {"PYTHONPATH": str(ROOT)})
    code = 0
    faulthandler.dump_traceback_later(4 * SECONDS, file=open(files[1], "a"))     # where it hangs
    try:
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
        buffering = 1 if number == 2 else -1                  # lines, as Python has it
        stream = open(number, "w", buffering, encoding, errors, closefd=False)
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
    if ended["exit"] is None or ended["seconds"] > SECONDS:
        return f"took over {SECONDS} s, or never ends"
    if "Traceback" in ended["stderr"] + ended["stdout"] or "panicked" in ended["stderr"]:
        return "traceback"
    if ended["exit"] not in case.exits:
        return f"exit code {ended['exit']}, not {case.exits}"
    if ended["exit"] == 2 and not case.stderr:
        # Of a deleted working directory MKL complains, while PyTorch is imported, before we can.
        first = ("error: ", "Intel oneMKL FATAL ERROR: ") if "deleted" in case.name else "error: "
        errors = [line for line in lines if line.startswith(first)]
        notes = len(lines) > 1 and not NOTES.match(case.name)
        if len(errors) != 1 or lines[-1] != errors[0] or notes:
            return f"{len(lines)} lines on stderr"
        if not lines[-1].isprintable():
            return "control characters"
    changed = [name for name in before if before[name] != after.get(name)]
    if ended["exit"] == 2 and changed:
        return f"changed: {changed[:3]}"
    left = [name for name in after if name not in before
            and re.search(r"\.(writing|old)", Path(name).name)]
    return f"left behind: {left}" if left else ""


def one(case: Case, template: Path, place: Path) -> dict:
    shutil.copytree(template, place, symlinks=True, copy_function=os.link)
    answers = place / "answers" / "predictions-0.jsonl"       # say where the model is
    write(answers, answers.read_text().replace(str(template), str(place)))
    if case.change:
        case.change(place)
    before = held(place)
    ended = run(case, place)
    ended["wrong"] = wrong(case, ended, before, held(place))
    if ended["wrong"]:
        print(f"{case.name}: {ended['wrong']}: {ended['stderr'][-300:]!r}", flush=True)
    for locked in place.glob("locked"):
        locked.chmod(0o755)
    shutil.rmtree(place)
    return ended


def main(folder: Path, words: str = "", part: int = 3, processes: int = 2) -> list[dict]:
    """part: of the cases, chosen by their names alone, every so many-th, and of the programs, which
    load PyTorch each, that part's square; 1 runs all."""
    import sample, train, convert_weights                                # noqa: once, for all forks
    import torch._dynamo                                                 # noqa
    import nanoeemllm.evaluation.__main__, nanoeemllm.toy.__main__       # noqa
    for name in ("bench.answers", "bench.operations", "bench.train", "toy.tables"):
        importlib.import_module(f"nanoeemllm.{name}")
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import.*")
    template = folder / "template"
    make_place(template)
    whole = held(template)
    cases = [case for case in itertools.chain(*(make() for make in CASES))
             if words in case.name and case.exits
             and zlib.crc32(case.name.encode()) % part ** (2 if case.shell else 1) == 0]
    children = []
    for number in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            place = folder / f"place{number}"
            results = [one(case, template, place) for case in cases[number::processes]]
            (folder / f"results-{number}.json").write_text(json.dumps(results))
            os._exit(0)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    results = [line for number in range(processes)
               for line in json.loads((folder / f"results-{number}.json").read_text())]
    assert held(template) == whole, "a command wrote into a file that was there"
    return results


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    results = main(place, *sys.argv[2:3], *map(int, sys.argv[3:]))
    (place / "results.json").write_text(json.dumps(results))
    slowest = max((line["seconds"], line["name"]) for line in results)
    print(len(results), "cases,", sum(bool(line["wrong"]) for line in results), "wrong, slowest",
          slowest)
