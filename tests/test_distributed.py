"""Several processes against one: losses, gradients, checkpoints and model folders are the same."""

import itertools
import os
import random
import signal
import time

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FSDPModule

from nanoeemllm.weights import folder as weights
from nanoeemllm.paths import PATHS
from nanoeemllm.data import Packed, load_batches
from nanoeemllm.data import collate
from nanoeemllm.training.distributed import save_model, shard_model
from nanoeemllm.training.step import Stopped
from train import accumulate, mean_loss
from tiny_run import (ALONE, Talks, encode, free_port, gradients, in_processes, metrics, start, tensors, tiny_model, tiny_plan,
                      tiny_run)

STAGES, PATHS = ("pretrain", "finetune"), ("eemllm", "llava")
SETTINGS = {"eemllm-f": {"composite_layers": (1,)}, "flamingo": {"every": 1}}


# ---- the same losses ----

def many_runs(group, folder, steps):
    for stage in STAGES:
        for path in PATHS:
            tiny_run(folder / f"{stage}-{path}", group, stage, path, steps)


def test_two_processes_see_the_losses_of_one_and_leave_the_same_model(tmp_path):
    many_runs(ALONE, tmp_path / "1", 20)
    in_processes(2, many_runs, tmp_path / "2", 20)
    for name in (f"{stage}-{path}" for stage in STAGES for path in PATHS):
        one, two = metrics(tmp_path / "1" / name), metrics(tmp_path / "2" / name)
        assert len(one) == len(two) == 20
        for a, b in zip(one, two):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5) and b["lr"] == a["lr"]
        assert one[-1]["loss"] < one[0]["loss"] - 0.1
        one, two = tensors(tmp_path / "1" / name / "model"), tensors(tmp_path / "2" / name / "model")
        began = tiny_model(name.split("-", 1)[1], name.split("-")[0])
        for key, p in began.named_parameters():
            if not p.requires_grad:
                assert torch.equal(one[key], p) and torch.equal(two[key], p)
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-3)     # AdamW makes much of the smallest


# ---- the same gradients ----

def save_gradients(group, file, budget, checkpointed=False):
    model = tiny_model()
    model.decoder.checkpoint_activations = checkpointed
    shard_model(model, group)
    seen, *_ = accumulate(model, load_batches(tiny_plan(budget=budget), encode, 0, 1, group.rank, group.size), backward=True)
    learned = group.sum(seen)["targets"]
    found = {name: grad * group.size / learned for name, grad in gradients(model).items()}
    if group.is_first:
        torch.save(found, file)


def test_gradients_do_not_depend_on_processes_and_accumulation(tmp_path):
    plan = tiny_plan(budget=2)
    assert [len(list(plan.micro_batches(0, 1, 0, size))) for size in (1, 2, 4)] == [4, 2, 1]
    save_gradients(ALONE, tmp_path / "1", 2)
    save_gradients(ALONE, tmp_path / "whole", None)
    save_gradients(ALONE, tmp_path / "again", 2, True)
    for size in (2, 4):
        in_processes(size, save_gradients, tmp_path / str(size), 2)
    in_processes(2, save_gradients, tmp_path / "2-again", 2, True)
    one = torch.load(tmp_path / "1")
    assert len(one) == sum(p.requires_grad for p in tiny_model().parameters())
    for other in ("whole", "again", "2", "4", "2-again"):
        found = torch.load(tmp_path / other)
        for name in one:
            torch.testing.assert_close(found[name], one[name], rtol=1e-6, atol=1e-6, msg=lambda m: f"{other} {name}: {m}")


def one_rank_without_pictures(group, folder):
    conversations = [Talks(99)[i] for i in range(99)]
    with_pictures = [c for c in conversations if c["image"]][:2]
    without = [c for c in conversations if not c["image"]][:2]
    mine = [with_pictures, without][group.rank] if group.size == 2 else with_pictures + without
    packed = Packed(0, True, collate([encode(c) for c in mine]), [], [], 0)
    for stage in STAGES:
        for path in PATHS:
            model = tiny_model(path, stage, **SETTINGS.get(path, {}))
            shard_model(model, group)
            accumulate(model, [packed], backward=True)
            found = {name: grad * group.size for name, grad in gradients(model).items()}
            if group.is_first:
                torch.save(found, folder / f"{stage}-{path}-{group.size}")


def test_a_rank_without_pictures_takes_part_on_every_visual_path(tmp_path):
    one_rank_without_pictures(ALONE, tmp_path)
    in_processes(2, one_rank_without_pictures, tmp_path)
    for name in (f"{stage}-{path}" for stage in STAGES for path in PATHS):
        one, two = torch.load(tmp_path / f"{name}-1"), torch.load(tmp_path / f"{name}-2")
        assert one.keys() == two.keys() and one
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-4, msg=lambda m: f"{name} {key}: {m}")


# ---- number types ----

