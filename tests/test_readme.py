"""What the READMEs say of the code, and how the house is built, where code can tell."""

import argparse
import ast
import contextlib
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from nanoeemllm import EEMLLM, paths
from nanoeemllm.config import IMAGE_TOKEN, LlamaConfig, ModelConfig
from nanoeemllm.decoder import Decoder
from nanoeemllm.layout import build_layout

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanoeemllm"
README = (ROOT / "README.md").read_text()
READMES = [ROOT / "README.md", *sorted(PACKAGE.glob("*/README.md"))]
SCRIPTS = {file.stem for file in ROOT.glob("*.py")}
LESSON = sorted(file for file in PACKAGE.glob("*.py") if file.name != "__init__.py")
WORKSHOPS = {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}


# ---- what the README shows ----

def test_the_tree_is_complete():
    tree = re.search(r"^    nanoeemllm/ (.*\n(?:    .*\n)+)", README, re.MULTILINE)[1]
    inside = set(re.findall(r"^      (\S+)", tree, re.MULTILINE))
    outside = set(re.findall(r"^    (\w\S*)", tree, re.MULTILINE))
    assert inside == {file.name for file in LESSON} | {f"{name}/" for name in WORKSHOPS | {"assets"}}
    assert outside == {f"{script}.py" for script in SCRIPTS} | {"tests/"}


def test_what_a_table_says_is_in_a_file_is_there():
    rows = re.findall(r"^\| (`\S+\.py`|) \| (.+?) \|", README, re.MULTILINE)
    assert len(rows) > 10
    for name, text in rows:
        file = name.strip("`") or file
        source = (PACKAGE / file).read_text()
        for function in re.findall(r"`(\w+)\(\)`", text):
            assert re.search(rf"\b(def|class) {function}\b", source), f"{function} in {file}"
    for method in re.findall(r"\bmodel\.(\w+)\(", README):
        assert hasattr(EEMLLM, method), method


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.+?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_layer_is_quoted_as_it_is():
    quoted, = [block for block in python_blocks() if block.startswith("def forward")]
    assert textwrap.indent(quoted, "    ") in (PACKAGE / "decoder.py").read_text()


def test_python_blocks_compile():
    for block in python_blocks():
        compile(block, "README.md", "exec")


def test_the_drawn_masks_are_what_the_layout_computes():
    """t t v v v t t v v t, rows of text: over the merged sequence, and over visual and text keys apart."""
    _, layout = build_layout([[1, 1, IMAGE_TOKEN, 1, 1, IMAGE_TOKEN, 1]], [[(1, 3), (1, 2)]])
    T, V = layout.num_text, layout.num_visual
    drawing = re.search(r"^       LLaVA .+\n((?: {4,}.*\n)+)", README, re.MULTILINE)[1]
    lines = drawing.splitlines()
    kinds, rows = lines[0].split()[:T + V], lines[1:]
    llava = [line.split()[1:T + V + 1] for line in rows]
    eemllm = [line[31:].split()[1:T + V + 1] for line in rows]
    order = layout.position.argsort().tolist()                       # merged place -> packed row
    assert kinds == ["t" if row < T else "v" for row in order]
    for place, row in enumerate(order):
        sees = ["1" if key <= place else "." for key in range(T + V)]
        assert llava[place] == sees
        assert row >= T or eemllm[place] == sees
    apart = [line.split()[-(T + V) - 2:] for line in rows if re.search(r"\d  \d$", line)]
    counts = list(zip(layout.sees_visual[:T].tolist(), layout.sees_text[:T].tolist()))
    assert [tuple(map(int, line[-2:])) for line in apart] == counts
    for line, (visual, text) in zip(apart, counts):
        assert "".join(line[:-2]) == ("1" * visual).ljust(V, ".") + ("1" * text).ljust(T, ".")


def test_the_visual_path_of_the_readme_works(monkeypatch):
    """With the imports of a file in paths/: it has its flag, and from its layer on visual rows stay as they are."""
    monkeypatch.setattr(paths, "PATHS", dict(paths.PATHS))
    block, = [block for block in python_blocks() if "@register" in block]
    imports = """
from dataclasses import dataclass
from nanoeemllm.config import VisualPath, size
from nanoeemllm.decoder import DecoderLayer
from nanoeemllm.paths import register
from nanoeemllm.paths.eemllm import AblatedLayer
"""
    exec(imports + block, {"__name__": "frozen"})
    parser = argparse.ArgumentParser()
    paths.add_flags(parser)
    args = parser.parse_args(["--visual-path", "frozen", "--frozen-from", "1"])
    config = LlamaConfig(50, 32, 48, 3, 4, 2, 8, 256)
    path = paths.from_args(args, ModelConfig(config, None))
    assert path == paths.make("frozen", frozen_from=1)

    ids, layout = build_layout([[1, IMAGE_TOKEN, 2, 3]], [[(2, 3)]])
    decoder, visual = Decoder(config, path), torch.randn(6, 32)
    rows = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda layer, arguments, x: rows.append(x[layout.num_text:]))
    assert decoder(ids, visual, layout).shape == (3, 32)
    assert not torch.equal(rows[0], visual) and torch.equal(rows[0], rows[1]) and len(rows[2]) == 0


