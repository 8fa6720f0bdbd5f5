"""What comes from outside and what goes out: files of every kind, and folders replaced without a gap."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanoeemllm.border import files
from nanoeemllm.border.command import Parser, from_environment, positive
from nanoeemllm.border.files import (finish_replacement, open_regular, quoted, read_json, replace_folder, within,
                                     write_aside)
from nanoeemllm.config import UserError

ROOT = Path(__file__).parents[1]


# ---- reading ----

def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc" and file.name == str(tmp_path / "file")
    assert open_regular(tmp_path / "link").read() == b"abc"
    for name, why in (("fifo", "not a regular file"), ("none", "no such file"), ("", "is a folder"),
                      ("x" * 300, "too long"), ("a\0b", "null byte"), ("file/x", "Not a directory")):
        with pytest.raises(UserError, match=why):
            open_regular(tmp_path / name)
    with pytest.raises(UserError, match="/dev/null: is not a regular file"):
        open_regular("/dev/null")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}', "[1]", "\udc80",
                                  '{"a": ' + "9" * 5000 + "}"])
def test_json_is_an_object_of_finite_numbers(tmp_path, text):
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"x\.json.* (cannot be read as JSON|must hold a JSON object)"):
        read_json(tmp_path / "x.json")


def test_json_is_read_as_it_is(tmp_path):
    (tmp_path / "x.json").write_text('{"x": [1, 2.5e3, {"a": null}]}')
    assert read_json(tmp_path / "x.json") == {"x": [1, 2500.0, {"a": None}]}


def test_names_do_not_leave_their_folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    folder = tmp_path / "images"
    for name in ("a.png", "sub/a.png", "sub/../a.png", "link/a.png", "..a.png", "link/../../images/sub/a.png"):
        assert within(folder, name) == str(folder / name)
    for name in ("../a.png", "link/../secret.png", "sub/../../x.png", "/etc/passwd", str(folder / "a.png"), ".."):
        with pytest.raises(UserError, match="is outside of"):
            within(folder, name)


def test_odd_names_are_quoted_on_one_line():
    assert quoted("out/a.json") == "out/a.json"
    assert quoted("a b\n\x1b[31m") == r"'a b\n\x1b[31m'"


# ---- writing: killed at every call that changes the disk ----

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


def killed_at(number: int, function, *arguments, swap: bool = True) -> bool:
    """function(*arguments) in a process that is killed at the number-th call that changes the disk; False if it made fewer."""
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def counted(call):
            def wrapper(*args, **kwargs):
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapper
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        files._exchange = counted(files._exchange) if swap else lambda one, other: False
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def write_folder(folder: Path, text: str):
    with replace_folder(folder) as aside:
        for name in ("a", "b"):
            (aside / name).write_text(text)


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_folder_is_the_old_one_or_the_new_one_at_every_moment(tmp_path, swap, before):
    for number in itertools.count(1):
        folder = tmp_path / str(number) / "model"
        if before:
            write_folder(folder, "old")
        killed = killed_at(number, write_folder, folder, "new", swap=swap)
        if swap and before:
            assert folder.is_dir()                                       # before any other command
        finish_replacement(folder)
        held = {file.read_text() for file in folder.iterdir()} if folder.exists() else {"none"}
        assert held in ({"new"}, {"old"} if before else {"none"})
        assert not folder.parent.is_dir() or {p.name for p in folder.parent.iterdir()} <= {"model"}
        if not killed:
            assert held == {"new"} and number > 6
            return


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    with replace_folder(tmp_path / "model") as aside:
        (aside / "a").write_text("1")
        finish_replacement(tmp_path / "model")                           # as another command would
        assert (aside / "a").exists()
    assert (tmp_path / "model" / "a").exists()


def test_an_error_inside_leaves_what_was_there(tmp_path):
    with replace_folder(tmp_path / "model") as aside:
        (aside / "a").write_text("1")
    for error in (UserError("no"), OSError(28, "No space left on device")):
        with pytest.raises(UserError, match="no|No space"):
            with replace_folder(tmp_path / "model") as aside:
                (aside / "a").write_text("2")
                raise error
    assert (tmp_path / "model" / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")
    with replace_folder(tmp_path / "model") as aside:
        (aside / "a").write_text("1")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / "a").exists()


def test_a_file_that_cannot_be_written_says_so(tmp_path):
    write_aside(tmp_path / "x", b"1")
    write_aside(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot write .*none/x: No such file"):
        write_aside(tmp_path / "none" / "x", b"")


# ---- flags and output ----

@pytest.mark.parametrize("number, text", [(int, "2147483647"), (int, "0"), (int, "-1"), (int, "9" * 5000), (int, "1.5"),
                                          (float, "nan"), (float, "inf"), (float, "1e308"), (float, "0")])
def test_numbers_of_flags_have_a_range(number, text):
    parser = Parser("x")
    parser.add_argument("--n", type=positive(number))
    with pytest.raises(UserError, match="--n.* is no (int|float) over 0, up to 100,000,000"):
        parser.parse_args(["--n", text])


@pytest.mark.parametrize("value", ["abc", "-3", "", "1e9", "99999999"])
def test_numbers_of_the_environment_have_a_range(monkeypatch, value):
    monkeypatch.setenv("RANK", value)
    with pytest.raises(UserError, match="RANK"):
        from_environment("RANK", 0)


PROGRAM = """
import sys
from nanoeemllm.border.command import run_command
from nanoeemllm.config import UserError
def main():
    for i in range(20000):
        print("line \\u6771\\udc80", i)
    if len(sys.argv) > 2:
        raise {"user": UserError("bad\\nname"), "defect": KeyError("x"), "io": FileNotFoundError(2, "gone")}[sys.argv[2]]
    open("done", "w")
run_command(main, sys.argv[1] == "on")
"""


def program(folder, shell, *arguments, **environment):
    command = f"{sys.executable} -c '{PROGRAM}' {' '.join(arguments)} {shell}"
    if "'" in PROGRAM:
        raise AssertionError
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=folder, capture_output=True, text=True,
                          errors="replace", env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


@pytest.mark.parametrize("shell, code, goes_on", [
    ("| head -1", 0, False), ("> /dev/full", 2, False), (">&-", 0, True), ("2>&-", 0, True), (">&- 2>&-", 0, True), ("<&- | cat", 0, True)])
def test_output_that_goes_away(tmp_path, shell, code, goes_on):
    for mode in ("end", "on"):
        done = program(tmp_path, shell, mode)
        assert done.returncode == code, done.stderr
        assert (tmp_path / "done").exists() == (goes_on or (mode == "on" and code == 0))
        assert done.stderr.count("\n") == (1 if code else 0) and "Traceback" not in done.stderr
        (tmp_path / "done").unlink(missing_ok=True)


def test_a_terminal_of_ascii_gets_question_marks(tmp_path):
    done = program(tmp_path, "| tail -1", "end", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout == "line ?? 19999\n"


def test_a_user_error_is_one_line_and_a_defect_shows_itself(tmp_path):
    done = program(tmp_path, "> /dev/null", "end", "user")
    assert done.returncode == 2 and done.stderr == "error: bad\\nname\n"
    for kind in ("defect", "io"):
        done = program(tmp_path, "> /dev/null", "end", kind)
        assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_working_directory_that_was_deleted(tmp_path):
    (tmp_path / "gone").mkdir()
    done = subprocess.run(["bash", "-c", f"cd {tmp_path}/gone; rm -r {tmp_path}/gone; {sys.executable} -c '{PROGRAM}' end"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1              # ours, or a numerical library's own
