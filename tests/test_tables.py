"""The tables' bookkeeping; what they train is train.py's."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import nanoeemllm
from nanoeemllm.backbone import tiny_config
from nanoeemllm.config import UserError
from nanoeemllm.model import EEMLLM
from nanoeemllm.tables import LAYERS, Results, at_size, draw, lines_of, main, plot, time_prefills
from nanoeemllm.toy import WorldConfig

SETTINGS = {"steps": [1, 1]}
ASSETS = Path(nanoeemllm.__file__).parent / "assets"


def results_of(tmp_path, table: str, seeds) -> Results:
    results = Results(tmp_path / "r.json", SETTINGS)
    for seed in seeds:
        for number, asked in enumerate(lines_of(table, seed).values()):
            results.add("runs", {asked.name: {"accuracy": 50 + number + seed, "operations": 1e3 * (number + 1)}})
    return results


@pytest.mark.parametrize("table", ["paths", "aligner", "composite", "data"])
def test_a_table_is_drawn_from_the_results_alone(tmp_path, table):
    results_of(tmp_path, table, range(2))
    lines = draw(table, Results(tmp_path / "r.json", SETTINGS), seeds=3)       # the third seed is not run yet
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len({row for row, _ in lines_of(table, 0)}) and "50.5 ± 0.5" in lines[2]


def test_runs_are_told_apart_and_shared_between_tables():
    tables = ("paths", "aligner", "composite", "data")
    names = {seed: {asked.name for table in tables for asked in lines_of(table, seed).values()} for seed in range(2)}
    assert not names[0] & names[1]
    later = f"llava_64px_seed0 as eemllm-f {LAYERS - 2}-{LAYERS - 1}"
    assert {"llava_64px_seed0", "eemllm_64px_seed0", later} <= names[0]
    assert len(names[0]) == 14 + 9 + (LAYERS - 1) + 6                   # what several tables ask for is run once


def test_results_of_other_settings_are_not_mixed(tmp_path):
    results_of(tmp_path, "data", [0])
    with pytest.raises(UserError, match="another --results"):
        Results(tmp_path / "r.json", {"steps": [2, 2]})
    assert json.loads((tmp_path / "r.json").read_text())["settings"] == SETTINGS


def test_the_readme_shows_what_was_measured(tmp_path, capsys):
    """Every line of every table, all of it run, with the settings that the command has by default."""
    shutil.copy(ASSETS / "tables.json", tmp_path)
    main(["all", "--draw", "--results", str(tmp_path / "tables.json")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    shown = (ASSETS.parents[1] / "README.md").read_text().splitlines()
    assert len(lines) == 4 * 2 + 7 + 5 + (LAYERS + 1) + 4 and not set(lines) - set(shown)
    assert not any("|  |" in line for line in lines)
    results = json.loads((ASSETS / "tables.json").read_text())["runs"]
    assert all(asked.name in results for table in ("paths", "aligner", "composite", "data") for seed in range(3)
               for asked in lines_of(table, seed).values())


def test_plot_is_a_picture(tmp_path):
    plot(results_of(tmp_path, "paths", [0]), 1, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_model_reads_larger_pictures_with_a_stretched_table():
    model = EEMLLM(tiny_config(WorldConfig(64)))
    table = torch.arange(64.0)[:, None].expand(64, 128)
    model.vision.position_embedding.weight = torch.nn.Parameter(table.clone())
    at_size(model, 128)
    stretched = model.vision.position_embedding.weight
    assert stretched.shape == (256, 128) and stretched[:, 0].diff().gt(0).float().mean() > 0.9
    assert model.visual_tokens(torch.zeros(256, 192), [(16, 16)]).shape == (256, 128)


def test_every_path_is_timed_at_both_sizes():
    times = time_prefills()
    assert {place.split(",")[0] for place in times} == {row for row, _ in lines_of("paths", 0)}
    assert len(times) == 14 and all(ms > 0 for ms in times.values())


def test_two_commands_share_one_results_file(tmp_path):
    def add(name: str):
        results = Results(tmp_path / "r.json", SETTINGS)
        for number in range(30):
            results.add("runs", {f"{name}{number}": {"accuracy": 1}})
    with ThreadPoolExecutor(2) as both:
        list(both.map(add, "ab"))
    assert len(Results(tmp_path / "r.json", SETTINGS).runs) == 60


def test_a_results_file_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into"):
        main(["data", "--results", str(tmp_path / "file" / "r.json"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
