"""Line charts, and the benchmarks of time and operations."""

import json

import pytest
import torch
from PIL import Image

from nanoeemllm.attention import use_attention
from nanoeemllm.bench import answers
from nanoeemllm.bench.__main__ import main
from nanoeemllm.bench.systems import scores_in_memory
from nanoeemllm.config import IMAGE_TOKEN as IMAGE
from nanoeemllm.config import UserError
from nanoeemllm.border.plot import line_chart
from test_generation import make_model as wide_model
from test_model import picture


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
    common = ["--preset", "tiny", "--systems", "all", "--visual", "576", "--text", "40", "--runs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(answers, "best_ms", lambda *args: 1.0)                 # the rates are not what is tested
    main(["prefill", *common])
    rows = {row["system"]: row for row in json.loads((tmp_path / "prefill.json").read_text())["rows"]}
    assert rows["eemllm"]["operations"] < rows["llava"]["operations"] == rows["llava-2024"]["operations"]
    assert "second question" in rows["eemllm"] and "second question" not in rows["llava"] and rows["eemllm"]["vision"] > 0
    main(["decode", *common, "--tokens", "9"])
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [list(row["seconds"]) for row in rows] == [["2", "8", "9"]] * len(rows) and (tmp_path / "decode.png").is_file()
    shown = capsys.readouterr().out
    assert shown.count("1 x 576") == 16 and "threads" in shown
    with pytest.raises(UserError, match="known are"):
        main(["prefill", *common, "--systems", "x"])
    for flag in ("--runs", "--images", "--text", "--tokens"):
        with pytest.raises(UserError, match=f"{flag}: '0' is no int over 0"):
            main(["prefill", *common, flag, "0"])


def test_training_steps_are_timed(capsys):
    main(["train", "--paths", "llava", "saisa", "--stages", "pretrain", "--visual", "64", "--samples", "1", "--steps", "1"])
    shown = capsys.readouterr().out
    assert "| pretrain | 64 | llava |" in shown and "| pretrain | 64 | saisa |" in shown
    with pytest.raises(UserError, match="square picture, as in 49"):
        main(["train", "--visual", "50"])


def test_scores_in_memory_give_the_same_logits():
    model = wide_model("llava", dtype=torch.float64)
    expected = model.logits([1, IMAGE, 5, 6], [picture(1)])
    with use_attention(scores_in_memory):
        torch.testing.assert_close(model.logits([1, IMAGE, 5, 6], [picture(1)]), expected, rtol=1e-5, atol=1e-5)
