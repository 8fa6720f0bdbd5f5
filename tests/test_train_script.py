"""train.py as a user calls it, on conversations in files; the model is tiny and untrained."""

import contextlib
import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train
from nanoeemllm.weights import folder as weights
from nanoeemllm.config import UserError
from nanoeemllm.data import Mixture
from nanoeemllm.model import EEMLLM
from nanoeemllm.toy import WorldConfig, export_llava
from nanoeemllm.training.distributed import init_distributed
from nanoeemllm.training.flags import parse_flags
from nanoeemllm.training.run_folder import RunFolder
from tiny_run import free_port, tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder and forty conversations of each stage."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model()
    weights.save(model.state_dict(), model.config, model.tokenizer, folder / "start")
    export_llava(WorldConfig(picture_size=32), folder, 40)
    return folder


def call(*arguments) -> None:
    train.main(parse_flags("", [str(a) for a in (*arguments, "--device", "cpu")]))


def on_files(world, out, stage, *more):
    call("--stage", stage, "--data", world / f"{stage}.json", "--images", world / "images", "--out", out, "--batch-size", 8,
         "--lr", 1e-2, "--workers", 1, "--micro-batch-tokens", 400, *more)


def test_both_stages_learn_from_files(world, tmp_path, capsys):
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 10, "--val-data", world / "pretrain.json")
    on_files(world, tmp_path, "finetune", "--steps", 12)
    lines = [json.loads(line) for line in (tmp_path / "finetune-run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["loss"] < lines[0]["loss"]
    first = (tmp_path / "pretrain-run" / "metrics.jsonl").read_text().splitlines()
    assert len(first) == 10 and "held_out_loss" in json.loads(first[-1])
    assert json.loads((tmp_path / "pretrain-run" / "run.json").read_text())["conversations"] == [40]
    assert not (tmp_path / "finetune-run" / "checkpoints").exists()
    assert weights.load(tmp_path / "finetune", device="cpu").config == weights.load(world / "start", device="cpu").config
    on_files(world, tmp_path, "finetune", "--steps", 12, "--resume")
    assert "finetune: finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="steps was 12 and is now 13"):
        on_files(world, tmp_path, "finetune", "--steps", 13, "--resume")


def test_another_visual_path_begins_with_its_own_weights(world, tmp_path):
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 2, "--visual-path", "saisa")
    names = weights.load(tmp_path / "pretrain", device="cpu").state_dict()
    assert any("visual_projector" in name for name in names) and not any(name.startswith("projector.") for name in names)


def test_stage_1_needs_a_model_that_sees(tmp_path):
    model = EEMLLM(dataclasses.replace(tiny_model().config, vision=None), tiny_model().tokenizer)
    weights.save(model.state_dict(), model.config, model.tokenizer, tmp_path / "text")
    with pytest.raises(UserError, match="has no image encoder, so stage 1 has nothing to train"):
        call("--stage", "pretrain", "--init", tmp_path / "text", "--out", tmp_path)


def test_show_batch(world, tmp_path, capsys):
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--show-batch")
    shown = capsys.readouterr().out
    assert "no padding" in shown and "[4 x 4 picture]" in shown and "\033[1;32m" in shown
    assert not (tmp_path / "pretrain-run").exists()


def test_dry_run_of_files_and_of_the_papers_stages(world, tmp_path, capsys):
    on_files(world, tmp_path, "finetune", "--init", world / "start", "--dry-run")
    told = capsys.readouterr().out
    assert "40 samples in 5 steps of 8" in told and " s a step, " in told and "hours on this CPU" in told
    call("--stage", "pretrain", "--dry-run", "--preset", "eemllm-7b-980", "--assume", "558000,60,4900")
    told = capsys.readouterr().out
    assert "projector           21.5 M  trained" in told and "vision             417.8 M  frozen" in told
    assert "hours at 50% of 8 x 989 TFLOP/s" in told


@pytest.mark.parametrize("arguments, message", [
    (["--stage", "finetune"], "holds no model: run `python train.py --stage pretrain` first, or name one with --init"),
    (["--stage", "finetune", "--data", "x.json"], "run `python train.py --stage pretrain` first"),
    (["--stage", "pretrain", "--init", "nowhere"], "nowhere holds no model"),
    (["--stage", "pretrain", "--dry-run", "--preset", "tiny", "--assume", "1,2"], "give three whole numbers"),
    (["--stage", "pretrain", "--dry-run", "--preset", "tiny", "--assume", "9,-5,0"], "give three whole numbers"),
])
def test_what_is_missing_is_said(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        call(*arguments, "--out", tmp_path)


@pytest.mark.parametrize("arguments", [["--data", "x.json"], ["--steps", "0"], ["--lr", "nan"], ["--preset", "tiny"],
                                       ["--seed", "-1"], ["--workers", "-1"], ["--max-bad", "-0.1"], ["--assume", "10,5,3"],
                                       ["--init", "x"], ["--images", "x"], ["--mfu", "50"], ["--val-data", "x"],
                                       ["--steps", "2147483647"], ["--batch-size", "999999999"], ["--lr", "1e308"]])
def test_values_that_make_no_sense(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        parse_flags("", arguments)


def test_unusable_conversations_are_told_before_the_first_step(world, tmp_path, capsys):
    data = json.loads((world / "pretrain.json").read_text())
    data[7]["image"] = "../secret.png"
    data[9]["conversations"][1]["value"] = ""
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(data))
    arguments = ("--stage", "pretrain", "--init", world / "start", "--data", file, "--images", world / "images", "--out", tmp_path,
                 "--batch-size", 8, "--steps", 2, "--workers", 0)
    with pytest.raises(UserError, match="more than 1.00% cannot be used.*--max-bad"):
        call(*arguments)
    told = capsys.readouterr().err
    assert "2 of 40 conversations cannot be used" in told and "is outside of the image folder" in told and "an empty answer" in told
    call(*arguments, "--max-bad", 0.1)


def test_a_folder_without_run_json_is_left_as_it_is(world, tmp_path):
    (tmp_path / "pretrain-run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match="holds checkpoints but no run.json"):
            on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 2, *more)
    assert (tmp_path / "pretrain-run" / "checkpoints" / "step-00000004").is_dir()


def test_a_finished_run_outlives_a_mistake_with_force(world, tmp_path):
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 2)
    on_files(world, tmp_path, "finetune", "--steps", 2)
    with pytest.raises(UserError, match="other weights of its own"):
        on_files(world, tmp_path, "finetune", "--steps", 2, "--force", "--visual-path", "saisa")
    assert (tmp_path / "finetune-run" / "finished").exists()


def test_a_signal_in_the_last_step_stops_after_the_stage(world, tmp_path, monkeypatch, capsys):
    inner = RunFolder.save

    def save(self, step, state):
        inner(self, step, state)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(RunFolder, "save", save)
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 2)
    assert "pretrain is finished and saved: run the same command with --resume" in capsys.readouterr().out
    assert (tmp_path / "pretrain" / "config.json").exists() and (tmp_path / "pretrain-run" / "finished").exists()


