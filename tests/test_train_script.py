"""train.py as a user calls it, on conversations in files; the model is tiny and untrained."""

import dataclasses
import json
import os
import signal

import pytest
from safetensors.torch import save_file

import train
from nanoeemllm import checkpoint
from nanoeemllm.config import UserError
from nanoeemllm.model import EEMLLM
from nanoeemllm.run import Run
from nanoeemllm.toy import WorldConfig, export_llava
from tiny_run import tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder and forty conversations of each stage."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model()
    checkpoint.save(model.state_dict(), model.config, model.tokenizer, folder / "start")
    export_llava(WorldConfig(picture_size=32), folder, 40)
    return folder


def call(*arguments) -> None:
    train.main(train.parse([str(a) for a in (*arguments, "--device", "cpu")]))


def on_files(world, out, stage, *more):
    call("--stage", stage, "--data", world / f"{stage}.json", "--images", world / "images", "--out", out, "--batch-size", 8,
         "--lr", 1e-2, "--workers", 1, "--micro-batch-tokens", 400, *more)


def test_both_stages_learn_from_files(world, tmp_path, capsys):
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--epochs", 2, "--val-data", world / "pretrain.json")
    on_files(world, tmp_path, "finetune", "--steps", 12)
    lines = [json.loads(line) for line in (tmp_path / "finetune-run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["loss"] < lines[0]["loss"]
    first = (tmp_path / "pretrain-run" / "metrics.jsonl").read_text().splitlines()
    assert len(first) == 10 and "held_out_loss" in json.loads(first[-1])
    assert json.loads((tmp_path / "pretrain-run" / "run.json").read_text())["conversations"] == [40]
    assert not (tmp_path / "finetune-run" / "checkpoints").exists()
    assert checkpoint.load(tmp_path / "finetune", device="cpu").config == checkpoint.load(world / "start", device="cpu").config
    on_files(world, tmp_path, "finetune", "--steps", 12, "--resume")
    assert "finetune: finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="steps was 12 and is now 13"):
        on_files(world, tmp_path, "finetune", "--steps", 13, "--resume")


def test_another_visual_path_begins_with_its_own_weights(world, tmp_path):
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--steps", 2, "--visual-path", "saisa")
    names = checkpoint.load(tmp_path / "pretrain", device="cpu").state_dict()
    assert any("visual_projector" in name for name in names) and not any(name.startswith("projector.") for name in names)


def test_stage_1_needs_a_model_that_sees(tmp_path):
    model = EEMLLM(dataclasses.replace(tiny_model().config, vision=None), tiny_model().tokenizer)
    checkpoint.save(model.state_dict(), model.config, model.tokenizer, tmp_path / "text")
    with pytest.raises(UserError, match="has no image encoder, so stage 1 has nothing to train"):
        call("--stage", "pretrain", "--init", tmp_path / "text", "--out", tmp_path)


def test_show_batch(world, tmp_path, capsys):
    on_files(world, tmp_path, "pretrain", "--init", world / "start", "--show-batch")
    shown = capsys.readouterr().out
    assert "no padding" in shown and "[4 x 4 picture]" in shown and "\033[1;32m" in shown
    assert not (tmp_path / "pretrain-run").exists()


def test_dry_run_of_files_and_of_the_papers_stages(world, tmp_path, capsys):
    on_files(world, tmp_path, "finetune", "--init", world / "start", "--dry-run")
    assert "40 samples in 5 steps of 8" in capsys.readouterr().out
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
                                       ["--init", "x"], ["--images", "x"], ["--mfu", "50"], ["--val-data", "x"]])
def test_values_that_make_no_sense(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        train.parse(arguments)


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
    inner = Run.save

    def save(self, step, state):
        inner(self, step, state)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Run, "save", save)
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
    model = checkpoint.load(world / "start", device="cpu")
    tensors = {name: x.double() for name, x in model.state_dict().items()}
    checkpoint.save(model.state_dict(), model.config, model.tokenizer, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        save_file(tensors, file)
    with pytest.raises(UserError, match="is torch.float64; weights must be"):
        checkpoint.load(tmp_path / "model", device="cpu")
