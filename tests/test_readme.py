"""What the README says of the code, where code can tell."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_file_imports_only_from_files_above_it():
    listed = re.findall(r"^      (\w+)\.py", (ROOT / "README.md").read_text(), re.MULTILINE)
    files = {file.stem: file for file in (ROOT / "nanoeemllm").glob("*.py") if not file.stem.startswith(("__", "bench_"))}
    assert sorted(listed) == sorted(files)
    for place, name in enumerate(listed):
        for node in ast.parse(files[name].read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("nanoeemllm."):
                used = node.module.removeprefix("nanoeemllm.")
                assert used in listed[:place] or used == "bench_systems", f"{name}.py: {used}"


def test_every_file_that_the_equations_name_holds_what_they_name():
    for name, file in re.findall(r"`(\w+(?:\.\w+)?)` in `(\w+\.py)`", (ROOT / "README.md").read_text()):
        source = (ROOT / "nanoeemllm" / file).read_text()
        assert all(re.search(rf"(class|def) {part}\b", source) for part in name.split(".")), f"{name} in {file}"