def test_held_out_samples_that_cannot_be_used_are_counted(world, tmp_path):
    held_out = json.loads((world / "pretrain.json").read_text())[:5]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps([entry | {"image": str((tmp_path / "broken.png").name)} for entry in held_out]))
    (world / "images" / "broken.png").write_bytes(b"no picture")
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 2, "--val-data", file)
    last = json.loads((tmp_path / "pretrain-run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_bad"] == 5 and "held_out_loss" not in last


def test_weights_of_another_type_are_refused(world, tmp_path):
    model = weights.load(world / "start", device="cpu")
    tensors = {name: x.double() for name, x in model.state_dict().items()}
    weights.save(model.state_dict(), model.config, model.tokenizer, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        save_file(tensors, file)
    with pytest.raises(UserError, match="is torch.float64; weights must be"):
        weights.load(tmp_path / "model", device="cpu")


def test_an_epochs_order_is_made_when_it_is_reached(world, capsys):
    """1.6 thousand million samples, of which the first are shown; an epoch of the tiny world has 2^20 samples."""
    call("--stage", "pretrain", "--steps", 99_999_999, "--show-batch")
    assert "target tokens" in capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6                      # kB; the order alone would take 13 GB
    data = Mixture([list(range(10))], endless=True)
    assert sorted(data.order(0, 0)) == list(range(10)) and sorted(data.order(0, 3)) == list(range(30, 40))


def test_few_samples_for_the_papers_batch_are_told_with_a_setting(world, tmp_path, capsys):
    arguments = ("--stage", "pretrain", "--init", world / "start", "--data", world / "pretrain.json", "--images", world / "images",
                 "--out", tmp_path, "--show-batch")
    call(*arguments)
    assert "the paper's batch of 256 is more than a tenth of 40 samples: with --batch-size 4" in capsys.readouterr().err
    call(*arguments, "--batch-size", 4)
    assert "tenth" not in capsys.readouterr().err


@pytest.mark.parametrize("environment", [{"RANK": "abc"}, {"WORLD_SIZE": "-3"}, {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "x"},
                                         {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "0"}])
def test_an_odd_environment_is_told_in_one_line(tmp_path, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the environment.*torchrun"):
        call("--stage", "pretrain", "--out", tmp_path)


def test_a_weight_of_a_file_has_a_range(world, tmp_path):
    with pytest.raises(UserError, match="a weight above 0, from 1e-6 to 1e6"):
        call("--stage", "pretrain", "--init", world / "start", "--data", f"{world / 'pretrain.json'}:1e308", "--out", tmp_path)


def test_a_slow_first_step_says_what_to_lower(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.time, "perf_counter", itertools.count(0, 50).__next__)
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 2)
    assert "lower --batch-size or --max-length" in capsys.readouterr().err


def test_a_process_takes_its_share_of_the_cores(monkeypatch):
    taken = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for here in ("1", "2", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        with init_distributed("cpu"):
            pass
    assert taken == [4, 1]


def program(folder, *arguments, **options):
    """train.py as a process; its output is in folder/told."""
    command = [*arguments, "train.py", "--device", "cpu", "--stage", "finetune", "--init", folder / "start", "--out", folder / "out",
               "--data", folder / "finetune.json", "--images", folder / "images", "--batch-size", 8, "--checkpoint-every", 2]
    return subprocess.Popen([sys.executable, *map(str, command), *options.pop("more", [])], cwd=Path(__file__).parents[1],
                            stderr=open(folder / "told", "w"), stdout=subprocess.DEVNULL, **options)


def wait_for_step(folder, step):
    log = folder / "out" / "finetune-run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert time.time() < deadline, (folder / "told").read_text()
        time.sleep(0.01)


@pytest.mark.skipif(not os.environ.get("KILL_MATRIX"), reason="KILL_MATRIX=1 takes two minutes: ten processes are started")
def test_the_launcher_killed_or_the_terminal_closed_loses_nothing(world, tmp_path):
    """torchrun killed leaves its processes: a second training is refused until they have ended. Then Ctrl-C to the whole
    group, workers as well, and the end: the same as never stopped."""
    models = []
    for name, steps in (("straight", 0), ("killed", 2)):
        folder = tmp_path / name
        shutil.copytree(world, folder)
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port()))
        more = ["--steps", "40", "--workers", "1"]
        if steps:
            launcher = program(folder, *torchrun, more=more)
            wait_for_step(folder, steps)
            children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
            for child in children:                 # or they would be done before the second one starts
                os.kill(int(child), signal.SIGSTOP)
            os.kill(launcher.pid, signal.SIGKILL)
            launcher.wait()
            alone = program(folder, more=[*more, "--resume"])
            assert alone.wait(120) == 2 and "another process trains" in (folder / "told").read_text()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            again = program(folder, *torchrun, more=[*more, "--resume"], start_new_session=True)
            wait_for_step(folder, 20)
            os.killpg(again.pid, signal.SIGINT)
            again.wait(120)
        told = program(folder, *torchrun, more=[*more, "--resume"])
        assert told.wait(240) == 0, (folder / "told").read_text()
        models.append(weights.load(folder / "out" / "finetune", device="cpu").state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not list((tmp_path / "killed" / "out").glob(".*"))