def in_bfloat16(group, folder):
    model = tiny_model()
    began = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data = p.data.half() if name.startswith("vision.") else p.data.bfloat16()      # as published folders may be
    stored = shard_model(model, group, torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if name.startswith("vision.") else torch.float32)
    seen, *_ = accumulate(model, load_batches(tiny_plan(), encode, 0, 1, group.rank, group.size), backward=True)
    found = gradients(model)
    assert {g.dtype for g in found.values()} == {torch.float32}
    whole = tiny_model()
    exact, *_ = accumulate(whole, load_batches(tiny_plan(), encode, 0, 1), backward=True)
    assert mean_loss(group.sum(seen)) == pytest.approx(mean_loss(exact), rel=0.02)
    for name, grad in gradients(whole).items():
        error = (found[name] * group.size - grad).norm() / grad.norm()
        assert error < 0.15, (name, error)
    save_model(model, stored, group, folder)
    for name, x in tensors(folder).items():
        frozen = name.startswith("vision.")
        assert x.dtype == (torch.float16 if frozen else torch.bfloat16)
        assert torch.equal(x, began[name].to(x.dtype))


def test_bfloat16_compute_keeps_float32_weights_and_writes_what_it_was_given(tmp_path):
    in_processes(2, in_bfloat16, tmp_path / "model")


# ---- stop on one number of processes, go on with another ----

def interrupted(*arguments):
    """The last rank gets a SIGTERM in step 5."""
    for p in load_batches(*arguments):
        if p.step == 4 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield p


def stop_in_the_middle(group, folder):
    with pytest.raises(Stopped, match="stopped after step 5 of 8.*--resume"):
        tiny_run(folder, group, loader=interrupted, checkpoint_every=100)


def go_on(group, folder):
    tiny_run(folder, group, resume=True, checkpoint_every=100)



@pytest.mark.parametrize("before, after", [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    tiny_run(tmp_path / "straight")
    in_processes(before, stop_in_the_middle, tmp_path / "stopped")
    assert [p.name for p in (tmp_path / "stopped" / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    in_processes(after, go_on, tmp_path / "stopped")
    straight, stopped = metrics(tmp_path / "straight"), metrics(tmp_path / "stopped")
    assert [line["step"] for line in stopped] == list(range(1, 9))
    for a, b in zip(straight, stopped):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    one, other = (weights.load(tmp_path / name / "model", device="cpu") for name in ("straight", "stopped"))
    assert isinstance(one, type(other)) and not isinstance(other, FSDPModule)
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-3)


# ---- held-out measurements and kills ----

def with_and_without_held_out(group, folder):
    for path, stage in itertools.product(("eemllm", "saisa"), STAGES):
        for name, held_out in (("with", tiny_plan(16)), ("without", None)):
            tiny_run(folder / f"{path}-{stage}-{name}", group, stage, path, steps=4, held_out=held_out)


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_after_a_measurement_equals_one_without_it(tmp_path, size):
    in_processes(size, with_and_without_held_out, tmp_path)
    for path, stage in itertools.product(("eemllm", "saisa"), STAGES):
        for step in ("step-00000002", "step-00000004"):
            states = []
            for name in ("with", "without"):
                file = tmp_path / "state"
                dcp_to_torch_save(tmp_path / f"{path}-{stage}-{name}" / "run" / "checkpoints" / step, file)
                states.append(torch.load(file))
            one, other = states
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
            assert all(one[key].count_nonzero() for key in one if key.endswith("exp_avg_sq"))


STEPS = 14
VICTIMS = ((0,), (1,), (0, 1))
CASES = [("finetune", "eemllm", True), ("pretrain", "saisa", True)]       # of all, which KILL_MATRIX=1 takes
if os.environ.get("KILL_MATRIX"):
    CASES = list(itertools.product(STAGES, ("eemllm", "llava", "saisa"), (True, False)))


def resumed_run(group, folder, stage, path, held_out):
    tiny_run(folder, group, stage, path, STEPS, resume=True, held_out=tiny_plan(16) if held_out else None)


@pytest.mark.parametrize("stage, path, held_out", CASES)
def test_killed_over_two_processes_a_run_ends_as_if_it_never_was(tmp_path, stage, path, held_out):
    straight, killed, rng = tmp_path / "straight", tmp_path / "killed", random.Random(0)
    in_processes(2, resumed_run, straight, stage, path, held_out)
    log = killed / "run" / "metrics.jsonl"
    for kill in range(10 if os.environ.get("KILL_MATRIX") else 3):
        before = len(metrics(killed)) if log.exists() else 0
        port = free_port()
        ranks = [start(resumed_run, killed, stage, path, held_out, rank=rank, size=2, port=port) for rank in range(2)]
        goal = min(before + rng.randint(1, 3), STEPS - 1)
        while not (log.exists() and log.read_text().count("\n") >= goal):
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        for victim in VICTIMS[kill % 3]:
            os.kill(ranks[victim].pid, signal.SIGKILL)
        for process in ranks:
            process.join(20)                              # who was not killed misses the other, and ends
            process.kill()
            process.join()
        assert all(process.exitcode for process in ranks)
    in_processes(2, resumed_run, killed, stage, path, held_out)
    one, other = tensors(straight / "model"), tensors(killed / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    for key in ("loss", "held_out_loss"):
        assert [line.get(key) for line in metrics(killed)] == [line.get(key) for line in metrics(straight)]