# ---- commands and links ----

class Parsed(BaseException):
    """Raised in place of what a command would do."""


def commands() -> list[tuple[str, str]]:
    """(README, command), of code blocks and of inline code."""
    found = []
    for file in READMES:
        text = file.read_text()
        blocks = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"^    (.+)", text, re.MULTILINE)))
        prose = re.sub(r"^(    |```).*", "", text, flags=re.MULTILINE)
        for line in [*blocks.splitlines(), *re.findall(r"`([^`]+)`", prose)]:
            for command in re.split(r" {3,}", line)[0].split(" && "):      # what a command does may stand behind it
                if re.match(r"(python|torchrun) (-\S+ )*(-m nanoeemllm|\w+\.py)", command):
                    found.append((str(file.relative_to(ROOT)), command))
    return found


def test_there_are_commands():
    assert len(commands()) > 20


@pytest.mark.parametrize("file, command", commands())
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_and_their_flags_exist(file, command, monkeypatch):
    """Each is started as its user starts it, and stopped when its parsers have read all of its arguments."""
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
    while words[0] != "-m" and words[0].startswith("-"):             # torchrun's own
        del words[0]
    if words[0] == "-m":
        del words[0]
    program, *words = words
    parse, read = argparse.ArgumentParser.parse_args, []

    def parse_args(self, argv=None, namespace=None):
        read.extend(sys.argv[1:] if argv is None else argv)
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            args = parse(self, argv, namespace)
        if len(read) >= len(words):
            raise Parsed
        return args

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(Parsed):
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=False)


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_resolve(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target.partition("#")[0]).exists(), target


# ---- how the house is built ----

def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(file: Path, lazily: bool) -> list[str]:
    """Full names of what a file imports, within functions too if `lazily`: "nanoeemllm.data.images.load_image"."""
    folder = file.relative_to(ROOT).parent.parts
    names, todo = [], [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[:len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif lazily or not is_for_later(node):
            todo += ast.iter_child_nodes(node)
    return names


def is_for_later(node: ast.AST) -> bool:
    is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    return is_main or isinstance(node, (ast.FunctionDef, ast.Lambda))


def workshops_in(file: Path, lazily: bool) -> set[str]:
    names = [name.split(".") for name in imports(file, lazily)]
    return {name[1] for name in names if name[0] == "nanoeemllm" and len(name) > 1} & WORKSHOPS


def test_the_lesson_is_small():
    assert len(LESSON) <= 12
    long = {file.name: len(file.read_text().splitlines()) for file in LESSON}
    assert max(long.values()) <= 250, {name: lines for name, lines in long.items() if lines > 250}
    assert long["walkthrough.py"] < 120


def test_the_lesson_imports_no_workshop():
    """When it is imported; registry, kernels and images are reached within functions."""
    for file in [*LESSON, PACKAGE / "__init__.py"]:
        assert not workshops_in(file, lazily=False), file.name
        if file.name not in ("walkthrough.py", "__init__.py"):
            assert workshops_in(file, lazily=True) <= {"paths", "kernels", "data"}, file.name
            for name in imports(file, lazily=True):
                assert not name.startswith("nanoeemllm.data") or name.startswith("nanoeemllm.data.images."), file.name


def test_kernels_can_be_copied_out():
    for file in (PACKAGE / "kernels").glob("*.py"):
        used = {name.split(".")[0] for name in imports(file, lazily=True)
                if not name.startswith("nanoeemllm.kernels")}
        assert used <= {"torch", "triton", *sys.stdlib_module_names}, file.name


def test_workshops_import_each_other_in_no_circle():
    uses = defaultdict(set)
    for file in modules():
        folder = file.relative_to(PACKAGE).parts[0]
        if folder in WORKSHOPS:
            uses[folder] |= workshops_in(file, lazily=True) - {folder}
    left = set(WORKSHOPS)
    while free := {folder for folder in left if not uses[folder] & left}:
        left -= free
    assert not left, {folder: uses[folder] & left for folder in left}


def test_nothing_imports_a_script_and_nobody_edits_the_path():
    for file in [*modules(), *ROOT.glob("*.py")]:
        roots = {name.split(".")[0] for name in imports(file, lazily=True)}
        assert not roots & (SCRIPTS | {"runpy", "tests"}), file.name
        assert "sys.path" not in imports(file, lazily=True), file.name
        assert "sys.path" not in [ast.unparse(node) for node in ast.walk(ast.parse(file.read_text()))
                                  if isinstance(node, ast.Attribute)]


def test_importing_leaves_the_process_alone():
    """No exit hook that a file of ours registers, no signal handler that is another one afterwards."""
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
             for file in modules() if file.name != "__main__.py"]
    program = f"""
import atexit, importlib, signal, sys
found, register = [], atexit.register
def spy(function, *arguments, **options):
    caller = sys._getframe(1).f_code.co_filename
    found.extend([caller] * caller.startswith({str(PACKAGE)!r}))
    return register(function, *arguments, **options)
atexit.register = spy
before = {{number: signal.getsignal(number) for number in signal.valid_signals()}}
for name in {names!r}:
    importlib.import_module(name)
assert not found, found
assert before == {{number: signal.getsignal(number) for number in signal.valid_signals()}}
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)
