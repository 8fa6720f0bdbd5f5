"""The tables' bookkeeping; what they train is train.py's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import nanoeemllm
from nanoeemllm.config import UserError
from nanoeemllm.model import EEMLLM
from nanoeemllm.toy import WorldConfig, tables
from nanoeemllm.toy.backbones import tiny_config, tiny_tokenizer
from nanoeemllm.toy.tables import TABLES, add_results, draw, main, plot, read_results, stretch, time_prefills
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.weights.folder import save

PACKAGE = Path(nanoeemllm.__file__).parent


def results_of(file: Path, table: str, seeds) -> dict:
    """Made-up results of a whole table."""
    found = {}
    for seed in seeds:
        for number, run in enumerate(TABLES[table].values()):
            found[run._replace(seed=seed).name] = {"accuracy": 50 + number + seed}
    return add_results(file, "runs", found)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_drawn_from_the_results_alone(tmp_path, table):
    results_of(tmp_path / "r.json", table, range(2))
    results = read_results(tmp_path / "r.json")
    rows = draw(table, results, seeds=3)                                      # the third seed is not run yet
    assert len({tuple(row) for row in rows}) == 1
    assert len(rows) == len({row for row, _ in TABLES[table]}) and "50.5 ± 0.5" in rows[0].values()


def test_a_row_that_is_not_run_yet_says_so(tmp_path, monkeypatch):
    results = results_of(tmp_path / "r.json", "paths", [0])
    new = {("later", "64 visual tokens"): tables.Run("yopo --window 3"), **TABLES["paths"]}
    monkeypatch.setitem(TABLES, "paths", new)
    assert re.fullmatch(r"later not run 0\.\d\d not run", " ".join(draw("paths", results, 1)[0].values()))


def test_runs_are_told_apart_and_shared_between_tables():
    names = {}
    for seed in range(2):
        names[seed] = {run._replace(seed=seed).name for table in TABLES.values() for run in table.values()}
    assert not names[0] & names[1]
    assert {"llava_64px_seed0", "eemllm_64px_seed0", "llava_64px_seed0 as eemllm-f 1-2",
            "yopo_last-visual-layer_2_128px_seed0", "eemllm_aligner=_64px_seed0 at 128px",
            "flamingo_every_1_64px_seed0_0.125", "llava_64px_seed0 as eemllm-f 0-1-2"} <= names[0]
    assert len(names[0]) == 14 + 9 + 2 + 6                              # what several tables ask for is run once


def test_results_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    results_of(tmp_path / "r.json", "data", [0])
    stored = (tmp_path / "r.json").read_text()
    monkeypatch.setattr(tables, "SETTINGS", {"steps": [2, 2]})
    for draw_only in ([], ["--draw"]):
        with pytest.raises(UserError, match="another --results"):
            main(["data", "--results", str(tmp_path / "r.json"), *draw_only])
    assert (tmp_path / "r.json").read_text() == stored


@pytest.mark.parametrize("runs, times", [
    ({"a": {"accuracy": float("nan")}}, {}), ({"a": {"accuracy": "9"}}, {}), ({"a": {}}, {}), ({"a": 9}, {}),
    ([], {}), ({}, {"a": True}), ({}, {"a": [1]}), ({}, None), ({"a": {"accuracy": 10 ** 400}}, {})])
def test_results_are_numbers_or_refused_in_a_line(tmp_path, runs, times):
    data = {"settings": tables.SETTINGS, "runs": runs, "prefill_ms": times}
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="r.json") as error:
        read_results(tmp_path / "r.json")
    assert "\n" not in str(error.value)


def test_the_readme_shows_what_was_measured(tmp_path, capsys):
    """Every line of every table, with the settings that the command has by default: all seeds, or not run."""
    shutil.copy(PACKAGE / "assets/tables.json", tmp_path)
    main(["all", "--draw", "--results", str(tmp_path / "tables.json")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    shown = (PACKAGE / "toy/README.md").read_text().splitlines()
    assert len(lines) >= 4 * 2 + 7 + 5 + 4 + 4 and not set(lines) - set(shown)
    runs = json.loads((PACKAGE / "assets/tables.json").read_text())["runs"]
    for table in TABLES.values():
        for run in table.values():
            assert sum(run._replace(seed=seed).name in runs for seed in range(3)) in (0, 3)


def test_plot_is_a_picture(tmp_path):
    plot(results_of(tmp_path / "r.json", "paths", [0]), 1, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_model_reads_larger_pictures_with_a_stretched_table():
    model = EEMLLM(tiny_config(WorldConfig(64)))
    table = torch.arange(64.0)[:, None].expand(64, 128)
    model.vision.position_embedding.weight = torch.nn.Parameter(table.clone())
    stretch(model, 128)
    stretched = model.vision.position_embedding.weight
    assert stretched.shape == (256, 128) and stretched[:, 0].diff().gt(0).float().mean() > 0.9
    assert model.visual_tokens(torch.zeros(256, 192), [(16, 16)]).shape == (256, 128)


def test_every_path_is_timed_at_both_sizes():
    times = time_prefills({", ".join(place): run for place, run in TABLES["paths"].items()}, turns=3)
    assert len(times) == 14 and all(ms > 0 for ms in times.values())


def test_a_new_row_is_timed_without_the_others(tmp_path, monkeypatch):
    file, args = tmp_path / "r.json", ["paths", "--seeds", "1", "--out", str(tmp_path)]
    asked = []
    monkeypatch.setattr(tables, "train", lambda run, folder: tmp_path)
    monkeypatch.setattr(tables, "score", lambda run, folder: 50.0)
    monkeypatch.setattr(tables, "time_prefills", lambda runs: asked.append(list(runs)) or dict.fromkeys(runs, 1.0))
    main([*args, "--results", str(file)])
    data = json.loads(file.read_text())
    del data["prefill_ms"]["saisa, 64 visual tokens"], data["runs"]["saisa_64px_seed0"]
    data["prefill_ms"]["llava, 64 visual tokens"] = 2.5
    file.write_text(json.dumps(data))
    main([*args, "--results", str(file)])
    data = json.loads(file.read_text())
    assert len(asked[0]) == 14 and asked[1] == ["saisa, 64 visual tokens"]
    assert data["prefill_ms"]["llava, 64 visual tokens"] == 2.5 and "saisa_64px_seed0" in data["runs"]


def test_two_commands_share_one_results_file(tmp_path):
    def add(name: str):
        for number in range(30):
            add_results(tmp_path / "r.json", "runs", {f"{name}{number}": {"accuracy": 1}})
    with ThreadPoolExecutor(2) as both:
        list(both.map(add, "ab"))
    assert len(read_results(tmp_path / "r.json")["runs"]) == 60


def test_a_results_file_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into"):
        main(["data", "--results", str(tmp_path / "file" / "r.json"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_table_is_trained_stopped_resumed_and_drawn(tmp_path, capsys, monkeypatch):
    """As a user does; Ctrl-C reaches train.py, and the same command goes on from its checkpoint."""
    config = tiny_config(WorldConfig(64))
    model = EEMLLM(config)
    initialize(model)
    save(model.state_dict(), config, tiny_tokenizer(config), tmp_path / "backbone-64")
    flags = ["composite", "--seeds", "1", "--out", str(tmp_path), "--results", str(tmp_path / "r.json")]
    few = 'tables.STEPS.update(pretrain=30, finetune=2); tables.QUESTIONS = 6'
    script = f"from nanoeemllm.toy import tables; {few}; tables.main({flags})"
    command = subprocess.Popen([sys.executable, "-c", script], cwd=PACKAGE.parent, stdout=subprocess.PIPE,
                               text=True, start_new_session=True)
    run = tmp_path / "llava_64px_seed0"
    metrics = run / "pretrain-run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(command.pid, signal.SIGINT)
    said, _ = command.communicate(timeout=120)
    assert "stopped; the same command goes on" in said and said.count("not run") == 4
    assert command.returncode == 0 and not (run / "finetune").exists()
    before = len(metrics.read_text().splitlines())
    assert before < 30

    monkeypatch.setattr(tables, "STEPS", {"pretrain": 30, "finetune": 2})
    monkeypatch.setattr(tables, "QUESTIONS", 6)
    main(flags)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31))
    results = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert len(results) == 4 and "not run" not in capsys.readouterr().out


def test_a_training_that_fails_is_told(tmp_path, capfd):
    config = tiny_config(WorldConfig(64))
    model = EEMLLM(config)
    initialize(model)
    save(model.state_dict(), config, tiny_tokenizer(config), tmp_path / "backbone-64")
    (tmp_path / "backbone-64/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="train.py ended with exit code 2"):
        main(["data", "--out", str(tmp_path), "--results", str(tmp_path / "r.json")])
    assert "error:" in capfd.readouterr().err
